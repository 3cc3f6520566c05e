# Stage 4: patch-text similarity, one map per caption and frame. Where the config keeps patch embeddings, a rule of their own
# writes them.


EMBEDDINGS = declared("embeddings")


rule embeddings:
    """Embed every patch of a shard's frames with CLIP; only where the config keeps embeddings."""
    input:
        unpack(EMBEDDINGS.inputs),  # tar, frames, model
    output:
        embeddings=EMBEDDINGS.output.embeddings,  # embeddings/{shard}.parquet
    log:
        EMBEDDINGS.log,
    benchmark:
        EMBEDDINGS.benchmark
    cache: EMBEDDINGS.shared
    conda:
        "../../environment.yml"
    threads: EMBEDDINGS.threads
    resources:
        mem_mb=EMBEDDINGS.resource.mem_mb,
        gpu=EMBEDDINGS.resource.gpu,
        runtime=EMBEDDINGS.resource.runtime,
    params:
        settings=EMBEDDINGS.settings,
        made_with=EMBEDDINGS.made_with,
    script:
        "../scripts/stage.py"


SIMILARITY = declared("similarity")


rule similarity:
    """Score every patch of a shard's frames against each caption of its clip: patch-text similarity maps."""
    input:
        unpack(SIMILARITY.inputs),  # tar, frames, captions, model, embeddings if kept
    output:
        similarity=SIMILARITY.output.similarity,  # similarity/{source}/{shard}.parquet
    log:
        SIMILARITY.log,
    benchmark:
        SIMILARITY.benchmark
    cache: SIMILARITY.shared
    conda:
        "../../environment.yml"
    threads: SIMILARITY.threads
    resources:
        mem_mb=SIMILARITY.resource.mem_mb,
        gpu=SIMILARITY.resource.gpu,
        runtime=SIMILARITY.resource.runtime,
    params:
        settings=SIMILARITY.settings,
        made_with=SIMILARITY.made_with,
    script:
        "../scripts/stage.py"
