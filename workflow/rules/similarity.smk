# Stage 4: patch-text similarity, one map per caption and frame. Embeddings are their own file where they are kept.


EMBEDDINGS = declared("embeddings")


rule embeddings:
    """CLIP's embedding of every patch of a shard's frames."""
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
    """How much each patch of a shard's frames resembles each caption of its clip."""
    input:
        unpack(SIMILARITY.inputs),  # tar, frames, captions, model, and embeddings where they are kept
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
