"""Every rule: hands the job to its stage's declaration, `stage.py` in the folder of `stm/` that does the work."""

from pathlib import Path

from stm.stages.journey import run_stage


def paths(files):
    """Snakemake's files by name: one path, or a list of them."""
    return {name: Path(f) if isinstance(f, str) else [Path(part) for part in f] for name, f in files.items()}


run_stage(
    snakemake.rule,
    snakemake.config,
    dict(snakemake.wildcards.items()),
    paths(snakemake.input),
    paths(snakemake.output),
    snakemake.threads,
    Path(snakemake.log[0]),
    snakemake.resources.get("gpu", 0),
)
