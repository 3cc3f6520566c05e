# Stage 3: captions, by source.


rule captions:
    input:
        slice=slice_of,
        tar=rules.frames.output.tar,
        frames=rules.frames.output.index,
        model=source_model,
    output:
        captions=f"{ROOT}/captions/{{source}}/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/captions/{{source}}/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/captions/{{source}}/{{shard}}.tsv"
    cache: SHARED
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=each_attempt(16000),
        gpu=1,
        runtime=480,
    params:
        source=lambda wildcards: caption_settings(wildcards.dataset, wildcards.source),
        bad_input=stage("bad_input"),
        software=software,
    script:
        "../scripts/captions.py"
