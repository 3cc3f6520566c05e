# Stage 0: the generated dataset where the config asks for it, and the table of clips.

if GENERATED:

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
            dataset=dump(CONFIG.dataset),
            seed=CONFIG.seed,
        script:
            "../scripts/generate.py"


rule manifest:
    input:
        rules.generate.output.annotations if GENERATED else annotations(),
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
        dataset=dump(CONFIG.dataset),
        bad_input=dump(CONFIG.bad_input),
        min_side=CONFIG.frames.min_side,
        max_side=CONFIG.frames.max_side,
        listing=lambda wildcards: listing(),
    script:
        "../scripts/manifest.py"
