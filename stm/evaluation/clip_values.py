"""What each test clip adds to a metric, from the tables that evaluations write beside `metrics.json`.

All of these metrics are a ratio of two sums over clips: hits over queries (a clip may have several captions or questions),
or slots in which an object is kept again over those that could keep it. The value of a clip is chosen so that the mean over
clips is the metric exactly, and varies as the ratio does if other clips are drawn (its linearisation). Where all clips weigh
the same, it is the clip's own ratio, such as 1 for a clip that is classified correctly.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.evaluation.metrics import normalise
from stm.evaluation.retrieval import DEPTHS
from stm.storage.tables import REMOVE, DamagedError, read_table


@dataclass(frozen=True)
class _Source:
    """Where a metric's parts are: the table, its columns (that of the clip first), and what a row adds to both sums."""

    file: str
    columns: pa.Schema
    count: Callable[..., tuple[float, float]]


def _columns(key: str, kind: pa.DataType, *names: str) -> pa.Schema:
    """The column of the clip's key, and columns of one type, without nulls."""
    return pa.schema(
        [pa.field(key, _KEYS[key], nullable=False), *(pa.field(name, kind, nullable=False) for name in names)]
    )


_KEYS = {"key": pa.string(), "keys": pa.list_(pa.string())}


def _recalls(prefix: str, file: str, key: str, column: str) -> dict[str, _Source]:
    """R@K by the column of ranks."""

    def hit(depth: int) -> Callable[[float], tuple[float, float]]:
        return lambda rank: (rank <= depth, 1)

    columns = _columns(key, pa.float64(), column)
    return {f"{prefix}r{depth}": _Source(file, columns, hit(depth)) for depth in DEPTHS}


_TOP1 = _Source(
    "predictions.parquet",
    _columns("key", pa.string(), "label", "prediction"),
    lambda label, prediction: (label == prediction, 1),
)
# By task and metric. A query of `video_text_retrieval` may have several correct clips, which count together.
_SOURCES: Mapping[str, Mapping[str, _Source]] = {
    "linear": {"top1": _TOP1},
    "finetune": {"top1": _TOP1},
    "zero_shot": {"top1": _TOP1},
    "retrieval": _recalls("text_to_video.", "ranks.parquet", "key", "rank"),
    "video_retrieval": _recalls("", "ranks.parquet", "key", "rank"),
    "video_text_retrieval": _recalls("reranked.text_to_video.", "predictions.parquet", "keys", "reranked")
    | _recalls("dual_encoder.text_to_video.", "predictions.parquet", "keys", "rank"),
    "question_answering": {
        "accuracy": _Source(
            "predictions.parquet",
            _columns("key", pa.string(), "answer", "right"),
            lambda answer, right: (normalise(answer) == normalise(right), 1),
        )
    },
    "multiple_choice": {
        "accuracy": _Source(
            "predictions.parquet", _columns("key", pa.float64(), "correct"), lambda correct: (correct, 1)
        )
    },
    # BLEU-4 and METEOR are of the whole split instead of means over clips.
    "captioning": {
        name: _Source("predictions.parquet", _columns("key", pa.float64(), name), lambda score: (score, 1))
        for name in ("cider", "rouge_l")
    },
    "mask_persistence": {
        "kept_share": _Source(
            "kept.parquet",
            _columns("key", pa.int32(), "kept", "visible"),
            lambda kept, visible: (_divide(kept, visible), 1),
        ),
        "persistence": _Source(
            "kept.parquet", _columns("key", pa.int32(), "again", "before"), lambda again, before: (again, before)
        ),
    },
}


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def metrics_by_clip(task: str) -> tuple[str, ...]:
    """The metrics of a task, such as `finetune`, that `read_clip_values` can read."""
    return tuple(_SOURCES.get(task, {}))


def clip_file(folder: Path, task: str, metric: str) -> Path:
    """The table in an evaluation's folder that has a metric's values per clip, one of `metrics_by_clip`."""
    return folder / _SOURCES[task][metric].file


def read_clip_values(folder: Path, task: str, metric: str) -> dict[str, float]:
    """The values of the test clips, whose mean is the metric.

    Args:
        folder: that of the evaluation's results.
        task: its kind, such as `finetune`.
        metric: one of `metrics_by_clip`.

    Returns:
        The values by the clip's key, sorted. Queries with several correct clips have the keys of all of them.

    Raises:
        DamagedError: the table is missing or damaged, a value is not a finite number, or an earlier version wrote it without
            these values.
        ValueError: the metric has no value, such as a persistence of objects that are never kept.
    """
    source = _SOURCES[task][metric]
    path = clip_file(folder, task, metric)
    table = read_table(path, schema=source.columns)
    sums: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(2))
    for key, *values in zip(*(table[name].to_pylist() for name in source.columns.names), strict=True):
        sums[key if isinstance(key, str) else "\n".join(key)] += source.count(*values)
    keys = sorted(sums)
    part, whole = np.array([sums[key] for key in keys]).reshape(-1, 2).T
    if not (np.isfinite(part) & np.isfinite(whole)).all():
        raise DamagedError(f"{path}: the {metric} of a clip is not a finite number", REMOVE)
    if not whole.any():
        raise ValueError(f"{path}: there is nothing of which {metric} could be a share")
    return dict(zip(keys, spread_ratio(part, whole).tolist(), strict=True))


def spread_ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread the ratio of two sums over their terms: values whose mean is the ratio, and whose variance is that of it.

    Args:
        part, whole: [n], not negative; the sum of `whole` is positive.

    Returns:
        Float64 [n].
    """
    mean = whole.mean()
    return np.asarray(part / mean + part.sum() / whole.sum() * (1 - whole / mean))
