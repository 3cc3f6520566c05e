"""Shared by all evaluations: checks of labels and weights, and writing `metrics.json` and `predictions.parquet`."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.config import EvaluationTask, Run, Text
from stm.data.dataset import ClipDataset
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.metrics import classification_metrics
from stm.evaluation.tasks import TASKS
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.pretrained.local_files import without_folders
from stm.storage.files import sha256_file, write_json
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_table
from stm.training.batches import hash_shards
from stm.training.trackers import log_result

_log = logging.getLogger(__name__)

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),  # of the predicted label
    ]
)


def load_checked_encoder(weights: Path, run: Run, drop_path: float = 0.0) -> VideoEncoder:
    """Loads the encoder from a run's weights.

    Raises:
        ValueError: the architecture in the file differs from the run's; the message lists the differences.
    """
    encoder = zoo.load_encoder(weights, drop_path)
    check_architecture(encoder, weights, run)
    return encoder


def check_architecture(encoder: VideoEncoder, weights: Path, run: Run) -> None:
    """Checks that the weights have the run's architecture.

    Raises:
        ValueError: the architectures differ; the message lists the differences.
    """
    actual = asdict(encoder.architecture)
    expected = asdict(zoo.describe(run))
    differences = [
        f"{name} {actual[name]} instead of {expected[name]}" for name in actual if actual[name] != expected[name]
    ]
    if differences:
        raise ValueError(f"{weights}: does not have this run's architecture: {', '.join(differences)}; pretrain again")


def check_labels(test: ClipDataset, train: ClipDataset | None = None) -> None:
    """Checks that the clips can be classified; logs unlabelled clips and test labels that do not occur in training.

    Args:
        train: the training split; None for a task without training, which uses the test split's classes.

    Raises:
        ValueError: a split has no labels at all, or there is only one class.
    """
    splits = {"test": test} if train is None else {"training": train, "test": test}
    for name, dataset in splits.items():
        labels = dataset.index.labels()
        missing = labels.count(None)
        if missing == len(labels):
            raise ValueError(
                f"none of the {missing} clips of the {name} split has a label: classification needs labels. Give them "
                "in the annotations (`label`), or remove the task from `evaluate`"
            )
        if missing:
            _log.warning(f"{missing} of {len(labels)} clips of the {name} split have no label and are left out")
    name, known = next(iter(splits.items()))
    if len(known.classes) < 2:
        raise ValueError(
            f"all {name} clips have the label {known.classes[0]!r}; classification needs at least two labels"
        )
    if unseen := unseen_labels(test):
        _log.warning(f"test labels that no training clip has, counted as wrong: {', '.join(unseen)}")


def unseen_labels(test: ClipDataset) -> list[str]:
    """Labels of the test split that do not occur in training."""
    return sorted({label for label in test.index.labels() if label is not None} - set(test.classes))


def write_classification(
    task: EvaluationTask,
    run: Run,
    inputs: EvaluationInputs,
    test: ClipDataset,
    probabilities: NDArray[np.float32],
    train: ClipDataset | None = None,
    text: Text | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes `metrics.json` and `predictions.parquet`.

    Args:
        test: the test split, whose `classes` are the columns of `probabilities`.
        probabilities: [test clips, classes], averaged over views, in the order of `test`.
        train: the training clips, if anything was trained.
        text: the settings of the text encoder, if one was used.
        extra: additional entries of `metrics.json`.

    `metrics.json` contains the result of `classification_metrics`, `train_clips` and `test_clips` (labelled only),
    `unlabelled_clips` (of the test split), `unseen_labels` and `unseen_clips`; see `write_metrics`.
    """
    labels = test.index.labels()
    # Unlabelled test clips are excluded; clips whose label does not occur in training are included, as errors.
    known = np.array([label is not None for label in labels])
    probabilities = probabilities[known]
    unseen = unseen_labels(test)
    receipt = make_evaluation_receipt(task, run, inputs, test, train, text)
    metrics = {
        **classification_metrics(probabilities, test.labels()[known], test.classes),
        "train_clips": int((train.labels() >= 0).sum()) if train is not None else 0,
        "test_clips": int(known.sum()),
        "unlabelled_clips": int((~known).sum()),
        "unseen_labels": unseen,
        "unseen_clips": sum(label in set(unseen) for label in labels),
        **(extra or {}),
    }
    clips = np.flatnonzero(known).tolist()
    columns = {
        "key": [test.index[number].key for number in clips],
        "label": [labels[number] for number in clips],
        "prediction": [test.classes[number] for number in probabilities.argmax(1).tolist()],
        "probability": probabilities.max(1),
    }
    table = pa.table(columns, schema=PREDICTIONS_SCHEMA).sort_by("key")
    write_table(inputs.output / "predictions.parquet", table, receipt)
    write_metrics(task, inputs, metrics, receipt)


def write_metrics(
    task: EvaluationTask, inputs: EvaluationInputs, metrics: Mapping[str, Any], receipt: Mapping[str, Any]
) -> None:
    """Writes `metrics.json`: `task`, `headline` (see `Metric.read`), the metrics, `settings` and `receipt`.

    Trackers get the headline, too.
    """
    headline = TASKS[task.task].headline.read(metrics)
    content = {"task": task.task, "headline": headline, **metrics, "settings": task.fingerprint(), "receipt": receipt}
    write_json(inputs.output / "metrics.json", content)
    title = f"{task.task} {inputs.output.parent.name}"
    log_result(inputs.trackers, inputs.output, title, content["settings"], {headline["name"]: headline["value"]})


# Run settings that evaluations depend on directly; all others affect only the weights, which are hashed.
_SHAPE = {"model", "image_size", "patch_size", "tubelet", "frames", "stride", "sampling", "precision"}


def make_evaluation_receipt(
    task: EvaluationTask,
    run: Run,
    inputs: EvaluationInputs,
    test: ClipDataset,
    train: ClipDataset | None = None,
    text: Text | None = None,
) -> dict[str, Any]:
    """The receipt of an evaluation: settings, hashes of weights and shards, versions, seed."""
    settings = {"task": task.fingerprint(), "run": run.model_dump(mode="json", include=_SHAPE)}
    if text is not None:
        settings["text"] = without_folders(text.fingerprint())
    shards = {name: _hash(dataset) for name, dataset in (("train", train), ("test", test)) if dataset is not None}
    hashes = {"weights": sha256_file(inputs.weights), **shards}
    return make_receipt("evaluate", settings, ("torch", "timm", "numpy"), **hashes, seed=inputs.seed)


def _hash(dataset: ClipDataset) -> dict[str, str]:
    return hash_shards([tar.with_suffix(".parquet") for tar in dataset.index.tars])
