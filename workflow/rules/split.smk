# Stage 1: clips are dealt to shards. A checkpoint, because only it knows how many there are.


SPLIT = declared("split")


checkpoint split:
    """The clips, dealt to shards: slices/{shard}.parquet, and the list of them all."""
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
