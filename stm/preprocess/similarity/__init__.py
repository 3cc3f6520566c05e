"""Stage 4: patch-text similarity maps."""
