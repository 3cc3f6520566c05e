# Stage 6: WebDataset shards, each with an index.


SHARDS = declared("shards")


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
