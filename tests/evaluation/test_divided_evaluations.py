"""Two processes give the numbers of one, in every evaluation; the sizes of splits are odd, and some have a single clip."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from divided_evaluations import ALL, FEW, SHARDED, evaluate_all, evaluate_as, prepare, read_results
from two_processes import run_in_two_processes

from stm.distributed.process import Process

pytestmark = pytest.mark.slow
NAMES = [*ALL, *(f"{name} | few" for name in FEW), *(f"{name} | fsdp" for name in SHARDED)]
# Sums over a batch are added in another order, in float32 of 2^-24 relative rounding, and AdamW divides by gradients near 0.
# Where nothing is trained, nothing differs: a clip is in the same batch of the network, whichever process computes it.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    prepare(folder)
    for name in NAMES:
        evaluate_as(Process(0, 1, torch.device("cpu")), name, folder, folder / "one" / name)
    run_in_two_processes(partial(evaluate_all, folder=folder, names=NAMES), folder)
    return folder


def differences(one: Any, two: Any, path: str = "") -> dict[str, float]:
    """The differences between numbers, by path; all else is equal."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        return {k: v for key in one for k, v in differences(one[key], two[key], f"{path}.{key}").items()}
    if isinstance(one, list):
        assert len(one) == len(two), path
        pairs = enumerate(zip(one, two, strict=True))
        return {k: v for n, (a, b) in pairs for k, v in differences(a, b, f"{path}.{n}").items()}
    if isinstance(one, float) and isinstance(two, float):
        return {path: 0.0 if one == two else abs(one - two) / max(1.0, abs(one))}
    assert one == two, path
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_numbers_of_one(name: str, folder: Path) -> None:
    one, two = (read_results(folder / count / name) for count in ("one", "two"))
    for log in (one["log"], two["log"]):
        for line in log:
            assert math.isfinite(line.pop("clips_per_second"))
    weights = {
        key: (one["weights"].pop(key) - two["weights"].pop(key)).abs().max().item() for key in list(one["weights"])
    }
    assert max(weights.values(), default=0.0) < TOLERANCE
    found = differences(one, two)
    assert max(found.values()) <= (TOLERANCE if one["log"] else 0.0)
    assert found
