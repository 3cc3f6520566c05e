"""moving-shapes: generated clips of textured shapes, with every object's true box."""
