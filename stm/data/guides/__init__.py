"""The guides of masks: per-token scores cut from the maps that the offline stages cached."""
