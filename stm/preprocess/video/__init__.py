"""Decoding: containers, orientation, frames in order, and what can be wrong with a file."""
