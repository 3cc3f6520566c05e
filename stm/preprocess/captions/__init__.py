"""Stage 3: captions, by source."""
