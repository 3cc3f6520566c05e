# Stage 8: evaluation of every run, and how well the masks hit what they should.


EVALUATE = declared("evaluate")


rule evaluate:
    """One evaluation of one run's weights."""
    input:
        unpack(EVALUATE.inputs),  # train, validation, test, weights, text_model
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
    params:
        settings=EVALUATE.settings,
    script:
        "../scripts/stage.py"


MASK_QUALITY = declared("mask_quality")


rule mask_quality:
    """How well masks cover the named object's true box."""
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
    """How well masks from cached maps agree with masks from maps of the crop itself."""
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
    params:
        settings=CROP_AGREEMENT.settings,
    script:
        "../scripts/stage.py"
