"""Two processes learn what one learns from their joined batch: loss, batch norm, and the whole step through DDP."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from two_processes import (
    METHODS,
    NORM_ROWS,
    PRESENT,
    caption_presence,
    make_method,
    make_norm,
    measure_contrast,
    measure_method,
    measure_norm,
    random_batch,
    random_pairs,
    random_rows,
    run_in_two_processes,
    work,
)

Values = dict[str, Any]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Values]:
    """What each of two processes measured."""
    return run_in_two_processes(work, tmp_path_factory.mktemp("meeting"))


def both(two: list[Values], name: str) -> np.ndarray:
    return np.concatenate([values[name] for values in two])


def mean(two: list[Values], name: str) -> np.ndarray:
    return np.mean([values[name] for values in two], axis=0)


def check(found: np.ndarray, expected: torch.Tensor | None, name: str, tolerance: float = 1e-10) -> None:
    assert expected is not None
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRESENT)
def test_the_contrast_of_two_processes_is_that_of_the_joined_batch(two: list[Values], case: str) -> None:
    video, text = (torch.cat(parts) for parts in zip(random_pairs(0), random_pairs(1), strict=True))
    rows = [row for rank in (0, 1) if (row := caption_presence(case, rank)) is not None]
    expected = measure_contrast(video, text, torch.cat(rows) if rows else None, case)
    for name in ("loss", "accuracy", "temperature"):
        check(mean(two, f"{case}/{name}"), expected[f"{case}/{name}"], name)
    for name in ("video", "text"):  # DDP divides what flows on into the weights by the number of processes
        check(both(two, f"{case}/{name}") / 2, expected[f"{case}/{name}"], name)


@pytest.mark.slow
def test_the_contrast_of_two_processes_is_open_clips(two: list[Values]) -> None:
    for name in ("loss", "video", "text"):
        for values in two:
            np.testing.assert_allclose(values[f"ours/{name}"], values[f"peer/{name}"], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", NORM_ROWS)
def test_global_batch_norm_is_batch_norm_of_the_joined_rows(two: list[Values], case: str, affine: bool) -> None:
    rows = torch.cat([random_rows(NORM_ROWS[case][rank], rank) for rank in (0, 1)])
    prefix = f"{case}/{affine}"
    expected = measure_norm(rows, make_norm(nn.BatchNorm1d, affine), prefix)
    for name, value in expected.items():
        kind = name.removeprefix(f"{prefix}/")
        if kind in ("output", "input", "eval"):
            check(both(two, name), value, name)
        elif kind in ("weight", "bias"):
            check(sum(values[name] for values in two), value, name)
        else:  # running statistics: on each process the same, to the bit
            check(two[0][name], value, name)
            np.testing.assert_array_equal(two[0][name], two[1][name])
    assert expected.keys() == {name for name in two[0] if name.startswith(f"{prefix}/")}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_two_processes_is_a_step_on_the_joined_batch(two: list[Values], name: str) -> None:
    parts = [random_batch(rank) for rank in (0, 1)]
    batch: dict[str, Any] = {
        key: torch.cat([part[key] for part in parts]) for key in ("video", "text", "caption_index")
    }
    batch["guides"] = {key: torch.cat([part["guides"][key] for part in parts]) for key in parts[0]["guides"]}
    method = make_method(*METHODS[name])
    expected = measure_method(method, method, batch, name)
    assert expected.keys() == {key for key in two[0] if key.startswith(f"{name}/")}
    for key, value in expected.items():
        if "/loss/" in key:
            check(mean(two, key), value, key)
        else:
            for values in two:
                check(values[key], value, key)


@pytest.mark.slow
def test_the_messages_between_processes_are_part_of_the_one_graph(two: list[Values]) -> None:
    for values in two:  # "compiled" was captured whole (fullgraph), or it would not be there
        assert values["nested"] == 0  # which DDP's optimiser refuses in older versions of torch
        compiled = {name: value for name, value in values.items() if name.startswith("compiled/")}
        assert compiled
        for name, value in compiled.items():
            np.testing.assert_allclose(value, values[name.replace("compiled", "both")], rtol=1e-10, atol=1e-12)


def test_batch_norm_of_one_process_is_torchs() -> None:
    from stm.models.head import GlobalBatchNorm

    rows = random_rows(6, 0)
    for affine in (True, False):
        found = measure_norm(rows, make_norm(GlobalBatchNorm, affine), "")
        for name, value in measure_norm(rows, make_norm(nn.BatchNorm1d, affine), "").items():
            assert torch.equal(found[name], value), name
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GlobalBatchNorm(7)(torch.zeros(1, 7))
