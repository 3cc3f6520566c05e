"""Stage 6: pack all data of a clip into one WebDataset sample."""
