# Stage 8: evaluation of the pretrained runs, and of the masks.


EVALUATE = declared("evaluate")


rule evaluate:
    """Evaluate the weights of one run on one task."""
    input:
        unpack(EVALUATE.inputs),  # train, validation, test, weights, files, text_model
    output:
        metrics=EVALUATE.output.metrics,  # evaluate/{run}/{task}/metrics.json
    log:
        EVALUATE.log,
    benchmark:
        EVALUATE.benchmark
    conda:
        "../../environment.yml"
    threads: EVALUATE.threads
    resources:
        mem_mb=EVALUATE.resource.mem_mb,
        gpu=EVALUATE.resource.gpu,
        runtime=EVALUATE.resource.runtime,
        mpi=EVALUATE.resource.mpi,
        nodes=EVALUATE.resource.nodes,
        tasks=EVALUATE.resource.tasks,
        tasks_per_gpu=EVALUATE.resource.tasks_per_gpu,
        gres=EVALUATE.resource.gres,
    params:
        settings=EVALUATE.settings,
    script:
        "../scripts/stage.py"


MASK_QUALITY = declared("mask_quality")


rule mask_quality:
    """Measure how well masks cover the true box of the named object."""
    input:
        unpack(MASK_QUALITY.inputs),  # frames, similarity, motion, truth
    output:
        quality=MASK_QUALITY.output.quality,  # evaluate/mask_quality.json
    log:
        MASK_QUALITY.log,
    benchmark:
        MASK_QUALITY.benchmark
    conda:
        "../../environment.yml"
    params:
        settings=MASK_QUALITY.settings,
    script:
        "../scripts/stage.py"


CROP_AGREEMENT = declared("crop_agreement")


rule crop_agreement:
    """Measure how well masks from cached maps agree with masks from maps recomputed on the crop."""
    input:
        unpack(CROP_AGREEMENT.inputs),  # tars, frames, similarity
    output:
        agreement=CROP_AGREEMENT.output.agreement,  # evaluate/crop_agreement.json
    log:
        CROP_AGREEMENT.log,
    benchmark:
        CROP_AGREEMENT.benchmark
    conda:
        "../../environment.yml"
    resources:
        mem_mb=CROP_AGREEMENT.resource.mem_mb,
        runtime=CROP_AGREEMENT.resource.runtime,
        gpu=CROP_AGREEMENT.resource.gpu,
    params:
        settings=CROP_AGREEMENT.settings,
    script:
        "../scripts/stage.py"
