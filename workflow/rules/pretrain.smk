# Stage 7: pretraining. Checkpoints are stored next to the outputs and survive a killed job; the next attempt resumes from them.
# Retries are set in the profile: those of a rule also apply inside a cluster job, so that both would multiply.


PRETRAIN = declared("pretrain")


rule pretrain:
    """Pretrain one run: write its weights, resolved config and log of metrics."""
    input:
        unpack(PRETRAIN.inputs),  # shards, images, init, release, teacher, masks
    output:
        weights=PRETRAIN.output.weights,  # pretrain/{run}/weights.safetensors
        config=PRETRAIN.output.config,  # pretrain/{run}/config.json
    log:
        PRETRAIN.log,
    benchmark:
        PRETRAIN.benchmark
    conda:
        "../../environment.yml"
    threads: PRETRAIN.threads
    resources:
        mem_mb=PRETRAIN.resource.mem_mb,
        gpu=PRETRAIN.resource.gpu,
        runtime=PRETRAIN.resource.runtime,
        mpi=PRETRAIN.resource.mpi,
        nodes=PRETRAIN.resource.nodes,
        tasks=PRETRAIN.resource.tasks,
        tasks_per_gpu=PRETRAIN.resource.tasks_per_gpu,
        gres=PRETRAIN.resource.gres,
    params:
        settings=PRETRAIN.settings,
    script:
        "../scripts/stage.py"
