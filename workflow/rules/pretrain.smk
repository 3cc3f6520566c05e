# Stage 7: pretraining. Checkpoints lie beside the outputs and survive a killed job; the next attempt resumes from them.
# How often a job is tried again is the profile's: `retries` of a rule count inside a cluster's job too, and would multiply.


rule pretrain:
    input:
        unpack(pretrain_models),
        shards=lambda wildcards: joined(
            wildcards.dataset, CONFIG.runs[wildcards.run].video_sources
        ),
        images=lambda wildcards: joined(
            wildcards.dataset, CONFIG.runs[wildcards.run].image_sources
        ),
    output:
        weights=f"{ROOT}/pretrain/{{run}}/weights.safetensors",
        config=f"{ROOT}/pretrain/{{run}}/config.json",
    log:
        f"{ROOT}/logs/pretrain/{{run}}.log",
    benchmark:
        f"{ROOT}/benchmarks/pretrain/{{run}}.tsv"
    conda:
        "../../environment.yml"
    threads: lambda wildcards: max(share_of_cores(len(CONFIG.runs)), processes_of(wildcards))
    # Threads and memory are those of one node. On several, the Slurm executor leaves the script on the first of them
    # (`mpi`), which starts one task on each by srun; one task a GPU, which it would ask for, is not wanted.
    resources:
        mem_mb=lambda wildcards, attempt: (
            16000 * (1 + processes_of(wildcards)) * attempt
        ),
        gpu=gpus_of,
        runtime=2880,
        mpi=on_nodes(lambda run: "srun"),
        nodes=on_nodes(lambda run: run.nodes),
        tasks=on_nodes(lambda run: run.nodes),
        tasks_per_gpu=on_nodes(lambda run: 0),
        gres=on_nodes(lambda run: f"gpu:{run.processes}"),
    params:
        run=lambda wildcards: dump(CONFIG.runs[wildcards.run]),
        seed=CONFIG.seed,
    script:
        "../scripts/pretrain.py"
