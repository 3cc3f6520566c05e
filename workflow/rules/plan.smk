# What the run will cost, before it runs.


rule plan:
    input:
        annotations(),
    output:
        plan=f"{ROOT}/plan.json",
    log:
        f"{ROOT}/logs/plan.log",
    priority: 100
    conda:
        "../../environment.yml"
    params:
        config=dump(CONFIG),
        listing=lambda wildcards: listing(),
    script:
        "../scripts/plan.py"
