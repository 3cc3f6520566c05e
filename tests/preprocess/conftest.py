"""The stages, each in the folder of its own name."""
