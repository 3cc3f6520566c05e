# The plan: an estimate of what the run will cost, made before it runs.


PLAN = declared("plan")


rule plan:
    """Estimate what the run will cost, before it runs."""
    input:
        unpack(PLAN.inputs),  # annotation files of datasets in folders
    output:
        plan=PLAN.output.plan,  # plan.json
    log:
        PLAN.log,
    priority: 100
    conda:
        "../../environment.yml"
    params:
        settings=PLAN.settings,
    script:
        "../scripts/stage.py"
