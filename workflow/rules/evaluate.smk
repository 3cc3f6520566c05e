# Stage 8: evaluation of every run, and how well the masks hit what they should.


rule evaluate:
    input:
        unpack(task_splits),
        weights=rules.pretrain.output.weights,
    output:
        metrics=f"{ROOT}/evaluate/{{run}}/{{task}}/metrics.json",
        predictions=f"{ROOT}/evaluate/{{run}}/{{task}}/predictions.parquet",
    log:
        f"{ROOT}/logs/evaluate/{{run}}/{{task}}.log",
    benchmark:
        f"{ROOT}/benchmarks/evaluate/{{run}}/{{task}}.tsv"
    retries: 2
    conda:
        "../../environment.yml"
    threads: share_of_cores(len(CONFIG.pretrain) * len(CONFIG.evaluate))
    resources:
        mem_mb=32000,
        runtime=1440,
    params:
        run=lambda wildcards: dump(CONFIG.pretrain[wildcards.run]),
        task=lambda wildcards: dump(CONFIG.evaluate[wildcards.task]),
        seed=CONFIG.seed,
    script:
        "../scripts/evaluate.py"


if CONFIG.mask_quality is not None:

    rule mask_quality:
        input:
            unpack(mask_quality_inputs),
        output:
            quality=f"{ROOT}/evaluate/mask_quality.json",
        log:
            f"{ROOT}/logs/evaluate/mask_quality.log",
        benchmark:
            f"{ROOT}/benchmarks/mask_quality/all.tsv"
        conda:
            "../../environment.yml"
        params:
            settings=dump(CONFIG.mask_quality),
            sources=list(CONFIG.captions),
        script:
            "../scripts/mask_quality.py"

    if CONFIG.pack.captions is not None:

        rule faithfulness:
            input:
                unpack(faithfulness_inputs),
            output:
                faithfulness=f"{ROOT}/evaluate/faithfulness.json",
            log:
                f"{ROOT}/logs/evaluate/faithfulness.log",
            benchmark:
                f"{ROOT}/benchmarks/faithfulness/all.tsv"
            conda:
                "../../environment.yml"
            params:
                settings=dump(CONFIG.mask_quality),
                similarity=dump(CONFIG.similarity),
                seed=CONFIG.seed,
            script:
                "../scripts/faithfulness.py"
