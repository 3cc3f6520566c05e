"""Trains the demo's small models. This package is used only by the stage of `snakemake demo_models`."""
