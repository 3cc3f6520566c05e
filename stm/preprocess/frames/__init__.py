"""Stage 2: sampled frames as JPEGs in a tar."""
