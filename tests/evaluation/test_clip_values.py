"""Values per clip of metrics that are ratios of sums: their mean and their variance."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stm.evaluation.clip_values import metrics_by_clip, read_clip_values, spread_ratio
from stm.evaluation.tasks import TASKS
from stm.report.pairs import mean_of
from stm.storage.tables import DamagedError, write_table


def test_the_headline_of_every_task_is_kept_per_clip() -> None:
    for name, task in TASKS.items():
        kept = metrics_by_clip(name)
        assert task.headline.name in kept and set(kept) <= {metric.name for metric in task.metrics}


def test_values_of_equal_weights_are_the_clips_own_ratios() -> None:
    part = np.array([0.0, 1, 3, 2, 0])
    assert spread_ratio(part, np.full(5, 3.0)).tolist() == (part / 3).tolist()


def test_values_are_the_ratio_s_derivatives_by_the_weights_of_clips() -> None:
    """The infinitesimal jackknife: n times the change of the ratio with a clip's weight, added to the ratio."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 5, 40).astype(float)
    part = rng.binomial(whole.astype(int), 0.6).astype(float)
    ratio, step = part.sum() / whole.sum(), 1e-6
    changed = [(part.sum() + step * p) / (whole.sum() + step * w) for p, w in zip(part, whole, strict=True)]
    values = spread_ratio(part, whole)
    assert values.mean() == pytest.approx(ratio, abs=1e-14)
    assert values - ratio == pytest.approx(40 * (np.array(changed) - ratio) / step, abs=1e-4)


def test_captions_of_a_clip_count_together(tmp_path: Path) -> None:
    """The interval of R@1 is that of a bootstrap over clips of one, two or five captions that are found together."""
    rng = np.random.default_rng(1)
    counts = rng.choice([1, 2, 5], 300)
    found = [(rng.random(n) < 0.1) | (rng.random() < 0.4) for n in counts]
    rows = [
        {"keys": [f"clip-{number:03d}"], "rank": 1.0 if hit else 1.5, "reranked": 3.0}
        for number, hits in enumerate(found)
        for hit in hits
    ]
    rng.shuffle(rows)
    write_table(tmp_path / "predictions.parquet", pa.Table.from_pylist(rows), {})
    values = read_clip_values(tmp_path, "video_text_retrieval", "dual_encoder.text_to_video.r1")
    assert list(values) == [f"clip-{number:03d}" for number in range(300)]
    mean = mean_of(np.array([list(values.values())]))
    assert mean.value == pytest.approx(np.mean([row["rank"] == 1 for row in rows]), abs=1e-12)
    hits = np.array([hit.sum() for hit in found])
    drawn = rng.integers(300, size=(4000, 300))
    deviation = (hits[drawn].sum(1) / counts[drawn].sum(1)).std()
    assert (mean.high - mean.low) / 2 == pytest.approx(2.042 * deviation, rel=0.05)
    naive = np.concatenate(found).std() / np.sqrt(len(rows))
    assert deviation > 1.3 * naive  # a caption is no trial of its own
    assert set(read_clip_values(tmp_path, "video_text_retrieval", "reranked.text_to_video.r1").values()) == {0.0}


def test_a_table_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    table = pa.table({"key": ["a"], "choice": ["red"], "right": ["red"]})
    write_table(tmp_path / "predictions.parquet", table, {})
    with pytest.raises(DamagedError, match="0 columns `correct`, needs exactly 1"):
        read_clip_values(tmp_path, "multiple_choice", "accuracy")


@pytest.mark.parametrize(("task", "metric"), [("captioning", "cider"), ("mask_persistence", "kept_share")])
def test_values_that_are_no_numbers_are_named(tmp_path: Path, task: str, metric: str) -> None:
    write_table(tmp_path / "predictions.parquet", pa.table({"key": ["a", "b"], "cider": [0.5, math.nan]}), {})
    numbers = {name: pa.array(values, pa.int32()) for name, values in {"kept": [1, 1], "visible": [2, 0]}.items()}
    write_table(tmp_path / "kept.parquet", pa.table({"key": ["a", "b"], **numbers}), {})
    with pytest.raises(DamagedError, match=f"the {metric} of a clip is not a finite number; remove it"):
        read_clip_values(tmp_path, task, metric)
