"""Models of others, loaded once for all that use them: CLIP, text encoders, BLIP-2, from a hub or from local files."""
