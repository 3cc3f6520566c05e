# Stage 0: the generated dataset where the config asks for it, and the table of clips.


GENERATE = declared("generate")


rule generate:
    """The clips of moving-shapes: H.264 files, their annotations, and the true box of every object."""
    output:
        annotations=GENERATE.output.annotations,  # generated/annotations.parquet
        truth=GENERATE.output.truth,  # generated/truth.parquet
    log:
        GENERATE.log,
    benchmark:
        GENERATE.benchmark
    conda:
        "../../environment.yml"
    threads: GENERATE.threads
    params:
        settings=GENERATE.settings,
    script:
        "../scripts/stage.py"


MANIFEST = declared("manifest")


rule manifest:
    """The table of clips, and what was refused and why."""
    input:
        unpack(MANIFEST.inputs),  # annotations
    output:
        manifest=MANIFEST.output.manifest,  # manifest.parquet
        quarantine=MANIFEST.output.quarantine,  # quarantine.parquet
    log:
        MANIFEST.log,
    benchmark:
        MANIFEST.benchmark
    conda:
        "../../environment.yml"
    threads: MANIFEST.threads
    params:
        settings=MANIFEST.settings,
    script:
        "../scripts/stage.py"
