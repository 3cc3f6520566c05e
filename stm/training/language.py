"""Pretraining with text: UMT, STM, ClusterSTM. See `stm.training.pretrain`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from stm.config import LanguageRun
from stm.data.dataset import ClipDataset
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.methods import build_method
from stm.models.weights import zoo
from stm.training.batches import Medium, count_media_steps, feed_media
from stm.training.feeding import hash_shards, read_text_model
from stm.training.initialise import start_from
from stm.training.loop import fit
from stm.training.runs import introduce, make_plan, no_batches, open_clips, write_record


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
