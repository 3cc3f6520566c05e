# Stage 4: patch-text similarity, one map a caption and frame. Embeddings are their own file where they are kept.


rule embeddings:
    input:
        tar=rules.frames.output.tar,
        frames=rules.frames.output.index,
        model=similarity_model,
    output:
        embeddings=f"{ROOT}/embeddings/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/embeddings/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/embeddings/{{shard}}.tsv"
    cache: SHARED
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=each_attempt(16000),
        gpu=1,
        runtime=480,
    params:
        settings=stage("similarity"),
        grid=stage("grid"),
        software=software,
    script:
        "../scripts/embeddings.py"


rule similarity:
    input:
        unpack(similarity_inputs),
    output:
        similarity=f"{ROOT}/similarity/{{source}}/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/similarity/{{source}}/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/similarity/{{source}}/{{shard}}.tsv"
    cache: SHARED
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=each_attempt(16000),
        gpu=1,
        runtime=480,
    params:
        settings=stage("similarity"),
        grid=stage("grid"),
        bad_input=stage("bad_input"),
        software=software,
    script:
        "../scripts/similarity.py"
