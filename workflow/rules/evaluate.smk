# Stage 8: evaluation of every run, and how well the masks hit what they should.


rule evaluate:
    input:
        unpack(task_splits),
        weights=rules.pretrain.output.weights,
    output:
        metrics=f"{ROOT}/evaluate/{{run}}/{{task}}/metrics.json",
    log:
        f"{ROOT}/logs/evaluate/{{run}}/{{task}}.log",
    benchmark:
        f"{ROOT}/benchmarks/evaluate/{{run}}/{{task}}.tsv"
    conda:
        "../../environment.yml"
    threads: share_of_cores(len(CONFIG.evaluations()))
    resources:
        mem_mb=each_attempt(32000),
        gpu=1,
        runtime=1440,
    params:
        run=lambda wildcards: dump(CONFIG.runs[wildcards.run]),
        task=lambda wildcards: dump(CONFIG.evaluate[wildcards.task]),
        seed=CONFIG.seed,
    script:
        "../scripts/evaluate.py"


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
        settings=stage("mask_quality"),
        sources=lambda wildcards: list(CORPORA[wildcards.dataset].captions),
    script:
        "../scripts/mask_quality.py"


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
        settings=stage("mask_quality"),
        similarity=stage("similarity"),
        seed=CONFIG.seed,
    script:
        "../scripts/faithfulness.py"
