"""moving-shapes: generated clips of textured shapes, with the ground-truth box of every object."""
