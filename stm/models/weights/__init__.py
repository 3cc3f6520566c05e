"""Reads and writes weights: our safetensors, VideoMAE's checkpoints, transformers and timm."""
