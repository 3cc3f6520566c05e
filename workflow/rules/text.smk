# Stage 4b: one vector a caption, by a frozen text encoder.


rule text:
    input:
        captions=captions_of,
        model=lambda wildcards: text_model(wildcards.dataset),
    output:
        text=f"{ROOT}/text/{{source}}/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/text/{{source}}/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/text/{{source}}/{{shard}}.tsv"
    cache: SHARED
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=each_attempt(8000),
        gpu=1,
        runtime=120,
    params:
        settings=stage("text"),
        bad_input=stage("bad_input"),
        software=software,
    script:
        "../scripts/text.py"
