# Stage 5b: optical flow between stored frames.


rule flow:
    input:
        tar=rules.frames.output.tar,
        frames=rules.frames.output.index,
        model=flow_model,
    output:
        flow=f"{ROOT}/flow/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/flow/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/flow/{{shard}}.tsv"
    cache: SHARED
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=each_attempt(4000),
        runtime=240,
    params:
        settings=stage("flow"),
        grid=stage("grid"),
        bad_input=stage("bad_input"),
        software=software,
    script:
        "../scripts/flow.py"
