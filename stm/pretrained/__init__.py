"""Loads third-party models, from the hub or local files, for the whole package: CLIP, text encoders, BLIP-2."""
