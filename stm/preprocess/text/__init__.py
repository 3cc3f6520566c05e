"""Stage 4b: one vector per caption, from a frozen text encoder."""
