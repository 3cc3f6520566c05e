# Stage 2: every k-th frame, short side resized, as JPEGs in a tar.


rule frames:
    input:
        slice=slice_of,
    output:
        tar=f"{ROOT}/frames/{{shard}}.tar",
        index=f"{ROOT}/frames/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/frames/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/frames/{{shard}}.tsv"
    cache: SHARED
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=each_attempt(4000),
        runtime=240,
    params:
        settings=stage("frames"),
        bad_input=stage("bad_input"),
        software=software,
    script:
        "../scripts/frames.py"
