"""STM's learned mask and its decoder (CVPR 2025)."""
