"""Flow by RAFT, as torchvision computes it; the weights are random, so accuracy is not tested."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flow_inputs import GRID, raft, rows_of, run, save_raft, store, texture
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small

from stm.preprocess.flow import raft as flow_raft
from stm.preprocess.flow.raft import Raft
from stm.pretrained.hub import ModelError
from stm.shards.grid import map_shape
from stm.storage.files import sha256_file
from stm.storage.tables import read_receipt


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_raft(tmp_path_factory.mktemp("raft") / "raft_small.safetensors")


def plain_raft(weights: Path, first: np.ndarray, second: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """torchvision's own call on images that need no padding, or are padded by repeating their border pixels."""
    model = raft_small(weights=None).eval()
    model.load_state_dict(flow_raft._read_weights(weights))
    height, width = first.shape[:2]
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    margins = ((top, sides[0] - height - top), (left, sides[1] - width - left), (0, 0))
    inputs = [np.pad(image, margins, mode="edge").transpose(2, 0, 1) for image in (first, second)]
    with torch.no_grad():
        pair = [torch.tensor(image[None].astype(np.float32) / 255 * 2 - 1) for image in inputs]
        flow = model(*pair, num_flow_updates=2)[-1][0].permute(1, 2, 0).numpy()
    return flow[top : top + height, left : left + width]


@pytest.mark.parametrize(("height", "width", "padded"), [(128, 136, (128, 136)), (100, 131, (128, 136))])
def test_raft_is_torchvisions_own(weights: Path, height: int, width: int, padded: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    pairs = [(0, 1), (1, 0), (1, 2)]
    found = Raft(weights, 2, "cpu").estimate(frames, pairs)
    assert found.shape == (3, height, width, 2) and found.dtype == np.float32
    for flow, (first, second) in zip(found, pairs, strict=True):
        expected = plain_raft(weights, frames[first], frames[second], padded)
        assert np.abs(expected).mean() > 0.01
        np.testing.assert_allclose(flow, expected, atol=1e-3 * np.abs(expected).max())


def test_raft_measures_every_step_of_a_clip_both_ways(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake RAFT whose flow is the difference of the two frames' first pixels, which identifies the pair."""
    frames = np.zeros((21, 40, 48, 3), np.uint8)
    frames += (np.arange(21) ** 2 // 2).astype(np.uint8)[:, None, None, None]

    def estimate(self: Raft, given: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        steps = [float(given[b, 0, 0, 0]) - float(given[a, 0, 0, 0]) for a, b in pairs]
        return np.stack([np.full((40, 48, 2), step, np.float32) for step in steps])

    monkeypatch.setattr(Raft, "estimate", estimate)
    stored = store(tmp_path, {"a": frames, "b": frames[:9], "c": frames[:10], "d": frames[:1]})
    found = rows_of(run(stored, tmp_path / "flow.parquet", raft(weights)))
    values = frames[:, 0, 0, 0].astype(float)
    for row in found.values():
        count = row["frames"]
        steps = np.diff(values[:count])
        rows, columns = map_shape(48, 40, GRID)
        for axis, unit in ((0, columns / 48), (1, rows / 40)):
            np.testing.assert_allclose(row["forward"][:-1, 1, 1, axis], steps * unit, rtol=1e-3)
            np.testing.assert_allclose(row["backward"][1:, 1, 1, axis], -steps * unit, rtol=1e-3)
        assert not row["forward"][-1].any() and not row["backward"][0].any()


def test_raft_gives_the_same_bytes_again_and_goes_on_after_a_kill(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store(tmp_path, {key: texture(2, 2, 1, 48, 40, seed=n) for n, key in enumerate("abc")})
    expected = run(stored, tmp_path / "whole.parquet", raft(weights)).read_bytes()
    assert run(stored, tmp_path / "again.parquet", raft(weights)).read_bytes() == expected
    calls, estimate = [], Raft.estimate

    def die_at_the_third(self: Raft, *arguments: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return estimate(self, *arguments)

    monkeypatch.setattr(Raft, "estimate", die_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(stored, tmp_path / "killed.parquet", raft(weights))
    assert not (tmp_path / "killed.parquet").exists()
    assert run(stored, tmp_path / "killed.parquet", raft(weights)).read_bytes() == expected
    assert len(calls) == 4  # clips a and b were not computed again
    receipt = read_receipt(tmp_path / "killed.parquet")
    assert receipt["model"] == {"model": weights.name, "weights_sha256": sha256_file(weights)}
    assert receipt["settings"] == {"backend": "raft", "iterations": 2, "cells": 2}
    assert str(weights.parent) not in str(receipt)


def test_a_pth_file_holds_the_same_weights(tmp_path: Path, weights: Path) -> None:
    torch.save(flow_raft._read_weights(weights), tmp_path / "raft.pth")
    frames = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    flows = [Raft(path, 1, "cpu").estimate(frames, [(0, 1)]) for path in (weights, tmp_path / "raft.pth")]
    assert np.array_equal(flows[0], flows[1])


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_wrong_weights_are_refused_with_a_reason(tmp_path: Path, weights: Path) -> None:
    torch.save({"x": Touches(tmp_path / "ran")}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(weights.read_bytes()[:5000])
    for name, message in {
        "nowhere.pth": "no such file",
        "evil.pth": "cannot be read",
        "list.pth": "holds a list, not a state dict",
        "other.safetensors": "not torchvision's RAFT-small",
        "torn.safetensors": "cannot be read",
    }.items():
        with pytest.raises(ModelError, match=rf"flow\.weights .*{message}"):
            Raft(tmp_path / name, 1, "cpu")
    assert not (tmp_path / "ran").exists()
