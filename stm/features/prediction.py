"""`stm predict`: the most probable classes of videos by a fine-tuned classifier."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.features.engine import Engine, Values
from stm.features.extraction import describe_plan, libraries_of, make_plan
from stm.features.inputs import check_output, collect_sources
from stm.features.model import find_device, load_classifier
from stm.features.settings import ClipSettings, FeatureError
from stm.jobs.journal import Journal
from stm.jobs.progress import say
from stm.storage.files import write_bytes
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_table

# VideoMAE's test on Kinetics; a classifier of an evaluation is tested as its `metrics.json` says.
WINDOWS = 5
CROPS = 3
ENDINGS = (".csv", ".parquet", ".json")
_SCHEMA = pa.schema(
    [
        pa.field("video", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("rank", pa.int32()),  # from 1; null for a video that cannot be read
        pa.field("class", pa.string()),
        pa.field("probability", pa.float64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of a video."""

    video: str
    path: str
    status: str
    detail: str
    classes: tuple[str, ...]  # the most probable first; empty if the video cannot be read
    probabilities: tuple[float, ...]


def predict(
    weights: str | Path,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    settings: ClipSettings | None = None,
    *,
    top: int = 5,
    classes: str | Path | None = None,
    root: str | Path | None = None,
) -> list[Prediction]:
    """Classify videos: probabilities are the mean over windows and crops of the softmax, as in VideoMAE's test.

    Args:
        weights: a fine-tuned classifier, in any format of `stm.models.weights.zoo.read`.
        inputs: see `stm.features.inputs.collect_sources`.
        out: a file to write, by its ending CSV, Parquet or JSON; then an interrupted call resumes if it is repeated.
        settings: which windows; by default those of the classifier's evaluation, or `WINDOWS` and `CROPS`.
        top: number of classes per video.
        classes: file with one class name per line, in the order of the logits, for weights without names.
        root: folder to which the paths in lists are relative; by default that of the list.

    Raises:
        FeatureError: the weights are no classifier, or an option or input cannot be used.
        WeightsError: the weights cannot be read.
    """
    settings = settings or ClipSettings()
    settings.check()
    if top < 1:
        raise FeatureError(f"top must be at least 1, is {top}")
    if out is not None:
        check_output(Path(out), ENDINGS, inputs)
    sources = collect_sources(inputs, None if root is None else Path(root))
    model = load_classifier(weights, settings, None if classes is None else Path(classes))
    if model.labels is None:
        say(f"{weights}: these weights have no class names: classes are shown by number. Give them with --classes FILE")
    labels = model.labels or tuple(map(str, range(model.shape[0])))
    plan = make_plan(model, settings, weights, WINDOWS, CROPS)
    form = {"labels": list(labels), "top": top}
    receipt = make_receipt("predict", describe_plan(plan, settings), libraries_of(settings), weights=model.identity)
    with TemporaryDirectory(prefix="stm-predict-") as folder:
        place = Path(folder) / "predictions" if out is None else Path(out)
        journal = Journal(place, receipt | {"device": find_device(settings).type})  # devices round differently
        engine = Engine(model, plan, settings, journal, softmax_mean, "float64", "predictions")
        predictions = [_rank(values, labels, top) for values in engine.run(sources)]
        if out is not None:
            write_predictions(Path(out), predictions, receipt | form)
        journal.close()
    return predictions


def softmax_mean(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits [crops, classes] -> the mean of their softmax, float64 [classes]."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    mean: NDArray[np.float64] = (exponentials / exponentials.sum(-1, keepdims=True)).mean(0)
    return mean


def _rank(values: Values, labels: Sequence[str], top: int) -> Prediction:
    source, summary = values.source, values.summary
    place = source.video, source.printable_path, summary.status, summary.detail
    windows = list(values.windows)
    if not windows:
        return Prediction(*place, (), ())
    mean = np.mean(windows, axis=0)
    best = np.argsort(-mean, kind="stable")[:top].tolist()
    return Prediction(*place, tuple(labels[number] for number in best), tuple(mean[best].tolist()))


def write_predictions(path: Path, predictions: Sequence[Prediction], receipt: dict[str, Any]) -> None:
    """Write predictions atomically, in the format of the file's ending."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        write_table(path, pa.Table.from_pylist(list(_rows(predictions)), schema=_SCHEMA), receipt)
    elif kind == ".json":
        rows = [
            {
                "video": each.video,
                "path": each.path,
                "status": each.status,
                "detail": each.detail,
                "classes": [
                    {"class": name, "probability": value}
                    for name, value in zip(each.classes, each.probabilities, strict=True)
                ],
            }
            for each in predictions
        ]
        write_bytes(path, (json.dumps({"predictions": rows, "receipt": receipt}, indent=2) + "\n").encode())
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, _SCHEMA.names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_rows(predictions))
        write_bytes(path, text.getvalue().encode())


def _rows(predictions: Sequence[Prediction]) -> Iterator[dict[str, Any]]:
    for each in predictions:
        own = {"video": each.video, "path": each.path, "status": each.status, "detail": each.detail}
        if not each.classes:
            yield own | {"rank": None, "class": None, "probability": None}
        for rank, (name, value) in enumerate(zip(each.classes, each.probabilities, strict=True), 1):
            yield own | {"rank": rank, "class": name, "probability": value}


def format_predictions(predictions: Sequence[Prediction]) -> Iterator[str]:
    """The lines of a table for people."""
    width = min(60, max((len(each.video) for each in predictions), default=0))
    for each in predictions:
        if not each.classes:
            yield f"{each.video:<{width}}  {each.status}: {each.detail}"
        for number, (name, value) in enumerate(zip(each.classes, each.probabilities, strict=True)):
            yield f"{each.video if not number else '':<{width}}  {value:6.3f}  {name}"
