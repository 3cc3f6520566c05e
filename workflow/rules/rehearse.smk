# The rehearsal: every rule, run, evaluation, table and figure of the config, with small models and a few clips, in a folder of its
# own.


REHEARSE = declared("rehearse")


rule rehearse:
    """Run the whole workflow of the config at small size, to see that everything fits together."""
    output:
        record=REHEARSE.output.record,  # rehearsal/rehearsal.json
    log:
        REHEARSE.log,
    conda:
        "../../environment.yml"
    threads: REHEARSE.threads
    params:
        settings=REHEARSE.settings,
    script:
        "../scripts/stage.py"
