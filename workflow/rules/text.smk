# Stage 4b: text embeddings of the captions, from a frozen text encoder.


TEXT = declared("text")


rule text:
    """Embed the captions of a shard with a frozen text encoder: one vector per caption."""
    input:
        unpack(TEXT.inputs),  # captions, model
    output:
        text=TEXT.output.text,  # text/{source}/{shard}.parquet
    log:
        TEXT.log,
    benchmark:
        TEXT.benchmark
    cache: TEXT.shared
    conda:
        "../../environment.yml"
    threads: TEXT.threads
    resources:
        mem_mb=TEXT.resource.mem_mb,
        gpu=TEXT.resource.gpu,
        runtime=TEXT.resource.runtime,
    params:
        settings=TEXT.settings,
        made_with=TEXT.made_with,
    script:
        "../scripts/stage.py"
