"""How the small models of the demo were made. Nothing imports this package; `snakemake demo_models` runs it."""
