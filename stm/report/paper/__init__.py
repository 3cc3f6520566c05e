"""The tables and figures of a paper."""
