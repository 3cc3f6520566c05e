"""The table of packed arrays: what is declared once is written, checked, indexed, read back and cut to guides."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from packing_inputs import GRID, index_of, make_inputs, member_of, path_of, run
from stage_outputs import StageOutputs

from stm.config import Augmentation, Pack
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.guides.maker import GuideMaker
from stm.data.guides.window import MAKERS, maker_of
from stm.preprocess.packing.tables import TABLES, CaptionTable, ClipTable, table_of
from stm.shards.check import find_problems
from stm.shards.grid import map_shape
from stm.shards.index import ClipIndex
from stm.shards.reader import ShardReader
from stm.shards.schema import ARRAYS, CLIP_SIZES, PackedArray, shard_schema
from stm.shards.schema import GRID as SCHEMA_GRID
from stm.storage.tables import read_receipt, read_table, write_rows, write_table

GEOMETRY = Geometry(image_size=16, patch_size=8, tubelet=2, frames=2)
BINS = 3
DEPTH = PackedArray(
    "depth",
    layers=("frames",),
    layer=("rows", "columns", "depth_bins"),
    guides=("depth_nearest",),
    since=3,
    dtype=np.dtype("<f4"),
)


class DepthPack(Pack):
    depth: bool = True


class ShadePack(Pack):
    shade: bool = True


class DepthTable(ClipTable):
    values = ("bins",)

    def join(self, clip: Mapping[str, Any], row: Mapping[str, Any]) -> np.ndarray:
        return self.reshape(clip, row["bins"], self.shape(clip, depth_bins=BINS))


@pytest.fixture
def depth(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackedArray]:
    """An array that is declared, and has the code that makes its values and the code that crops it; nothing else."""
    monkeypatch.setitem(ARRAYS, "depth", DEPTH)
    monkeypatch.setitem(TABLES, "depth", DepthTable)
    monkeypatch.setitem(
        MAKERS, "depth", GuideMaker({"depth_nearest": lambda stored: stored.values[stored.taken].max(axis=-1)})
    )
    yield DEPTH


def write_depth(made: StageOutputs) -> dict[str, np.ndarray]:
    """The table of a stage that measures depth; returns each clip's values, [frames, rows, columns, bins]."""
    schema = pa.schema(
        [("key", pa.string()), ("bins", pa.list_(pa.float32()))]
        + [(name, pa.string()) for name in ("video_id", "status", "policy", "detail")]
    )
    values: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for clip in [row for row in read_table(made.index).to_pylist() if row["kept"]]:
        shape = (clip["frames"], *map_shape(clip["width"], clip["height"], GRID), BINS)
        values[clip["key"]] = np.random.default_rng(len(rows)).random(shape, dtype=np.float32)
        outcome = {"video_id": clip["video_id"], "status": "ok", "policy": "keep", "detail": ""}
        rows.append({"key": clip["key"], "bins": values[clip["key"]], **outcome})
    write_rows(path_of(made.folder, "depth"), schema, rows, {}, group=2)
    return values


def pack_depth(folder: Path, **choices: Any) -> tuple[Path, dict[str, np.ndarray]]:
    made = make_inputs(folder)
    values = write_depth(made)
    pack = DepthPack(captions="human", **choices)
    return run(made, pack, depth=path_of(made.folder, "depth")), values


def test_a_new_array_is_written_after_the_others_and_indexed(tmp_path: Path, depth: PackedArray) -> None:
    tar, values = pack_depth(tmp_path)
    names = read_table(tar.with_suffix(".parquet")).schema.names
    assert names[-3:] == ["depth_offset", "depth_size", "sha256"] and "depth_bins" in names
    for row in index_of(tar):
        data = member_of(tar, row["depth_offset"], row["depth_size"])
        found = np.load(io.BytesIO(data))
        assert row["depth_bins"] == BINS and found.dtype == np.float32
        np.testing.assert_array_equal(found, values[row["key"]])
        assert row["sha256"][-1] == hashlib.sha256(data).hexdigest()


def test_a_new_array_is_checked(tmp_path: Path, depth: PackedArray) -> None:
    tar, _ = pack_depth(tmp_path)
    index = tar.with_suffix(".parquet")
    assert find_problems(tar, index) == []
    table, receipt = read_table(index), read_receipt(index)
    rows = table.to_pylist()
    rows[0]["depth_bins"] = 2
    write_table(index, pa.Table.from_pylist(rows, table.schema), receipt)
    assert any("depth.npy is float32" in p and "where the index says float32" in p for p in find_problems(tar, index))
    with pytest.raises(ValueError, match="the shape of its depth array does not match the clip"):
        ClipIndex([index])


def test_layers_of_a_new_array_are_read_back(tmp_path: Path, depth: PackedArray) -> None:
    tar, values = pack_depth(tmp_path)
    index = ClipIndex([tar.with_suffix(".parquet")])
    assert index.lacking("depth").tolist() == [] and index.values("depth_bins") == [BINS]
    reader = ShardReader()
    for number in range(len(index)):
        clip = index[number]
        whole = values[clip.key]
        assert clip.array_shape("depth") == whole.shape
        np.testing.assert_array_equal(reader.layers(clip, "depth", 1, clip.frames - 1), whole[1:])


def test_a_new_array_guides_masks(tmp_path: Path, depth: PackedArray) -> None:
    tar, values = pack_depth(tmp_path)
    data = ClipDataset([tar.with_suffix(".parquet")], GEOMETRY, Augmentation(), 0, False, guides=["depth_nearest"])
    for number in range(len(data)):
        (sample,) = data[number]
        whole = values[sample["key"]]
        rows, columns = whole.shape[1:3]
        # The centre crop is the short side's square: whole rows or whole columns of a frame of 40 x 32 pixels are cut.
        nearest = whole.max(axis=-1)[:2]
        low, high = nearest.min(), nearest.max()
        guide = sample["guides"]["depth_nearest"]
        assert guide.shape == (1, 4) and guide.dtype == np.float32 and (low <= guide).all() and (guide <= high).all()
        assert min(rows, columns) == GRID
        if (rows, columns) == (5, 4):  # 32 x 40 pixels, cut by 4 pixels, half a cell, at the top and at the bottom
            np.testing.assert_allclose(guide, crop_upright(nearest), rtol=1e-5)


def crop_upright(maps: np.ndarray) -> np.ndarray:
    """The guide of the centre crop, [1, 4], of two frames of 32 x 40 pixels, whose maps are [2, 5, 4]."""
    weights = np.array([[0.5, 1, 0.5, 0, 0], [0, 0, 0.5, 1, 0.5]]) / 2
    across = np.repeat(np.eye(2), 2, axis=1) / 2
    return (weights @ maps.mean(axis=0, dtype=np.float64) @ across.T).reshape(1, 4)


def test_a_new_array_can_be_left_out_or_lacking(
    tmp_path: Path, depth: PackedArray, shard: Callable, clip: Callable
) -> None:
    tar, _ = pack_depth(tmp_path, depth=False)
    assert all(row["depth_offset"] is row["depth_bins"] is None for row in index_of(tar))
    with pytest.raises(ValueError, match="clips have no depth map"):
        ClipDataset([tar.with_suffix(".parquet")], GEOMETRY, Augmentation(), 0, False, guides=["depth_nearest"])
    with pytest.raises(ValueError, match=r"pack\.depth is set, but no table of depth was given"):
        run(make_inputs(tmp_path / "more"), DepthPack(captions="human"))
    old = ClipIndex([shard(tmp_path / "old.parquet", [clip(0)])])  # of a format that does not know it
    assert old.lacking("depth").tolist() == [0] and old.lacking("motion").tolist() == []


def test_values_of_another_shape_or_type_than_declared_are_not_packed(depth: PackedArray) -> None:
    sizes = {"captions": 1, "frames": 2, "rows": 4, "columns": 5}
    assert depth.measure(np.zeros((2, 4, 5, 7), np.float32), sizes) == {"depth_bins": 7}
    flow = np.zeros((2, 2, 12, 15, 2), np.float16)
    assert ARRAYS["flow"].measure(flow, sizes) == {"flow_cells": 3}
    for values in (
        np.zeros((2, 4, 5, 7), np.float16),
        np.zeros((2, 4, 6, 7), np.float32),
        np.zeros((2, 4), np.float32),
    ):
        with pytest.raises(ValueError, match=r"the array depth is .* is declared"):
            depth.measure(values, sizes)
    for wrong in (flow[..., :14, :], flow[:1], flow[:, :, :3]):
        with pytest.raises(ValueError, match="the array flow is"):
            ARRAYS["flow"].measure(wrong, sizes)


def test_an_array_of_one_number_per_cell_needs_its_declaration_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table is read and its guide cut as they are: the mean over each token's cells and each slot's frames."""
    plain = PackedArray("shade", layers=("frames",), layer=SCHEMA_GRID, guides=("shade",), since=3)
    monkeypatch.setitem(ARRAYS, "shade", plain)
    made = make_inputs(tmp_path)
    outcome = {"status": "ok", "policy": "keep", "detail": ""}
    rows: list[dict[str, Any]] = []
    values: dict[str, np.ndarray] = {}
    for clip in [row for row in read_table(made.index).to_pylist() if row["kept"]]:
        shape = (clip["frames"], *map_shape(clip["width"], clip["height"], GRID))
        values[clip["key"]] = np.random.default_rng(len(rows)).random(shape).astype(np.float16)
        rows.append({"key": clip["key"], "video_id": clip["video_id"], "shade": values[clip["key"]].ravel(), **outcome})
    texts = [(name, pa.string()) for name in ("key", "video_id", "status", "policy", "detail")]
    table = path_of(made.folder, "shade")
    write_rows(table, pa.schema([*texts, ("shade", pa.list_(pa.float16()))]), rows, {}, group=2)
    tar = run(made, ShadePack(captions="human"), shade=table)
    for row in index_of(tar):
        packed = np.load(io.BytesIO(member_of(tar, row["shade_offset"], row["shade_size"])))
        np.testing.assert_array_equal(packed, values[row["key"]])
    data = ClipDataset([tar.with_suffix(".parquet")], GEOMETRY, Augmentation(), 0, False, guides=["shade"])
    guides = {sample["key"]: sample["guides"]["shade"] for (sample,) in (data[n] for n in range(len(data)))}
    (upright,) = [key for key, maps in values.items() if maps.shape[1:] == (5, 4)]
    np.testing.assert_allclose(guides[upright], crop_upright(values[upright][:2]), rtol=1e-4)


def test_every_array_has_what_its_declaration_asks_for() -> None:
    """A key to pack it, code that makes its values, and code for each of its guides."""
    assert list(ARRAYS) == [array.name for array in ARRAYS.values()] and set(TABLES) <= set(ARRAYS)
    for name, array in ARRAYS.items():
        assert Pack.model_fields[name].annotation is bool
        assert issubclass(table_of(array), CaptionTable if array.per_source else ClipTable)
        assert set(maker_of(array).make if array.guides else ()) == set(array.guides)
        # Without code of its own an array is read and cut as it is: one number per cell.
        assert not array.guides or name in MAKERS or array.layer == SCHEMA_GRID
        assert name in TABLES or not array.size_columns
        assert all(column.startswith(f"{name}_") for column in array.size_columns)
        assert 1 <= len(array.layers) <= 2 and not set(CLIP_SIZES) & set(array.size_columns)
    guides = [guide for array in ARRAYS.values() for guide in array.guides]
    assert len(set(guides)) == len(guides)
    assert len(set(shard_schema().names)) == len(shard_schema().names)


def test_packed_guides_follow_from_what_is_packed() -> None:
    assert {guide for array in Pack().arrays for guide in array.guides} == {"motion", "motion_compensated"}
    everything = Pack(captions="human", flow=True, text=True)
    assert [array.name for array in everything.arrays] == ["flow", "motion", "similarity", "text"]
