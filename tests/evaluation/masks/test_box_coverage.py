"""Coverage of true boxes: against counted pixels, and on masks whose answer is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stm.config import MaskQuality
from stm.evaluation.masks.box_coverage import (
    TrueClip,
    bootstrap_interval,
    measure_coverage,
    measure_mask_quality,
    share_in_cells,
    subtract_camera,
)
from stm.storage.tables import write_table

ROWS, COLUMNS, FRAMES = 4, 5, 3
SETTINGS = MaskQuality(split="test", text_ratio=0.5, motion_ratio=0.75)


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 7))
def test_shares_are_those_of_counted_pixels(seed: int, rows: int, columns: int) -> None:
    """A box whose edges lie on a fine raster of the frame: cell by cell, the share of its raster points."""
    rng, fine = np.random.default_rng(seed), 12
    height, width = rows * fine, columns * fine
    x0, x1 = np.sort(rng.choice(width + 1, 2, replace=False))
    y0, y1 = np.sort(rng.choice(height + 1, 2, replace=False))
    raster = np.zeros((height, width))
    raster[y0:y1, x0:x1] = 1
    counted = raster.reshape(rows, fine, columns, fine).sum((1, 3)) / raster.sum()
    found = share_in_cells(np.array([[x0 / width, y0 / height, x1 / width, y1 / height]]), rows, columns)
    np.testing.assert_allclose(found[0].reshape(rows, columns), counted, atol=1e-12)


def test_a_box_without_area_has_no_share() -> None:
    assert share_in_cells(np.array([[0.2, 0.3, 0.2, 0.9], [1.0, 1.0, 1.0, 1.0]]), 4, 5).sum() == 0


def one_cell(row: int, column: int) -> list[float]:
    return [column / COLUMNS, row / ROWS, (column + 1) / COLUMNS, (row + 1) / ROWS]


def scores(row: int, column: int) -> np.ndarray:
    """[1, FRAMES, ROWS, COLUMNS], highest in one cell."""
    values = np.random.default_rng(0).random((1, FRAMES, ROWS, COLUMNS)).astype(np.float32)
    values[:, :, row, column] = 2
    return values


def test_a_guide_that_points_at_the_object_hides_it_all_and_one_that_points_away_nothing() -> None:
    clip = TrueClip("fixed", np.tile(one_cell(1, 2), (FRAMES, 1)))
    assert measure_coverage("text_top", scores(1, 2), clip, 0.5, "a") == (1.0, 0.5)
    assert measure_coverage("text_top", -scores(1, 2), clip, 0.5, "a") == (0.0, 0.5)
    assert measure_coverage("motion", scores(1, 2), clip, 0.25, "a") == (1.0, 0.25)


def test_several_captions_count_their_mean() -> None:
    clip = TrueClip("fixed", np.tile(one_cell(1, 2), (FRAMES, 1)))
    both = np.concatenate([scores(1, 2), -scores(1, 2), scores(1, 2)])
    assert measure_coverage("text_top", both, clip, 0.5, "a") == (pytest.approx(2 / 3), 0.5)


def test_frames_that_do_not_show_the_object_do_not_count() -> None:
    boxes = np.array([one_cell(1, 2), [0, 0, 0, 0], one_cell(1, 2)])
    values = scores(1, 2)
    values[:, 1] = -1
    assert measure_coverage("text_top", values, TrueClip("fixed", boxes), 0.5, "a") == (1.0, 0.5)
    assert measure_coverage("text_top", values, TrueClip("fixed", np.zeros((3, 4))), 0.5, "a") is None


def test_random_masks_cover_what_chance_says() -> None:
    rng, found = np.random.default_rng(1), []
    for number in range(400):
        low, high = np.sort(rng.random((2, FRAMES, 2)), axis=0)
        clip = TrueClip("fixed", np.concatenate([low, high], axis=1))
        measured = measure_coverage("random", np.zeros((1, FRAMES, ROWS, COLUMNS), np.float32), clip, 0.6, str(number))
        assert measured is not None
        found.append(measured)
    coverage, chance = np.array(found).T
    assert (chance == 12 / 20).all()
    assert abs(coverage.mean() - 0.6) < 4 * coverage.std() / 20


def test_the_cameras_motion_is_taken_off() -> None:
    vectors = np.tile(np.array([3.0, -1.0]), (FRAMES, ROWS, COLUMNS, 1)).astype(np.float16)
    vectors[:, 2, 2] = [0.0, -5.0]
    expected = np.zeros((FRAMES, ROWS, COLUMNS))
    expected[:, 2, 2] = 5.0
    np.testing.assert_allclose(subtract_camera(vectors), expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_intervals_hold_the_mean_and_stay_inside_the_values(values: list[float]) -> None:
    low, high = bootstrap_interval(np.array(values))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_intervals_shrink_to_those_of_the_normal_law() -> None:
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.15 * half),
        pytest.approx(values.mean() + half, abs=0.15 * half),
    )


def write(path: Path, contents: list[dict[str, Any]], **types: pa.DataType) -> Path:
    strings = {name: pa.string() for name in contents[0] if name not in types}
    write_table(path, pa.Table.from_pylist(contents, schema=pa.schema({**strings, **types})), {})
    return path


MAP = {"frames": pa.int32(), "rows": pa.int32(), "columns": pa.int32()}
HALVES = pa.list_(pa.float16())


def made(folder: Path) -> dict[str, Any]:
    """Two clips: one whose camera is fixed, one whose camera moves; motion points at the object in the first
    only.
    """
    cells = {"fixed": (1, 2), "moving": (3, 0)}
    size = {"width": 50, "height": 40}
    # Two decoded frames for each stored one; boxes of the frames between lie elsewhere.
    truth = [
        {
            "video_id": f"{camera} clip",
            "split": "test",
            "camera": camera,
            "boxes": np.concatenate(
                [[np.multiply(one_cell(*cell), [50, 40, 50, 40]), [0, 0, 1, 1]] for _ in range(FRAMES)]
            ).ravel(),
            **size,
        }
        for camera, cell in cells.items()
    ]
    truth.append({**truth[0], "video_id": "other", "split": "train"})
    frames = [
        {"key": f"{camera}-clip", "video_id": f"{camera} clip", "kept": True, "decode_index": [0, 2, 4]}
        for camera in cells
    ]
    frames.append({"key": "lost", "video_id": "lost", "kept": False, "decode_index": []})
    shape = {"frames": FRAMES, "rows": ROWS, "columns": COLUMNS}
    similarity = [
        {"key": f"{camera}-clip", **shape, "similarity": np.concatenate([scores(*cell)] * 2).ravel().astype(np.float16)}
        for camera, cell in cells.items()
    ]
    similarity.append({"key": "failed", **shape, "similarity": None})
    motion = []
    for camera, cell in cells.items():
        vector = np.zeros((FRAMES, ROWS, COLUMNS, 2), np.float16)
        vector[:, cell[0], cell[1]] = [4, 0]
        if camera == "moving":
            vector[..., 0] += 8
            vector[:, cell[0], cell[1]] = [1, 0]  # against the camera: the slowest cell of the picture
        magnitude = np.linalg.norm(vector, axis=-1).ravel().astype(np.float16)
        motion.append({"key": f"{camera}-clip", **shape, "magnitude": magnitude, "vector": vector.ravel()})
    boxes = {"boxes": pa.list_(pa.float32()), "width": pa.int32(), "height": pa.int32()}
    kept = {"kept": pa.bool_(), "decode_index": pa.list_(pa.int32())}
    return {
        "frames_indexes": [write(folder / "frames.parquet", frames, **kept)],
        "similarity": {"human": [write(folder / "similarity.parquet", similarity, **MAP, similarity=HALVES)]},
        "motion": [write(folder / "motion.parquet", motion, **MAP, magnitude=HALVES, vector=HALVES)],
        "truth": write(folder / "truth.parquet", truth, **boxes),
    }


def test_the_table_says_what_each_guide_hides(tmp_path: Path) -> None:
    measure_mask_quality(**made(tmp_path), settings=SETTINGS, output=tmp_path / "quality.json")
    found = json.loads((tmp_path / "quality.json").read_text())
    rows = {(r["guide"], r["source"], r["camera"], r["ratio"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"]) == 4 * 2 * 2
    assert all(row["clips"] == 1 and row["low"] <= row["coverage"] <= row["high"] for row in rows.values())
    assert {(row["ratio"], row["chance"]) for row in rows.values()} == {(0.5, 0.5), (0.75, 0.75)}
    coverage = {place: row["coverage"] for place, row in rows.items()}
    for camera in ("fixed", "moving"):
        assert coverage["text_top", "human", camera, 0.5] == 1
        assert coverage["motion_minus_camera", None, camera, 0.75] == 1
        assert 0 < coverage["random", None, camera, 0.75] <= 1
    assert coverage["motion", None, "fixed", 0.75] == 1
    assert coverage["motion", None, "moving", 0.75] == 0


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    inputs = made(tmp_path)
    for name in ("first", "second"):
        measure_mask_quality(**inputs, settings=SETTINGS, output=tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_motion_may_be_missing(tmp_path: Path) -> None:
    measure_mask_quality(**{**made(tmp_path), "motion": []}, settings=SETTINGS, output=tmp_path / "quality.json")
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert {row["guide"] for row in rows} == {"text_top", "random"}


def test_a_split_without_boxes_is_refused(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"split": "valid"})
    with pytest.raises(ValueError, match=r"none of the 0 clips of split 'valid'"):
        measure_mask_quality(**made(tmp_path), settings=settings, output=tmp_path / "quality.json")


def test_truth_of_other_videos_is_refused(tmp_path: Path) -> None:
    inputs = made(tmp_path)
    row = {"key": "fixed-clip", "video_id": "fixed clip", "kept": True, "decode_index": [0, 99]}
    inputs["frames_indexes"] = [
        write(tmp_path / "other.parquet", [row], kept=pa.bool_(), decode_index=pa.list_(pa.int32()))
    ]
    with pytest.raises(ValueError, match=r"boxes for 6 frames, and .* stores its frame 99"):
        measure_mask_quality(**inputs, settings=SETTINGS, output=tmp_path / "quality.json")
