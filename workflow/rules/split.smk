# Stage 1: clips are dealt to shards. A checkpoint, because only it knows how many there are.


checkpoint split:
    input:
        manifest=rules.manifest.output.manifest,
    output:
        index=f"{ROOT}/slices.json",
    log:
        f"{ROOT}/logs/split.log",
    conda:
        "../../environment.yml"
    params:
        slices=lambda wildcards, output: output.index.removesuffix(".json"),
        shard_size=stage("shard_size"),
    script:
        "../scripts/split.py"
