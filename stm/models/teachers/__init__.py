"""Frozen image and video towers that students learn from."""
