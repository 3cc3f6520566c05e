"""Networks: VideoMAE (`vit`); sizes, files, foreign checkpoints (`zoo`); arithmetic of a step (`cost`)."""
