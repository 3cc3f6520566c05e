# Stage 7: pretraining. Checkpoints lie beside the outputs and survive a killed job; the retry resumes from them.


rule pretrain:
    input:
        shards=lambda wildcards: packed(
            wildcards.dataset, CONFIG.runs[wildcards.run].split
        ),
        init=lambda wildcards: local_model_files(CONFIG.runs[wildcards.run].init),
    output:
        weights=f"{ROOT}/pretrain/{{run}}/weights.safetensors",
        config=f"{ROOT}/pretrain/{{run}}/config.json",
    log:
        f"{ROOT}/logs/pretrain/{{run}}.log",
    benchmark:
        f"{ROOT}/benchmarks/pretrain/{{run}}.tsv"
    retries: 2
    conda:
        "../../environment.yml"
    threads: share_of_cores(len(CONFIG.runs))
    resources:
        mem_mb=32000,
        runtime=2880,
    params:
        run=lambda wildcards: dump(CONFIG.runs[wildcards.run]),
        seed=CONFIG.seed,
    script:
        "../scripts/pretrain.py"
