# Stage 0: the generated dataset where the config asks for it, and the table of clips.


rule generate:
    output:
        annotations=f"{ROOT}/generated/annotations.parquet",
        truth=f"{ROOT}/generated/truth.parquet",
    log:
        f"{ROOT}/logs/generate.log",
    benchmark:
        f"{ROOT}/benchmarks/generate/all.tsv"
    conda:
        "../../environment.yml"
    threads: 16
    params:
        dataset=stage("dataset"),
        seed=CONFIG.seed,
    script:
        "../scripts/generate.py"


rule manifest:
    input:
        lambda wildcards: manifest_inputs(wildcards.dataset),
    output:
        manifest=f"{ROOT}/manifest.parquet",
        quarantine=f"{ROOT}/quarantine.parquet",
    log:
        f"{ROOT}/logs/manifest.log",
    benchmark:
        f"{ROOT}/benchmarks/manifest/all.tsv"
    conda:
        "../../environment.yml"
    threads: 16
    params:
        dataset=stage("dataset"),
        bad_input=stage("bad_input"),
        min_side=stage("frames", "min_side"),
        max_side=stage("frames", "max_side"),
        listing=lambda wildcards: listing(wildcards.dataset),
    script:
        "../scripts/manifest.py"
