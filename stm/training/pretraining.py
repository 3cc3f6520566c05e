"""Pretraining: from shards and a run's config to weights."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import stm
from stm.config import PretrainRun
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.files import make_receipt, write_json
from stm.methods import build_method, dataset_needs
from stm.methods.mae import MAE
from stm.methods.video_text import EXTRA
from stm.models import zoo
from stm.training.distributed import Process, join_processes
from stm.training.feeding import count_steps, feed, hash_shards, read_text_model
from stm.training.logs import say
from stm.training.loop import Plan, fit
from stm.training.start import Start, start_from

# Settings that do not decide what comes out of a run; its seed is told apart from them.
_INDIFFERENT = {*PretrainRun.indifferent, "seed"}


def pretrain(
    run: PretrainRun, shard_indexes: Sequence[Path], output: Path, seed: int, device: str | None = None
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

    Raises:
        ValueError: the data does not fit the settings; the message says which.
        stm.training.interruption.Interrupted: after SIGTERM or SIGUSR1. The state is saved, the exit code is
        not 0.
    """
    seed = seed if run.seed is None else run.seed
    with join_processes(run.processes, device) as process:
        dataset = _open(run, shard_indexes, seed)
        torch.manual_seed(seed)
        method = build_method(run, dataset.text_width)
        if method.contrast is not None:
            method.contrast.text_model = read_text_model(shard_indexes)
        start = start_from(method.model, run.init) if run.init else None
        teacher = getattr(method.teacher, "identity", None)
        method.to(process.device)
        steps_per_epoch = count_steps(dataset, run.optimisation) if run.optimisation.epochs else 0
        data = hash_shards(shard_indexes)
        plan = _make_plan(run, steps_per_epoch, seed, data, start, teacher, output)
        _introduce(plan, dataset, zoo.count_parameters(method), process)
        batches = feed(dataset, run.optimisation, process, seed, run.workers) if plan.steps else _nothing
        checkpoints = fit(method, batches, plan, output, process)
        if process.first:
            _write(method, run, plan, output)
            checkpoints.discard()
        process.wait()


def _open(run: PretrainRun, shard_indexes: Sequence[Path], seed: int) -> ClipDataset:
    needs = dataset_needs(run)
    return ClipDataset(
        shard_indexes,
        Geometry.of(run),
        run.augmentation,
        seed,
        True,
        repeats=run.repeats,
        guides=needs.guides,
        text=needs.text,
        captions=run.captions,
        kept_gigabytes=run.kept_gigabytes,
    )


def _make_plan(
    run: PretrainRun,
    steps_per_epoch: int,
    seed: int,
    data: dict[str, str],
    start: Start | None,
    teacher: dict[str, str] | None,
    output: Path,
) -> Plan:
    settings = run.model_dump(mode="json", exclude=_INDIFFERENT)
    origin = {"run": settings, "seed": seed, "data": data, "stm": stm.__version__}
    return Plan(
        name=f"pretrain {output.name}",
        optimisation=run.optimisation,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        origin=origin | ({"init": asdict(start)} if start else {}) | ({"teacher": teacher} if teacher else {}),
        precision=run.precision,
        compile=run.compile,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
    )


def _nothing(step: int) -> Any:
    return iter(())


def _introduce(plan: Plan, dataset: ClipDataset, parameters: int, process: Process) -> None:
    if process.first:
        say(
            f"{plan.name}: {parameters / 1e6:.1f} million parameters, {len(dataset)} clips, "
            f"{plan.optimisation.epochs} epochs of {plan.steps_per_epoch} steps, {process.count} x {process.device}"
        )


def _write(method: MAE, run: PretrainRun, plan: Plan, output: Path) -> None:
    receipt = make_receipt(
        "pretrain",
        run.model_dump(mode="json", exclude=_INDIFFERENT),
        ("torch", "timm", "numpy", "opencv-python-headless", "simplejpeg"),
        seed=plan.seed,
        step=plan.steps,
        **{name: plan.origin[name] for name in ("data", "init", "teacher") if name in plan.origin},
    )
    branch = method.contrast
    zoo.save(
        method.model,
        output / "weights.safetensors",
        extra={EXTRA: branch.state_dict()} if branch is not None else None,
        header={EXTRA: branch.describe()} if branch is not None else None,
    )
    write_json(output / "config.json", {"run": run.model_dump(mode="json"), "receipt": receipt})
