# Stage 2: every k-th frame, or a number of them, the short side resized, as JPEGs in a tar. The tar is not `temp()`: what replaces
# it says stm/preprocess/frames/removal.py.


FRAMES = declared("frames")


rule frames:
    """Sample frames of a shard's clips and store them as JPEGs."""
    input:
        unpack(FRAMES.inputs),  # slice; lenders, if frames are taken from another dataset
    output:
        tar=FRAMES.output.tar,  # frames/{shard}.tar
        index=FRAMES.output.index,  # frames/{shard}.parquet
    log:
        FRAMES.log,
    benchmark:
        FRAMES.benchmark
    cache: FRAMES.shared
    conda:
        "../../environment.yml"
    threads: FRAMES.threads
    resources:
        mem_mb=FRAMES.resource.mem_mb,
        runtime=FRAMES.resource.runtime,
    params:
        settings=FRAMES.settings,
        made_with=FRAMES.made_with,
    script:
        "../scripts/stage.py"
