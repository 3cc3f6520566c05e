"""Pretraining: from shards and a run's config to weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import stm
from stm.config import LanguageRun, PretrainRun, Run
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import Batch
from stm.distributed.process import Process, join_processes
from stm.masking import start_checks, strategy_digests
from stm.methods import build_method, dataset_needs
from stm.methods.contrast_head import EXTRA
from stm.methods.mae import MAE
from stm.models.weights import zoo
from stm.storage.files import write_json
from stm.storage.receipts import make_receipt
from stm.training.batches import Medium, count_media_steps, count_steps, feed, feed_media, hash_shards, read_text_model
from stm.training.initialise import Start, start_from
from stm.training.logs import say
from stm.training.loop import TrainingPlan, fit


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
    start_checks()
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


def _write(method: MAE, run: PretrainRun, plan: TrainingPlan, output: Path) -> None:
    branch = method.contrast
    zoo.save(
        method.model,
        output / "weights.safetensors",
        extra={EXTRA: branch.state_dict()} if branch is not None else None,
        header={EXTRA: branch.describe()} if branch is not None else None,
    )
    write_record(run, plan, output)


def pretrain_language(
    run: LanguageRun,
    video_indexes: Sequence[Path],
    image_indexes: Sequence[Path],
    output: Path,
    seed: int,
    process: Process,
) -> None:
    """Trains and writes the same files as a run without text; `weights.safetensors` also holds the text side.

    Raises:
        ValueError: the data does not fit the settings, or a model cannot be loaded; the message says which.
    """
    from stm.methods.language_runs import language_parts
    from stm.methods.video_language import VideoLanguage

    media = open_media(run, video_indexes, image_indexes, seed)
    torch.manual_seed(seed)
    method = build_method(run, media[0].dataset.text_width)
    assert isinstance(method, VideoLanguage)
    indexes = [*video_indexes, *image_indexes]
    if run.method == "clusterstm":
        check_text_model(method.teacher.identity, read_text_model(indexes), run)
    start = start_from(method.model.encoder, run.init) if run.init else None
    method.to(process.device)
    steps = count_media_steps(media) if run.optimisation.epochs else 0
    plan = make_plan(run, steps, seed, hash_shards(indexes), start, method.teacher.identity, output)
    clips = " and ".join(f"{len(medium.dataset)} {medium.name}" for medium in media)
    introduce(plan, clips, zoo.count_parameters(method), process)
    batches = feed_media(media, run.optimisation, process, seed, run.workers) if plan.steps else no_batches
    if run.language is not None:
        batches = with_tokens(batches, method.encode_captions)
    checkpoints = fit(method, batches, plan, output, process)
    if process.first:
        extra, header = language_parts(method)
        zoo.save(method.model.encoder, output / "weights.safetensors", extra=extra, header=header)
        write_record(run, plan, output)
        checkpoints.discard()
    process.wait()


def open_media(
    run: LanguageRun, video_indexes: Sequence[Path], image_indexes: Sequence[Path], seed: int
) -> list[Medium]:
    """The run's clips and, where it has them, images.

    Raises:
        ValueError: clips lack captions, or the vectors that the method needs.
    """
    media = [Medium("clips", _open(run, video_indexes, run.frames, seed), run.optimisation.batch_size)]
    if run.images is not None:
        images = _open(run, image_indexes, 1, seed)
        media.append(Medium("images", images, run.images.batch_size, "images.batch_size"))
    return media


def _open(run: LanguageRun, indexes: Sequence[Path], frames: int, seed: int) -> ClipDataset:
    dataset = open_clips(run, indexes, seed, frames)
    mute = int((dataset.index.count_captions(run.captions.sources) == 0).sum()) if run.language else 0
    if mute:
        raise ValueError(
            f"{mute} of {len(dataset)} clips have no caption to train on; set bad_input.policy.caption_missing to drop "
            "and run the stage `shards` again, or choose other captions.sources"
        )
    return dataset


def with_tokens(
    batches: Callable[[int], Iterator[Batch]], encode: Callable[[list[str]], torch.Tensor]
) -> Callable[[int], Iterator[Batch]]:
    """Batches with their captions as "tokens", int64 [B, X]."""

    def read(step: int) -> Iterator[Batch]:
        for batch in batches(step):
            yield {**batch, "tokens": encode(batch["caption"])}

    return read


def check_text_model(teacher: dict[str, str] | None, packed: dict[str, str] | None, run: LanguageRun) -> None:
    """Refuses captions' vectors of another model than the teacher: cosines between the two would mean nothing.

    Raises:
        ValueError: both say what they are, and differ.
    """
    if teacher is None or packed is None:
        return
    if teacher.get("weights_sha256") != packed.get("weights_sha256"):
        raise ValueError(
            f"the captions' vectors were made by {packed.get('model')}, and the teacher is {run.teacher.model}: relevance "
            "compares the two. Set text.model to the teacher and run the stages `text` and `shards` again"
        )


# Settings that do not decide what comes out of a run; its seed is told apart from them.
_CACHE_NEUTRAL = {*Run.cache_neutral, "seed"}

# How the work is divided changes the result by rounding and by each process's noise. A run may go on under another
# division: a cluster does not always give the same nodes.
_DIVISION = {"processes", "nodes", "parallel"}

_LIBRARIES = ("torch", "timm", "numpy", "opencv-python-headless", "simplejpeg")


def open_clips(
    run: PretrainRun | LanguageRun, indexes: Sequence[Path], seed: int, frames: int | None = None
) -> ClipDataset:
    """The clips that a run trains on, with what its method needs of them.

    Args:
        indexes: of the shards.
        frames: of a sample; the run's when not given, 1 for images.

    Raises:
        ValueError: a shard cannot be used, or clips lack what is needed.
    """
    needs, shape = dataset_needs(run), Geometry.of(run)
    return ClipDataset(
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
    )


def make_plan(
    run: Run,
    steps_per_epoch: int,
    seed: int,
    data: Mapping[str, Any],
    start: Start | None,
    teacher: Mapping[str, str] | None,
    output: Path,
    **more: Any,
) -> TrainingPlan:
    """The loop's plan of a run.

    Args:
        data: SHA-256 of its shards.
        start: weights that it starts from, if any.
        teacher: what identifies its teacher, if it has one.
        more: further things that decide what comes out.
    """
    origin = {
        "run": run.model_dump(mode="json", exclude=_CACHE_NEUTRAL | _DIVISION),
        "seed": seed,
        "data": data,
        "stm": stm.__version__,
    }
    optional = {
        "init": asdict(start) if start else None,
        "teacher": teacher,
        "masks": strategy_digests(mask.strategy for mask in run.masks),
    }
    return TrainingPlan(
        name=f"pretrain {output.name}",
        optimisation=run.optimisation,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        origin=origin | {name: value for name, value in optional.items() if value} | more,
        precision=run.precision,
        compile=run.compile,
        parallel=run.parallel,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
    )


def no_batches(step: int) -> Iterator[Batch]:
    """Those of a run without epochs."""
    return iter(())


def introduce(plan: TrainingPlan, clips: str, parameters: int, process: Process) -> None:
    """Says what is about to be trained."""
    if process.first:
        say(
            f"{plan.name}: {parameters / 1e6:.1f} million parameters, {clips}, "
            f"{plan.optimisation.epochs} epochs of {plan.steps_per_epoch} steps, {process.count} x {process.device}"
        )


def write_record(run: Run, plan: TrainingPlan, output: Path) -> None:
    """Writes `config.json`: the run and the receipt."""
    receipt = make_receipt(
        "pretrain",
        run.model_dump(mode="json", exclude=_CACHE_NEUTRAL),
        _LIBRARIES,
        seed=plan.seed,
        step=plan.steps,
        **{name: value for name, value in plan.origin.items() if name not in ("run", "seed", "stm")},
    )
    write_json(output / "config.json", {"run": run.model_dump(mode="json"), "receipt": receipt})
