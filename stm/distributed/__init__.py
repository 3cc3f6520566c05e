"""Multi-process training: process groups, gathering with gradients, sharded models."""
