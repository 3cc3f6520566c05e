# Stage 4: patch-text similarity, one map per caption and frame. A shard with several caption sources is scored once for all of
# them; where the config keeps patch embeddings, a rule of their own writes them instead.


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


JOINT_SIMILARITY = declared("joint_similarity")


rule joint_similarity:
    """Score every patch of a shard's frames against the captions of all sources, in one pass of the image tower."""
    input:
        unpack(JOINT_SIMILARITY.inputs),  # tar, frames, captions of each source, model
    output:
        maps=temp(JOINT_SIMILARITY.output.maps),  # joint_similarity/{shard}.parquet
    log:
        JOINT_SIMILARITY.log,
    benchmark:
        JOINT_SIMILARITY.benchmark
    conda:
        "../../environment.yml"
    threads: JOINT_SIMILARITY.threads
    resources:
        mem_mb=JOINT_SIMILARITY.resource.mem_mb,
        gpu=JOINT_SIMILARITY.resource.gpu,
        runtime=JOINT_SIMILARITY.resource.runtime,
    params:
        settings=JOINT_SIMILARITY.settings,
    script:
        "../scripts/stage.py"


SIMILARITY = declared("similarity")


rule similarity:
    """Score every patch of a shard's frames against each caption of its clip: patch-text similarity maps."""
    input:
        unpack(SIMILARITY.inputs),  # frames, captions, model; tar and embeddings if kept, or maps of all sources
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
