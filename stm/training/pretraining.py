"""Pretraining: from shards and a run's config to weights, for all methods."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import stm
from stm.config import AnyRun, Run
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import Batch
from stm.distributed.process import Process, join_processes
from stm.masking import start_checks, strategy_digests
from stm.methods import Method, build_method, dataset_needs
from stm.models.weights import zoo
from stm.storage.files import write_json
from stm.storage.receipts import make_receipt
from stm.training.batches import Medium, count_media_steps, feed_media, hash_shards, read_text_model
from stm.training.initialise import Start, start_from
from stm.training.loop import TrainingPlan, fit
from stm.training.trackers import TENSORBOARD

_log = logging.getLogger(__name__)

# Settings that do not affect the result. The seed is recorded separately, because a run without one uses the study's.
_CACHE_NEUTRAL = {*Run.cache_neutral, "seed"}

# How the work is divided affects the result only through rounding and each process's noise. A run may be resumed with a
# different division, because a cluster does not always allocate the same nodes.
_DIVISION = {"processes", "nodes", "parallel"}

# Libraries whose versions can change the result; the receipt records them.
_LIBRARIES = ("torch", "timm", "numpy", "opencv-python-headless", "simplejpeg")


def pretrain(
    run: AnyRun,
    shard_indexes: Sequence[Path],
    output: Path,
    seed: int,
    device: str | None = None,
    image_indexes: Sequence[Path] = (),
    trackers: Sequence[str] = TENSORBOARD,
) -> None:
    """Pretrains a model and writes its weights; resumes from the newest checkpoint if an earlier attempt was stopped.

    Under torchrun, each process calls this. On a CPU the weights are a function of the arguments, byte for
    byte: they depend neither on the number of loading processes nor on interruptions.

    Args:
        run: the settings. Its own seed overrides `seed`; with 0 epochs the initial weights are saved.
        shard_indexes: `shards/{split}/{shard}.parquet` of the training split; each tar is next to its index.
        output: folder for `weights.safetensors`, `config.json` (the run and the receipt), `metrics.jsonl`
            (a line every ten steps), what belongs to the trackers, and, until the weights are written, `checkpoints/`.
        device: `cuda` or `cpu`; by default CUDA if available.
        image_indexes: the shard indexes of the image datasets, for a run with `images`.
        trackers: as in the config.

    Raises:
        ValueError: the data does not match the settings, or a model cannot be loaded; the message names the cause.
        stm.training.interruption.Interrupted: after SIGTERM or SIGUSR1. The state is saved, the exit code is
        not 0.
    """
    seed = seed if run.seed is None else run.seed
    indexes = [*shard_indexes, *image_indexes]
    # One process may train several runs, and the masks of each are checked.
    start_checks()
    with join_processes(run.world_size, device) as process:
        media = open_media(run, shard_indexes, image_indexes, seed)
        torch.manual_seed(seed)  # fresh weights depend on the seed alone
        method = build_method(run, media[0].dataset.text_width)
        if run.text_vectors_for is not None:
            method.accept_text_model(read_text_model(indexes))
        start = start_from(method.student, run.init) if run.init else None
        method.to(process.device)
        steps = count_media_steps(media) if run.optimisation.epochs else 0
        plan = make_plan(run, steps, seed, hash_shards(indexes), start, method.teacher_identity, output)
        plan = replace(plan, trackers=trackers)
        introduce(plan, media, method, process)
        batches = make_batches(run, media, method, seed, process) if plan.steps else no_batches
        checkpoints = fit(method, batches, plan, output, process)
        if process.first:
            write_weights(method, output / "weights.safetensors")
            write_record(run, plan, output, checkpoints.resumed())
            checkpoints.discard()
        process.wait()


def open_media(run: AnyRun, video_indexes: Sequence[Path], image_indexes: Sequence[Path], seed: int) -> list[Medium]:
    """The run's clips and, if it uses them, images.

    Raises:
        ValueError: a shard cannot be used, or clips lack captions or the vectors that the method needs.
    """
    indexes = {"clips": video_indexes, "images": image_indexes}
    return [Medium(m.name, open_clips(run, indexes[m.name], seed, m.frames), m.batch_size, m.key) for m in run.media]


def open_clips(run: AnyRun, indexes: Sequence[Path], seed: int, frames: int | None = None) -> ClipDataset:
    """The clips that a run trains on, with the guides and text vectors that its method needs.

    Args:
        indexes: shard indexes.
        frames: frames per sample; the run's by default, 1 for images.

    Raises:
        ValueError: a shard cannot be used, or clips lack the guides or text vectors.
    """
    needs, shape = dataset_needs(run), Geometry.of(run)
    dataset = ClipDataset(
        indexes,
        shape if frames is None else replace(shape, frames=frames),
        run.augmentation,
        seed,
        True,
        repeats=run.repeats,
        guides=needs.guides,
        text=needs.text,
        captions=run.captions,
        kept_gigabytes=run.kept_gigabytes,
        resize=run.resize_on == "loader",
        decode=run.decode_on == "loader",
    )
    if run.has_text:
        check_has_captions(dataset, run.captions.sources)
    return dataset


def check_has_captions(dataset: ClipDataset, sources: Sequence[str] | None) -> None:
    """Checks that every clip has a caption to train on.

    Raises:
        ValueError: some have none; the message states how many and suggests a remedy.
    """
    missing = int((dataset.index.count_captions(sources) == 0).sum())
    if missing:
        raise ValueError(
            f"{missing} of {len(dataset)} clips have no caption to train on; set bad_input.policy.caption_missing to drop "
            "and run the stage `shards` again, or choose other captions.sources"
        )


def make_batches(
    run: AnyRun, media: Sequence[Medium], method: Method, seed: int, process: Process
) -> Callable[[int], Iterator[Batch]]:
    """Batches for `fit`, including the entries that the method adds."""
    batches = feed_media(media, run.optimisation, process, seed, run.workers)
    return lambda step: map(method.prepare, batches(step))


def no_batches(step: int) -> Iterator[Batch]:
    """The batches of a run without epochs."""
    return iter(())


def make_plan(
    run: Run,
    steps_per_epoch: int,
    seed: int,
    data: Mapping[str, Any],
    start: Start | None,
    teacher: Mapping[str, Any] | None,
    output: Path,
) -> TrainingPlan:
    """The settings of a run's training loop.

    Args:
        data: SHA-256 of the run's shards.
        start: the run's initial weights, if they come from an existing model.
        teacher: the identity of the run's teacher, if it has one.
    """
    # Everything that the result depends on: a checkpoint with a different origin is not resumed.
    origin: dict[str, Any] = {
        "run": run.model_dump(mode="json", exclude=_CACHE_NEUTRAL | _DIVISION),
        "seed": seed,
        "data": data,
        "stm": stm.__version__,
    }
    if start:
        origin["init"] = asdict(start)
    if teacher:
        origin["teacher"] = teacher
    if masks := strategy_digests(mask.strategy for mask in run.masks):
        origin["masks"] = masks
    return TrainingPlan(
        name=f"pretrain {output.name}",
        optimisation=run.optimisation,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        origin=origin,
        precision=run.precision,
        compile=run.compile,
        parallel=run.parallel,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
    )


def introduce(plan: TrainingPlan, media: Sequence[Medium], method: Method, process: Process) -> None:
    """Logs the size of the model, the data and the run."""
    if process.first:
        clips = " and ".join(f"{len(medium.dataset)} {medium.name}" for medium in media)
        _log.info(
            f"{plan.name}: {zoo.count_parameters(method) / 1e6:.1f} million parameters, {clips}, "
            f"{plan.optimisation.epochs} epochs of {plan.steps_per_epoch} steps, {process.count} x {process.device}"
        )


def write_weights(method: Method, path: Path) -> None:
    """Writes the student's weights, and those of the method's other parts that are saved with it."""
    parts = method.parts()
    zoo.save(
        method.student,
        path,
        extra={name: part.state for name, part in parts.items()},
        header={name: part.about for name, part in parts.items()},
    )


def write_record(run: Run, plan: TrainingPlan, output: Path, resumed: Mapping[str, Any]) -> None:
    """Writes `config.json`: the run and the receipt, to which `resumed` adds the versions of earlier steps, if they differ."""
    receipt = make_receipt(
        "pretrain",
        run.model_dump(mode="json", exclude=_CACHE_NEUTRAL),
        _LIBRARIES,
        seed=plan.seed,
        step=plan.steps,
        **{name: value for name, value in plan.origin.items() if name not in ("run", "seed", "stm")},
        **resumed,
    )
    write_json(output / "config.json", {"run": run.model_dump(mode="json"), "receipt": receipt})
