# What the run will cost, before it runs.


PLAN = declared("plan")


rule plan:
    """What the run will cost, before it runs."""
    input:
        unpack(PLAN.inputs),  # the annotation files of folders of videos
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
