"""Networks: VideoMAE (`vit`), video and language, teachers; weights in and out (`weights.zoo`); FLOPs of a step (`cost`)."""
