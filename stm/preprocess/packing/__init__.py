"""Stage 6: all data of a clip in one WebDataset sample."""
