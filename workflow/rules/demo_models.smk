# Retraining of the demo's small models, of which the repository ships a copy in stm/assets.


DEMO_MODELS = declared("demo_models")


rule demo_models:
    """Retrain the demo's small CLIP, BLIP-2 and temporal transformer, and write its BERT."""
    output:
        clip=directory(DEMO_MODELS.output.clip),  # results/demo-models/demo-clip
        blip2=directory(DEMO_MODELS.output.blip2),  # results/demo-models/demo-blip2
        bert=directory(DEMO_MODELS.output.bert),  # results/demo-models/demo-bert
        fusion=directory(DEMO_MODELS.output.fusion),  # results/demo-models/demo-fusion
        card=DEMO_MODELS.output.card,  # results/demo-models/README.md
    log:
        "results/demo-models/train.log",
    benchmark:
        "results/demo-models/benchmark.tsv"
    conda:
        "../../environment.yml"
    params:
        settings=DEMO_MODELS.settings,
    script:
        "../scripts/stage.py"
