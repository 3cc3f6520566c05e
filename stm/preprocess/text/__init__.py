"""Stage 4b: one vector per caption, by a frozen text encoder."""
