# Stage 5b: optical flow between stored frames.


FLOW = declared("flow")


rule flow:
    """Compute the optical flow between the stored frames of a shard."""
    input:
        unpack(FLOW.inputs),  # tar, frames, model
    output:
        flow=FLOW.output.flow,  # flow/{shard}.parquet
    log:
        FLOW.log,
    benchmark:
        FLOW.benchmark
    cache: FLOW.shared
    conda:
        "../../environment.yml"
    threads: FLOW.threads
    resources:
        mem_mb=FLOW.resource.mem_mb,
        runtime=FLOW.resource.runtime,
        gpu=FLOW.resource.gpu,
    params:
        settings=FLOW.settings,
        made_with=FLOW.made_with,
    script:
        "../scripts/stage.py"
