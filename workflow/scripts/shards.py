"""Rule `shards`: see stm.preprocess.packing.pack.pack_shard."""

from pathlib import Path

from stm.config import parse_config
from stm.jobs.progress import log_to
from stm.preprocess.packing.pack import pack_shard

config = parse_config(snakemake.config).of(snakemake.wildcards.dataset)


def by_source(name):
    """The files of each packed caption source, in the config's order; none when that part is not packed."""
    return dict(zip(config.pack.sources, map(Path, snakemake.input.get(name, [])), strict=False))


def optional(name):
    path = snakemake.input.get(name)
    return Path(path) if path else None


with log_to(snakemake.log[0]):
    pack_shard(
        slice_path=Path(snakemake.input.slice),
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        captions=by_source("captions"),
        arrays={a.name: (by_source if a.per_source else optional)(a.name) for a in config.pack.arrays},
        tar=Path(snakemake.output.tar),
        index=Path(snakemake.output.index),
        pack=config.pack,
        grid=config.grid,
        bad_input=config.bad_input,
    )
