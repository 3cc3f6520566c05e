"""Third-party models, loaded in one place for all that use them: CLIP, text encoders, BLIP-2, from the hub or local files."""
