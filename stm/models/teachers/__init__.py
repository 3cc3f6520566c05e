"""Frozen image and video towers used as teachers."""
