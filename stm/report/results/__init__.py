"""Readers for the results that the stages wrote."""
