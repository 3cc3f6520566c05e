# Stage 1: assignment of clips to shards. A checkpoint, because the number of shards is unknown until it has run.


SPLIT = declared("split")


checkpoint split:
    """Assign the clips to shards: write slices/{shard}.parquet, and slices.json, the list of all shards."""
    input:
        unpack(SPLIT.inputs),  # manifest
    output:
        index=SPLIT.output.index,  # slices.json
    log:
        SPLIT.log,
    conda:
        "../../environment.yml"
    params:
        settings=SPLIT.settings,
    script:
        "../scripts/stage.py"
