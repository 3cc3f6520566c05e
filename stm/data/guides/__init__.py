"""The guides of masks: scores per token, cropped from the maps that the offline stages cached."""
