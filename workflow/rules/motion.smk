# Stage 5: motion magnitude and mean vector per cell and stored frame.


MOTION = declared("motion")


rule motion:
    """Compute motion maps between the stored frames of a shard: magnitude and mean vector per cell."""
    input:
        unpack(MOTION.inputs),  # slice, frames
    output:
        motion=MOTION.output.motion,  # motion/{shard}.parquet
    log:
        MOTION.log,
    benchmark:
        MOTION.benchmark
    cache: MOTION.shared
    conda:
        "../../environment.yml"
    threads: MOTION.threads
    resources:
        mem_mb=MOTION.resource.mem_mb,
        runtime=MOTION.resource.runtime,
    params:
        settings=MOTION.settings,
        made_with=MOTION.made_with,
    script:
        "../scripts/stage.py"
