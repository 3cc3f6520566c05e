"""Weights in and out: our safetensors, VideoMAE's checkpoints, transformers and timm."""
