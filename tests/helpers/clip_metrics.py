"""Checks that the values per clip of an evaluation average to the metrics that it reports."""

from pathlib import Path

import numpy as np
import pytest

from stm.evaluation.clip_values import metrics_by_clip, read_clip_values
from stm.evaluation.task import look_up
from stm.storage.files import read_json


def check_clip_values(output: Path) -> None:
    """Compare the values in the folder of an evaluation's results with its `metrics.json`."""
    metrics = read_json(output / "metrics.json")
    names = metrics_by_clip(metrics["task"])
    assert metrics["headline"]["name"] in names
    for name in names:
        reported = look_up(metrics, name)
        if reported is None:
            with pytest.raises(ValueError, match=f"nothing of which {name} could be a share"):
                read_clip_values(output, metrics["task"], name)
        else:
            values = list(read_clip_values(output, metrics["task"], name).values())
            assert np.mean(values) == pytest.approx(reported, abs=1e-12)
