# Stage 3: captions, per caption source.


CAPTIONS = declared("captions")


rule captions:
    """Collect or generate the captions of a shard's clips, for one caption source."""
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
