# Stage 6: WebDataset shards, each with an index.


SHARDS = declared("shards")
REMOVES_FRAMES = not all(one.frames.keep for one in JOBS.configs.values())


def packed(path):
    """A packed file. Snakemake deletes outputs before a job, but removed frames are taken from the shard that it replaces."""
    return update(path) if REMOVES_FRAMES else path


rule shards:
    """Pack the frames, captions and maps of a shard into one WebDataset tar with an index."""
    input:
        unpack(SHARDS.inputs),  # slice, tar, frames, captions, similarity, text, motion, flow
    output:
        tar=packed(SHARDS.output.tar),  # shards/{split}/{shard}.tar
        index=packed(SHARDS.output.index),  # shards/{split}/{shard}.parquet
    log:
        SHARDS.log,
    benchmark:
        SHARDS.benchmark
    conda:
        "../../environment.yml"
    resources:
        mem_mb=SHARDS.resource.mem_mb,
        runtime=SHARDS.resource.runtime,
    params:
        settings=SHARDS.settings,
    script:
        "../scripts/stage.py"
