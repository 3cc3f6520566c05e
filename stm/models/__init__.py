"""Networks: VideoMAE (`vit`), video and language, teachers; weights files (`weights.zoo`); FLOPs of a step (`cost`)."""
