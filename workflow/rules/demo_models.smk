# The demo's small CLIP and BLIP-2, trained anew. The repository ships a copy of the results in stm/assets.


rule demo_models:
    output:
        clip=directory("results/demo-models/demo-clip"),
        blip2=directory("results/demo-models/demo-blip2"),
        bert=directory("results/demo-models/demo-bert"),
        card="results/demo-models/README.md",
    log:
        "results/demo-models/train.log",
    benchmark:
        "results/demo-models/benchmark.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    params:
        seed=CONFIG.seed,
    script:
        "../scripts/demo_models.py"
