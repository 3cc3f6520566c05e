"""Rule `shards`: see stm.preprocess.shards.pack_shard."""

from pathlib import Path

from stm.config import parse_config
from stm.preprocess.shards import pack_shard
from stm.progress import log_to

config = parse_config(snakemake.config)


def optional(name):
    path = snakemake.input.get(name)
    return Path(path) if path else None


with log_to(snakemake.log[0]):
    pack_shard(
        slice_path=Path(snakemake.input.slice),
        frames_tar=Path(snakemake.input.tar),
        frames_index=Path(snakemake.input.frames),
        captions=optional("captions"),
        similarity=optional("similarity"),
        motion=optional("motion"),
        tar=Path(snakemake.output.tar),
        index=Path(snakemake.output.index),
        pack=config.pack,
        grid=config.grid,
        bad_input=config.bad_input,
    )
