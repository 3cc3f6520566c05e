"""Figures of clips, their guides and their masks."""
