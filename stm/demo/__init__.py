"""Training of the demo's small models. Only the stage of `snakemake demo_models` uses this package."""
