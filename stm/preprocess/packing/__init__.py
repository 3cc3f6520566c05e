"""Stage 6: everything about a clip in one WebDataset sample."""
