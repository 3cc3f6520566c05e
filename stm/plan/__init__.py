"""The plan: an estimate of what a run will cost, made before it runs."""
