"""Masked video and video-language pretraining, from raw videos to published tables.

Importing `stm` is light on purpose: torch, PyAV, transformers and their like are imported by the modules that use
them.
"""

__version__ = "0.1.0"
