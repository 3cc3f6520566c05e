"""The rehearsal: the whole workflow of a config, at a size that two cores finish in minutes.

Every rule, run, evaluation, table and figure is the config's own; sizes, models and data are small. `shrink` makes the small
config, `differences` says in which keys it differs, `copies` lays out a few clips of each dataset as in its official copy,
`models` and `checkpoints` save small models in the formats of the published ones, and `run` starts Snakemake on all of it.
"""
