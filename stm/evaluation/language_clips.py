"""Clips, captions and questions for evaluations with text, and the model that encodes them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stm.config import (
    CaptionChoice,
    Captioning,
    LanguageRun,
    LanguageTask,
    MultipleChoice,
    QuestionAnswering,
    VideoTextRetrieval,
)
from stm.data.dataset import ClipDataset, Sample
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader, move
from stm.data.loading_processes import explain_lost_processes
from stm.distributed.process import Process
from stm.jobs.progress import Progress
from stm.models.checkpointing import set_checkpointing
from stm.models.video_language import VideoLanguageModel, load_video_language
from stm.models.weights import zoo

CLIPS_PER_BATCH = 32


def load_model(weights: Path, run: LanguageRun, task: LanguageTask, drop_path: float = 0.0) -> VideoLanguageModel:
    """Loads the run's model for the task's clip length, with the position table that the run's settings define for it.

    Raises:
        ValueError: the file cannot be read, contains no text layers, lacks a part that the task needs, or its
            architecture differs from the run's.
    """
    model = load_video_language(weights, drop_path, replace(zoo.describe(run), frames=task.frames or run.frames))
    set_checkpointing(model, task.gradient_checkpointing)
    needed = {"retrieval heads"} if isinstance(task, VideoTextRetrieval | MultipleChoice) else set()
    if isinstance(task, QuestionAnswering | Captioning) and task.trains:
        needed = {"language modelling head"}  # which the decoder starts from
    if lacking := sorted(needed.intersection(model.absent)):
        raise zoo.WeightsError(
            f"{weights}: the release that it was made from has no {lacking[0]}, which {task.task} needs; list only other runs "
            "in the evaluation's `runs`"
        )
    return model


def open_clips(
    task: LanguageTask,
    run: LanguageRun,
    indexes: Sequence[Path],
    seed: int,
    train: bool,
    source: str | None = None,
    kind: type[ClipDataset] = ClipDataset,
) -> ClipDataset:
    """The clips of a split: augmented for training, otherwise with the middle window and the task's `test_crop`.

    Args:
        source: caption source of the samples; None: any.
        kind: the dataset class, whose samples are clips, caption pairs (`CaptionPairs`) or questions (`QuestionClips`).
    """
    return kind(
        indexes,
        Geometry.of(run, task),
        task.augmentation,
        seed,
        train,
        whole=task.test_crop == "whole",
        guides=(),
        captions=CaptionChoice(sources=None if source is None else (source,)),
        # A test split is read too rarely for a cache to pay off.
        kept_gigabytes=run.kept_gigabytes if train else 0.0,
    )


class CaptionPairs(ClipDataset):
    """One sample per caption of each clip, for training on captions: an epoch visits every pair once.

    A clip with 20 captions appears 20 times, as in the usual fine-tuning lists (`explode` in a protocol).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Accepts the same arguments as `ClipDataset`."""
        super().__init__(*arguments, **options)
        numbers = [self.caption_numbers(clip) for clip in range(len(self.index))]
        self.pairs = [(clip, turn, caption) for clip, own in enumerate(numbers) for turn, caption in enumerate(own)]
        self._turns = max(map(len, numbers))
        if not self.pairs:
            raise ValueError("no clip of the training split has a caption; name another source or pack one")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Sample]:
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        clip, turn, caption = self.pairs[number]
        # Each caption of a clip is paired with a different window and crop. These depend only on the epoch and the
        # clip, so each turn is passed as a separate epoch.
        samples = super().__getitem__((epoch * self._turns + turn, clip))
        pair = {"caption": self.index[clip].captions[caption], "caption_index": caption}
        return [{**sample, **pair} for sample in samples]


class QuestionClips(ClipDataset):
    """One sample per question of each clip, for training; a sample's "label" is the index of its question.

    Attributes:
        pairs: (clip index, question) of each sample.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Accepts the same arguments as `ClipDataset`."""
        super().__init__(*arguments, **options)
        self.pairs = [(clip, question) for clip in range(len(self.index)) for question in self.index[clip].questions]
        if not self.pairs:
            raise ValueError(
                "no clip of the training split has a question; give them in the annotations (`questions`), and run the "
                "stage `shards` again"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Sample]:
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        return [{**sample, "label": number} for sample in super().__getitem__((epoch, self.pairs[number][0]))]


class EncodedClips(NamedTuple):
    """The clips that a process has encoded.

    Attributes:
        clips: int64 [n], their indices, ascending.
        features: [n, L, W], the features of all tokens of each, on the CPU, float32 or bfloat16; None without clips.
    """

    clips: Tensor
    features: Tensor | None

    def of(self, clips: Tensor) -> Tensor:
        """The features of some of the process's clips, [m, L, W]."""
        assert self.features is not None
        return self.features[torch.searchsorted(self.clips, clips)]


@torch.inference_mode()
def encode_clips(
    model: VideoLanguageModel, dataset: ClipDataset, process: Process, workers: int, precision: str = "float32"
) -> EncodedClips:
    """Encodes this process's share of the clips. They stay there: the tokens of a whole split may be tens of gigabytes."""
    device, numbers = process.device, torch.tensor(deal_clips(dataset, process), dtype=torch.int64)
    features: Tensor | None = None
    done = 0
    with (
        explain_lost_processes(),
        make_test_loader(dataset, process, workers) as loader,
        Progress("clips", len(numbers), "clips") as progress,
    ):
        for batch in loader.batches():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                tokens = model.encoder(move(batch, device)["video"]).cpu()
            if features is None:
                # Stored on the CPU: they do not fit into GPU memory. Allocated at once, not to need twice the memory.
                features = torch.empty(len(numbers), *tokens.shape[1:], dtype=tokens.dtype)
            features[done : done + len(tokens)] = tokens
            done += len(tokens)
            progress.advance(len(tokens))
    return EncodedClips(numbers, features)


def make_test_loader(dataset: ClipDataset, process: Process, workers: int) -> ClipLoader:
    """The batches of a process's share of the clips; those of one process, dealt in turn."""
    return ClipLoader(
        dataset, CLIPS_PER_BATCH, shuffle=False, workers=workers, rank=process.rank, processes=process.count
    )


def deal_clips(dataset: ClipDataset, process: Process) -> list[int]:
    """The indices of a process's share of the clips, ascending; see `make_test_loader`."""
    return [clip for clip in range(len(dataset)) if clip // CLIPS_PER_BATCH % process.count == process.rank]


@torch.inference_mode()
def over_rows(function: Callable[..., Tensor], *rows: Tensor, device: torch.device, size: int = 128) -> Tensor:
    """Applies a function to tensors in batches of `size` rows on the device; returns float32 on the CPU."""
    batches = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return torch.cat([function(*(part.to(device) for part in batch)).float().cpu() for batch in batches])
