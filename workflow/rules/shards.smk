# Stage 6: WebDataset shards with an index.


rule shards:
    input:
        unpack(shard_inputs),
    output:
        tar=f"{ROOT}/shards/{{split}}/{{shard}}.tar",
        index=f"{ROOT}/shards/{{split}}/{{shard}}.parquet",
    log:
        f"{ROOT}/logs/shards/{{split}}/{{shard}}.log",
    benchmark:
        f"{ROOT}/benchmarks/shards/{{split}}/{{shard}}.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=each_attempt(4000),
        runtime=120,
    params:
        pack=stage("pack"),
        grid=stage("grid"),
        bad_input=stage("bad_input"),
    script:
        "../scripts/shards.py"
