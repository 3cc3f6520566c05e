"""Reading and writing weights: our safetensors, VideoMAE's checkpoints, transformers and timm."""
