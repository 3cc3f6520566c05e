"""What classification reads and writes: labelled splits, checked weights, `metrics.json`,
`predictions.parquet`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.config import PretrainRun
from stm.data.dataset import ClipDataset
from stm.evaluation.metrics import classification_metrics
from stm.files import make_receipt, sha256_file, write_json, write_table
from stm.models import zoo
from stm.models.vit import VideoEncoder
from stm.training.feeding import hash_shards
from stm.training.logs import say

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),  # of the prediction
    ]
)


def load_checked_encoder(weights: Path, run: PretrainRun, drop_path: float = 0.0) -> VideoEncoder:
    """The encoder of a run's weights.

    Raises:
        ValueError: the file holds another architecture than the run's; the message names what differs.
    """
    encoder = zoo.load_encoder(weights, drop_path)
    has, wanted = asdict(encoder.architecture), asdict(zoo.describe(run))
    wrong = [f"{name} {has[name]} instead of {wanted[name]}" for name in has if has[name] != wanted[name]]
    if wrong:
        raise ValueError(f"{weights}: is not of this run's architecture: {', '.join(wrong)}; pretrain again")
    return encoder


def check_labels(train: ClipDataset, test: ClipDataset) -> None:
    """Says how many clips have no label, or one that no training clip has.

    Raises:
        ValueError: a split has no labels at all, or the training split has but one.
    """
    for name, dataset in (("training", train), ("test", test)):
        missing = dataset.index.labels().count(None)
        if missing == len(dataset):
            raise ValueError(
                f"none of the {missing} clips of the {name} split has a label: classification needs labels. Give them "
                "in the annotations (`label`), or take the task out of `evaluate`"
            )
        if missing:
            say(f"{missing} of {len(dataset)} clips of the {name} split have no label and are left out")
    if len(train.classes) < 2:
        raise ValueError(f"all training clips have the label {train.classes[0]!r}; classification needs two or more")
    unseen = unseen_labels(train, test)
    if unseen:
        say(f"test labels that no training clip has, counted as wrong: {', '.join(unseen)}")


def unseen_labels(train: ClipDataset, test: ClipDataset) -> list[str]:
    """Labels of the test split that the training split does not have."""
    return sorted({label for label in test.index.labels() if label is not None} - set(train.classes))


def write_results(
    task: Any,
    run: PretrainRun,
    weights: Path,
    train: ClipDataset,
    test: ClipDataset,
    probabilities: NDArray[np.float32],
    output: Path,
    seed: int,
    **more: Any,
) -> None:
    """Writes `metrics.json` and `predictions.parquet`.

    Args:
        probabilities: [test clips, classes], averaged over views, in the order of `test`.
        more: further entries of `metrics.json`.

    `metrics.json` holds what `classification_metrics` returns and `task`, `train_clips`, `test_clips` (both
    labelled ones), `unlabelled_clips` (of the test split), `unseen_labels`, `unseen_clips`, `settings` and
    `receipt`.
    """
    labels = test.index.labels()
    known = np.array([label is not None for label in labels])
    targets, probabilities = test.labels()[known], probabilities[known]
    unseen = unseen_labels(train, test)
    receipt = make_receipt(
        "evaluate",
        {"task": task.model_dump(mode="json"), "run": run.model_dump(mode="json", include=_SHAPE)},
        ("torch", "timm", "numpy"),
        weights=sha256_file(weights),
        train=_hash(train),
        test=_hash(test),
        seed=seed,
    )
    metrics = {
        "task": task.task,
        **classification_metrics(probabilities, targets, train.classes),
        "train_clips": int((train.labels() >= 0).sum()),
        "test_clips": int(known.sum()),
        "unlabelled_clips": int((~known).sum()),
        "unseen_labels": unseen,
        "unseen_clips": sum(label in set(unseen) for label in labels),
        "settings": task.model_dump(mode="json"),
        **more,
        "receipt": receipt,
    }
    keys = [test.index[number].key for number in range(len(test))]
    _write_predictions(output / "predictions.parquet", keys, labels, train.classes, probabilities, known, receipt)
    write_json(output / "metrics.json", metrics)


_SHAPE = {"model", "image_size", "patch_size", "tubelet", "frames", "stride", "precision"}


def _hash(dataset: ClipDataset) -> dict[str, str]:
    return hash_shards([tar.with_suffix(".parquet") for tar in dataset.index.tars])


def _write_predictions(
    path: Path,
    keys: Sequence[str],
    labels: Sequence[str | None],
    classes: Sequence[str],
    probabilities: NDArray[np.float32],
    known: NDArray[np.bool_],
    receipt: Mapping[str, Any],
) -> None:
    clips = np.flatnonzero(known).tolist()
    best = probabilities.argmax(1)
    columns = {
        "key": [keys[i] for i in clips],
        "label": [labels[i] for i in clips],
        "prediction": [classes[i] for i in best.tolist()],
        "probability": probabilities.max(1).astype(np.float32),
    }
    write_table(path, pa.table(columns, schema=PREDICTIONS_SCHEMA).sort_by("key"), receipt)
