"""The clips, captions and questions that the evaluations with text read, and the model that reads them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stm.config import Augmentation, CaptionChoice, LanguageRun, LanguageTask
from stm.data.dataset import ClipDataset, Sample
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader, move
from stm.jobs.progress import Progress
from stm.models.video_language import VideoLanguageModel, load_video_language
from stm.models.weights import zoo
from stm.training.interruption import signals_blocked

CLIPS_A_PASS = 32


def load_model(weights: Path, run: LanguageRun, task: LanguageTask, drop_path: float = 0.0) -> VideoLanguageModel:
    """The run's model, for clips of the task's length, to which its positions are stretched.

    Raises:
        ValueError: the file cannot be read, has no text side, or is of another architecture than the run's.
    """
    shape = zoo.describe(run)
    known = shape.position_frames or run.frames
    return load_video_language(
        weights, drop_path, replace(shape, frames=task.frames or run.frames, position_frames=known)
    )


def open_clips(
    task: LanguageTask,
    run: LanguageRun,
    indexes: Sequence[Path],
    seed: int,
    train: bool,
    source: str | None = None,
    kind: type[ClipDataset] = ClipDataset,
) -> ClipDataset:
    """The clips of a split: augmented for training, from the middle and the centre otherwise.

    Args:
        source: the caption source that samples draw from; None: any.
        kind: which of them, and how often: see `Spoken` and `QuestionClips`.
    """
    return kind(
        indexes,
        Geometry.of(run, task),
        task.augmentation if train else Augmentation(),
        seed,
        train,
        guides=(),
        captions=CaptionChoice(sources=None if source is None else (source,)),
        kept_gigabytes=run.kept_gigabytes if train else 0.0,
    )


class Spoken(ClipDataset):
    """A sample for each caption of each clip, for training on captions: an epoch sees every pair once.

    So a clip with 20 captions counts 20 times, as in the lists that the field fine-tunes on (`explode` in a protocol).
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """As a `ClipDataset`."""
        super().__init__(*arguments, **more)
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
        # Another window and crop for each of a clip's captions: what is drawn depends on the epoch and the clip alone.
        samples = super().__getitem__((epoch * self._turns + turn, clip))
        told = {"caption": self.index[clip].captions[caption], "caption_index": caption}
        return [{**sample, **told} for sample in samples]


class QuestionClips(ClipDataset):
    """A sample for each question of each clip, for training; a sample's "label" is the number of its question.

    `asked` holds the questions in order: (clip's number, question).
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """As a `ClipDataset`."""
        super().__init__(*arguments, **more)
        self.asked = [(clip, question) for clip in range(len(self.index)) for question in self.index[clip].questions]
        if not self.asked:
            raise ValueError(
                "no clip of the training split has a question; give them in the annotations (`questions`), and run the "
                "stage `shards` again"
            )

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Sample]:
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        return [{**sample, "label": number} for sample in super().__getitem__((epoch, self.asked[number][0]))]


@torch.inference_mode()
def encode_clips(
    model: VideoLanguageModel, dataset: ClipDataset, device: torch.device, workers: int, precision: str = "float32"
) -> Tensor:
    """Features of all tokens of all clips, [clips, L, W], on the CPU, in the data set's order; float32, or bfloat16."""
    loader = ClipLoader(dataset, CLIPS_A_PASS, shuffle=False, workers=workers)
    found: Tensor | None = None
    with signals_blocked():
        batches = loader.batches()
    with Progress("clips", len(dataset), "clips") as progress:
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                seen = model.encoder(move(batch, device)["video"]).cpu()
            if found is None:
                found = torch.empty(len(dataset), *seen.shape[1:], dtype=seen.dtype)
            found[batch["clip"]] = seen
            progress.advance(len(seen))
    assert found is not None  # a data set is never empty
    return found


@torch.inference_mode()
def over_rows(function: Callable[..., Tensor], *rows: Tensor, device: torch.device, size: int = 128) -> Tensor:
    """Applies a function to so many rows of some tensors at a time, on the device; the result stays on the CPU."""
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return torch.cat([function(*(part.to(device) for part in some)).float().cpu() for some in parts])
