"""Clips for classification: labelled clips for training, and views of test clips."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stm.config import Augmentation, EvaluationTask, Run
from stm.data.dataset import ClipDataset, Sample
from stm.data.geometry import Geometry


class LabelledClips(ClipDataset):
    """The labelled clips of a dataset, for training: unlabelled clips would waste computation, and mixup needs labels.

    `index`, `labels()` and the clip index of a sample ("clip") still refer to the whole dataset.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Accepts the same arguments as `ClipDataset`."""
        super().__init__(*arguments, **options)
        self.chosen = np.flatnonzero(self.labels() >= 0)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, item: int | tuple[int, int]) -> list[Sample]:
        epoch, number = item if isinstance(item, tuple) else (self.epoch, item)
        return super().__getitem__((epoch, int(self.chosen[number])))


def clips_to_test(
    task: EvaluationTask,
    run: Run,
    indexes: Sequence[Path],
    seed: int,
    classes: Sequence[str] | None = None,
) -> ClipDataset:
    """The clips of a test split, with the task's views and crops.

    Args:
        classes: the training split's classes; None: the test split's.
    """
    return ClipDataset(
        indexes,
        Geometry.of(run, task),
        getattr(task, "augmentation", Augmentation()),
        seed,
        False,
        task.views,
        guides=(),
        classes=classes,
        crops=task.crops,
    )
