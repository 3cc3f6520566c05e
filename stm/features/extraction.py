"""`stm features`: features of videos and packed clips as a table."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stm.features.engine import Engine, Values
from stm.features.inputs import Source, check_output, collect_sources
from stm.features.model import ClipModel, Pool, find_device, find_protocol, load_features
from stm.features.settings import ClipPlan, ClipSettings, FeatureError
from stm.features.table import features_schema, write_features
from stm.jobs.journal import Journal
from stm.storage.receipts import make_receipt

_log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "timm", "numpy", "opencv-python-headless")


@dataclass(frozen=True)
class Extracted:
    """What a table of features has."""

    path: Path
    videos: int  # with features
    windows: int
    failed: tuple[tuple[str, str], ...]  # id and reason of each video without


def extract(
    weights: str | Path,
    inputs: str | Path | Sequence[str | Path],
    out: str | Path,
    settings: ClipSettings | None = None,
    *,
    pool: Pool = "mean",
    dtype: Literal["float32", "float16"] | None = None,
    average: bool = False,
    root: str | Path | None = None,
) -> Extracted:
    """Write a table with the features of every window of every video; see docs/features.md for its columns.

    An interrupted call resumes after the last finished video if it is repeated. A video that cannot be read has a row with the
    reason.

    Args:
        weights: as in `stm.models.weights.zoo.read`.
        inputs: see `stm.features.inputs.collect_sources`.
        out: the Parquet file to write.
        settings: which windows, and how they are computed; by default the one in the middle.
        pool: `mean` of all tokens, or `none`: every token.
        dtype: of the stored features; by default float32, and float16 per token.
        average: one row per video, the mean over its windows.
        root: folder to which the paths in lists are relative; by default that of the list.

    Raises:
        FeatureError: an option or input cannot be used.
        WeightsError: the weights cannot be read.
    """
    settings = settings or ClipSettings()
    settings.check()
    out = Path(out)
    if pool == "none" and (settings.crops or 1) > 1:
        raise FeatureError("tokens of different crops are of different places: use pool none with crops 1")
    check_output(out, [".parquet"], inputs)
    sources = collect_sources(inputs, None if root is None else Path(root))
    model = load_features(weights, settings, pool)
    plan = make_plan(model, settings, weights, windows=1, crops=1 if pool == "none" else None)
    dtype = dtype or ("float16" if pool == "none" else "float32")
    table = TableWriter(model, plan, settings, {"pool": pool, "dtype": dtype}, sources, out)
    return table.write(average)


def make_plan(
    model: ClipModel, settings: ClipSettings, source: str | Path, windows: int, crops: int | None = None
) -> ClipPlan:
    """Complete the settings by what lies beside the weights."""
    a = model.architecture
    plan = ClipPlan.of(settings, find_protocol(source), a.image_size, a.frames, windows)
    return plan if crops is None else plan.with_crops(crops)


def describe_plan(plan: ClipPlan, settings: ClipSettings) -> dict[str, Any]:
    """All that decides values, apart from the model and the inputs, for receipts."""
    return {**asdict(plan), "batch_size": settings.batch_size, "precision": settings.precision}


def libraries_of(settings: ClipSettings) -> tuple[str, ...]:
    """The distributions whose versions affect values."""
    return (*_LIBRARIES, "av", *(("decord2",) if settings.backend == "decord" else ()))


class TableWriter:
    """Computes the values of sources and writes them as a table of features.

    Args:
        form: what else decides the values, for the receipt; among it their `dtype`.
        dated: whether the table has the time at which each file was modified.
    """

    def __init__(
        self,
        model: ClipModel,
        plan: ClipPlan,
        settings: ClipSettings,
        form: dict[str, Any],
        sources: Sequence[Source],
        out: Path,
        dated: bool = False,
    ) -> None:
        values = describe_plan(plan, settings) | form
        self.receipt = make_receipt(
            "features", values, libraries_of(settings), weights=model.identity, shape=list(model.shape)
        )
        self._sources = sources
        self._out = out
        self._dtype = form["dtype"]
        self._schema = features_schema(int(np.prod(model.shape)), self._dtype, dated)
        self._journal = Journal(out, self.receipt | {"device": find_device(settings).type})  # devices round differently
        self.engine = Engine(model, plan, settings, self._journal, mean_of_crops, self._dtype, "features")
        self._failed: list[tuple[str, str]] = []
        self._windows = 0

    def write(self, average: bool = False) -> Extracted:
        """Compute and write everything; the journal is deleted afterwards."""
        values = self.engine.run(self._sources)
        receipt = self.receipt | {"average": average}
        write_features(self._out, self._schema, self._rows(values, average), receipt)
        self._journal.close()
        for video, reason in self._failed[:20]:
            _log.warning(f"features: {video}: {reason}")
        if len(self._failed) > 20:
            _log.warning(f"features: and {len(self._failed) - 20} more; the column `detail` has all reasons")
        done = len(self._sources) - len(self._failed)
        return Extracted(self._out, done, self._windows, tuple(self._failed))

    def _rows(self, values: Iterator[Values], average: bool) -> Iterator[dict[str, Any]]:
        for each in values:
            summary = each.summary
            own = {
                "video": each.source.video,
                "path": each.source.printable_path,
                "status": summary.status,
                "detail": summary.detail,
                "bytes": None if each.source.clip else each.source.bytes,
                "modified": each.source.modified,
            }
            if not summary.frames:
                self._failed.append((each.source.video, f"{summary.status}: {summary.detail}"))
                yield own | dict.fromkeys(("window", "start", "end", "frames", "feature"))
                continue
            self._windows += len(summary.frames)
            yield from (own | row for row in (_average(each, self._dtype) if average else _each(each)))


def _each(values: Values) -> Iterator[dict[str, Any]]:
    summary = values.summary
    for number, feature in enumerate(values.windows):
        start, end = summary.seconds[number]
        yield {"window": number, "start": start, "end": end, "frames": summary.frames[number], "feature": feature}


def _average(values: Values, dtype: str) -> Iterator[dict[str, Any]]:
    """The mean over the windows; `frames` are those of all windows, each once."""
    summary, total = values.summary, np.zeros(1, np.float64)
    for feature in values.windows:
        total = total + feature
    seconds = np.array(summary.seconds)
    yield {
        "window": 0,
        "start": float(seconds[:, 0].min()),
        "end": float(seconds[:, 1].max()),
        "frames": sorted(set().union(*summary.frames)),
        "feature": (total / len(summary.frames)).astype(dtype),
    }


def mean_of_crops(values: NDArray[np.float32]) -> NDArray[Any]:
    """[crops, ...] -> their mean, in float64."""
    return values.mean(axis=0, dtype=np.float64)
