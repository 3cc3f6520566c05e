# Stage 5: motion magnitude and mean vector per patch and stored frame.


rule motion:
    input:
        slice=slice_of,
        frames=rules.frames.output.index,
    output:
        motion=f"{ROOT}/motion/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/motion/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/motion/{{shard}}.tsv"
    cache: SHARED
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=each_attempt(4000),
        runtime=240,
    params:
        settings=stage("motion"),
        grid=stage("grid"),
        bad_input=stage("bad_input"),
        software=software,
    script:
        "../scripts/motion.py"
