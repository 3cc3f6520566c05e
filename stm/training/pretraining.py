"""Pretraining: from shards and a run's config to weights."""

from collections.abc import Sequence
from pathlib import Path

import torch

from stm.config import LanguageRun, PretrainRun
from stm.distributed.process import join_processes
from stm.methods import build_method
from stm.methods.mae import MAE
from stm.methods.video_text import EXTRA
from stm.models.weights import zoo
from stm.training.feeding import count_steps, feed, hash_shards, read_text_model
from stm.training.initialise import start_from
from stm.training.language import pretrain_language
from stm.training.loop import Plan, fit
from stm.training.runs import introduce, make_plan, no_batches, open_clips, write_record


def pretrain(
    run: PretrainRun | LanguageRun,
    shard_indexes: Sequence[Path],
    output: Path,
    seed: int,
    device: str | None = None,
    image_indexes: Sequence[Path] = (),
) -> None:
    """Pretrains a model and writes its weights; goes on from the newest checkpoint of an attempt that was
    stopped.

    Under torchrun, each process calls this. On a CPU the weights are a function of the arguments, byte for
    byte: neither the number of loading processes nor a kill changes them.

    Args:
        run: the settings. Its own seed goes before `seed`; no epochs save the initial weights.
        shard_indexes: `shards/{split}/{shard}.parquet` of the training split; each tar lies beside its index.
        output: folder; gets `weights.safetensors`, `config.json` (the run and the receipt), `metrics.jsonl`
            (a line every ten steps), `tensorboard/`, and, until the weights are there, `checkpoints/`.
        device: `cuda`, `cpu`; CUDA when there is one, by default.
        image_indexes: likewise of the image datasets of a run with `images`.

    Raises:
        ValueError: the data does not fit the settings; the message says which.
        stm.training.interruption.Interrupted: after SIGTERM or SIGUSR1. The state is saved, the exit code is
        not 0.
    """
    seed = seed if run.seed is None else run.seed
    if isinstance(run, LanguageRun):
        with join_processes(run.world_size, device) as process:
            pretrain_language(run, shard_indexes, image_indexes, output, seed, process)
        return
    with join_processes(run.world_size, device) as process:
        dataset = open_clips(run, shard_indexes, seed)
        torch.manual_seed(seed)
        method = build_method(run, dataset.text_width)
        assert isinstance(method, MAE)
        if method.contrast is not None:
            method.contrast.text_model = read_text_model(shard_indexes)
        start = start_from(method.model, run.init) if run.init else None
        teacher = getattr(method.teacher, "identity", None)
        method.to(process.device)
        steps_per_epoch = count_steps(dataset, run.optimisation) if run.optimisation.epochs else 0
        data = hash_shards(shard_indexes)
        plan = make_plan(run, steps_per_epoch, seed, data, start, teacher, output)
        introduce(plan, f"{len(dataset)} clips", zoo.count_parameters(method), process)
        batches = feed(dataset, run.optimisation, process, seed, run.workers) if plan.steps else no_batches
        checkpoints = fit(method, batches, plan, output, process)
        if process.first:
            _write(method, run, plan, output)
            checkpoints.discard()
        process.wait()


def _write(method: MAE, run: PretrainRun, plan: Plan, output: Path) -> None:
    branch = method.contrast
    zoo.save(
        method.model,
        output / "weights.safetensors",
        extra={EXTRA: branch.state_dict()} if branch is not None else None,
        header={EXTRA: branch.describe()} if branch is not None else None,
    )
    write_record(run, plan, output)
