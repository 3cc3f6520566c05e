"""The flow stage: known displacements by DIS, and damaged inputs."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from flow_inputs import DIS, GRID, raft, rows_of, run, save_raft, store, texture
from hypothesis import given
from hypothesis import strategies as st
from stage_outputs import Clip, make_stage_outputs

from stm.config import Flow
from stm.preprocess.flow.cells import average_weights, to_cells
from stm.preprocess.flow.estimate import FLOW_SCHEMA
from stm.preprocess.frames.table import FRAMES_SCHEMA, read_kept
from stm.shards.grid import map_shape
from stm.storage.files import sha256_file
from stm.storage.tables import DamagedError, read_receipt, read_table, write_table


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_raft(tmp_path_factory.mktemp("raft") / "raft_small.safetensors")


# ------------------------------------------------------------------------------------------------------------- cells


@given(st.integers(1, 60), st.integers(1, 80))
def test_averaging_weighs_pixels_by_exact_areas(length: int, cells: int) -> None:
    """Against an oversampled count: each pixel is cut into `cells` grains, and each cell holds `length` of them."""
    weights = average_weights(length, cells)
    grains = np.repeat(np.arange(length), cells).reshape(cells, length)
    expected = np.stack([np.bincount(row, minlength=length) for row in grains]) / length
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)


def test_cells_are_means_of_their_pixels_in_units_of_the_maps_cells() -> None:
    flow = np.random.default_rng(0).normal(0, 9, (24, 40, 2)).astype(np.float32)  # map cells of 8 x 8 pixels
    found = to_cells(flow, rows=3, columns=5, cells=2)
    assert found.shape == (6, 10, 2) and found.dtype == np.float16
    for row, column in np.ndindex(6, 10):
        block = flow[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_allclose(found[row, column], block.mean(axis=(0, 1)) / 8, atol=2e-3)
    wide = to_cells(np.ones((20, 60, 2), np.float32), rows=2, columns=3, cells=1)  # cells of 20 x 10 pixels
    np.testing.assert_allclose(wide, np.broadcast_to([1 / 20, 1 / 10], (2, 3, 2)), rtol=1e-3)


# --------------------------------------------------------------------------------------------------------------- DIS


@pytest.mark.parametrize(
    ("preset", "cells"), [("ultrafast", 2), ("fast", 2), ("medium", 2), ("medium", 1), ("medium", 4)]
)
def test_a_moving_texture_has_its_displacement_everywhere(tmp_path: Path, preset: str, cells: int) -> None:
    """Moves right and down, left and up, and mixed; by less than a cell, and by less than a pixel."""
    moves = {"a": (5.0, 3.0), "b": (-4.0, -2.5), "c": (0.6, -0.4), "d": (-7.0, 6.0)}
    stored = store(tmp_path, {key: texture(3, *move, width=120, height=100) for key, move in moves.items()})
    found = rows_of(run(stored, tmp_path / "flow.parquet", Flow.model_validate({"preset": preset, "cells": cells})))
    rows, columns = map_shape(120, 100, GRID)
    for key, move in moves.items():
        truth = np.array(move) * [columns / 120, rows / 100]
        row = found[key]
        assert (row["rows"], row["columns"], row["status"]) == (rows * cells, columns * cells, "ok")
        inside = (slice(None), slice(cells, -cells), slice(cells, -cells))  # new content enters at the border
        np.testing.assert_allclose(np.median(row["forward"][inside][:-1], axis=(1, 2)), [truth] * 2, atol=0.012)
        np.testing.assert_allclose(np.median(row["backward"][inside][1:], axis=(1, 2)), [-truth] * 2, atol=0.012)
        assert np.abs(row["forward"][inside][:-1] - truth).mean() < 0.03
        assert (row["forward"][-1] == 0).all() and (row["backward"][0] == 0).all()


def test_flow_is_that_of_opencv_on_the_stored_jpegs(tmp_path: Path) -> None:
    frames = texture(3, 2, 1, 90, 70)
    stored = store(tmp_path, {"a": frames})
    row = rows_of(run(stored, tmp_path / "flow.parquet", Flow(cells=1)))["a"]
    grey = [
        simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(f, 95, colorsubsampling="420"), "GRAY")[..., 0] for f in frames
    ]
    rows, columns = map_shape(90, 70, GRID)
    for t, name, other in ((0, "forward", 1), (1, "forward", 2), (1, "backward", 0), (2, "backward", 1)):
        fresh = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(grey[t], grey[other], None)  # type: ignore[attr-defined]
        for r, c in np.ndindex(rows, columns):
            block = fresh[14 * r : 14 * r + 14, 15 * c : 15 * c + 15].mean(axis=(0, 1))
            np.testing.assert_allclose(row[name][t, r, c], block / [90 / columns, 70 / rows], atol=2e-3)


def test_what_moves_has_flow_and_the_rest_has_none(tmp_path: Path) -> None:
    """A textured square moves over a still background: the flow is non-zero inside the square only."""
    still, square = texture(1, 0, 0, 160, 128)[0], texture(1, 0, 0, 64, 64, seed=1)[0]
    frames = np.stack([still] * 2)
    frames[0, 32:96, 40:104], frames[1, 36:100, 46:110] = square, square
    row = rows_of(run(store(tmp_path, {"a": frames}), tmp_path / "flow.parquet", Flow(cells=2)))["a"]
    rows, columns = map_shape(160, 128, GRID)
    cell = np.array([160 / columns, 128 / rows])
    pixels = row["forward"][0] * cell
    assert np.abs(pixels[4:6, 5:7] - [6, 4]).max() < 1  # inside the square
    assert np.abs(pixels[:1]).max() < 0.5 and np.abs(pixels[:, -3:]).max() < 0.5
    assert np.abs((row["backward"][1] * cell)[5:7, 6:8] + [6, 4]).max() < 1


def test_the_bytes_depend_neither_on_processes_nor_on_the_run(tmp_path: Path) -> None:
    stored = store(tmp_path, {key: texture(3, 2, 1, 60 + 8 * n, 50, seed=n) for n, key in enumerate("abcd")})
    first, second = run(stored, tmp_path / "x.parquet"), run(stored, tmp_path / "y.parquet", processes=2)
    assert sha256_file(first) == sha256_file(second)
    assert not list(tmp_path.glob(".*.journal"))


def test_a_clip_of_one_frame_has_no_flow_but_a_row(tmp_path: Path) -> None:
    row = rows_of(run(store(tmp_path, {"a": texture(1, 0, 0, 40, 60)}), tmp_path / "flow.parquet"))["a"]
    assert (row["frames"], row["rows"], row["columns"], row["status"]) == (1, 16, 10, "ok")
    assert not row["forward"].any() and not row["backward"].any()


@pytest.mark.slow
def test_a_clip_that_takes_too_long_is_killed_and_marked(tmp_path: Path) -> None:
    stored = store(tmp_path, {"long": np.repeat(texture(2, 1, 0, 320, 240), 100, axis=0)})
    late = rows_of(run(stored, tmp_path / "flow.parquet", Flow(timeout_seconds=0.05)))["long"]
    assert (late["status"], late["policy"], late["forward"], late["backward"]) == ("timeout", "drop", None, None)
    assert rows_of(run(stored, tmp_path / "flow.parquet"))["long"]["status"] == "ok"


def test_a_table_says_what_made_it_and_no_more(tmp_path: Path) -> None:
    stored = store(tmp_path, {"a": texture(2, 1, 0, 40, 40)})
    receipt = read_receipt(run(stored, tmp_path / "flow.parquet", Flow(timeout_seconds=99)))
    assert receipt["settings"] == {"backend": "dis", "preset": "medium", "cells": 2}
    assert receipt["grid"] == GRID and "opencv-python-headless" in receipt["versions"]
    assert read_table(tmp_path / "flow.parquet").schema.names == FLOW_SCHEMA.names


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("backend", ["dis", "raft"])
def test_damaged_frames_end_the_job_and_name_what_to_remove(tmp_path: Path, weights: Path, backend: str) -> None:
    made = make_stage_outputs(tmp_path, [Clip(key, frames=2) for key in "abc"], GRID)
    output, settings = tmp_path / "out.parquet", DIS if backend == "dis" else raft(weights)
    row, sound = read_kept(made.index)[1], made.tar.read_bytes()
    damaged = bytearray(sound)
    damaged[row["offsets"][1] : row["offsets"][1] + 20] = bytes(20)
    made.tar.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"stored frame 1 of clip 'b'.*Remove the tar and its index and run again"):
        run((made.tar, made.index), output, settings)
    assert not output.exists()
    made.tar.write_bytes(sound)
    assert {row["status"] for row in rows_of(run((made.tar, made.index), output, settings)).values()} == {"ok"}


def test_a_torn_or_missing_tar_or_index_is_named(tmp_path: Path) -> None:
    made = make_stage_outputs(tmp_path, [Clip("a", frames=2)], GRID)
    made.tar.write_bytes(made.tar.read_bytes()[:1500])
    with pytest.raises(DamagedError, match=rf"{made.tar}.*truncated file.*Remove the tar and its index"):
        run((made.tar, made.index), tmp_path / "out.parquet")
    made.tar.unlink()
    with pytest.raises(DamagedError, match=rf"{made.tar}.*remove its index and run again"):
        run((made.tar, made.index), tmp_path / "out.parquet")
    made.index.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as a Parquet table"):
        run((made.tar, made.index), tmp_path / "out.parquet")


def test_frames_of_another_size_than_the_index_says_are_refused(tmp_path: Path) -> None:
    made = make_stage_outputs(tmp_path, [Clip("a", frames=2)], GRID)
    rows = read_table(made.index).to_pylist()
    write_table(made.index, pa.Table.from_pylist([rows[0] | {"width": 9000}], FRAMES_SCHEMA), {})
    with pytest.raises(DamagedError, match="the index says 9000 x 32"):
        run((made.tar, made.index), tmp_path / "out.parquet")
