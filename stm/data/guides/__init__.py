"""Masking guides: scores per token, cropped from the maps that the offline stages cached."""
