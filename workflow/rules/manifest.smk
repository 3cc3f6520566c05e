# Stage 0: the manifest, which lists all clips; before it the moving-shapes dataset, where the config uses it.


GENERATE = declared("generate")


rule generate:
    """Generate the clips of moving-shapes: H.264 files, annotations, and the true box of every object."""
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
    """List the clips of a dataset in the manifest, and the rejected clips with reasons in the quarantine."""
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
    resources:
        mem_mb=MANIFEST.resource.mem_mb,
        runtime=MANIFEST.resource.runtime,
    params:
        settings=MANIFEST.settings,
    script:
        "../scripts/stage.py"
