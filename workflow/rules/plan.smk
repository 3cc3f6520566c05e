# What the run will cost, before it runs.


rule plan:
    input:
        [f for name in CORPORA for f in annotation_files(name)],
    output:
        plan=f"{SHOWN}/plan.json",
    log:
        f"{SHOWN}/logs/plan.log",
    priority: 100
    conda:
        "../../environment.yml"
    params:
        config=dump(CONFIG),
        listing=lambda wildcards: [listing(name) for name in CORPORA],
    script:
        "../scripts/plan.py"
