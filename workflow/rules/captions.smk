# Stage 3: captions, by source.


CAPTIONS = declared("captions")


rule captions:
    """Captions of a shard's clips, by one source."""
    input:
        unpack(CAPTIONS.inputs),  # slice, tar, frames, model
    output:
        captions=CAPTIONS.output.captions,  # captions/{source}/{shard}.parquet
    log:
        CAPTIONS.log,
    benchmark:
        CAPTIONS.benchmark
    cache: CAPTIONS.shared
    conda:
        "../../environment.yml"
    threads: CAPTIONS.threads
    resources:
        mem_mb=CAPTIONS.resource.mem_mb,
        gpu=CAPTIONS.resource.gpu,
        runtime=CAPTIONS.resource.runtime,
    params:
        settings=CAPTIONS.settings,
        made_with=CAPTIONS.made_with,
    script:
        "../scripts/stage.py"
