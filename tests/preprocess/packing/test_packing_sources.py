"""Several caption sources, text vectors and flow in one shard."""

import io
from pathlib import Path

import numpy as np
import pytest
from packing_inputs import ALL, EVERYTHING, WIDTH, index_of, make_inputs, member_of, path_of, run
from stage_outputs import Clip

from stm.config import BadInput
from stm.data.crop_boxes import Box
from stm.data.geometry import Geometry
from stm.data.guides.crop import crop_map
from stm.data.guides.window import cut_maps, read_maps
from stm.manifest import TooManyFailures
from stm.preprocess.flow.estimate import FLOW_SCHEMA
from stm.preprocess.similarity.score import SIMILARITY_SCHEMA
from stm.preprocess.text.encode import TEXT_SCHEMA
from stm.shards.index import ClipIndex
from stm.shards.reader import ShardReader
from stm.storage.tables import DamagedError, read_receipt, read_table, stream_rows, write_rows


def test_a_clips_captions_maps_and_vectors_are_those_of_all_sources_in_the_packs_order(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path), EVERYTHING)
    found = {row["video_id"]: row for row in index_of(tar)}
    label_captions = ["opening a door.", "a video of opening a door."]
    assert found["b"]["captions"] == [*label_captions, "one", "two"]
    assert found["b"]["caption_sources"] == ["label", "label", "human", "human"]
    # One source has no caption for this clip: the captions of the other stay.
    assert (found["a video/with.dots"]["captions"], found["a video/with.dots"]["caption_sources"]) == (
        ["three"],
        ["human"],
    )
    assert (found["silent"]["captions"], found["silent"]["caption_sources"]) == (label_captions, ["label", "label"])
    for part in ("similarity", "text"):
        tables = [read_table(path_of(tmp_path, part, source)).to_pylist() for source in EVERYTHING.sources]
        for row in found.values():
            array = np.load(io.BytesIO(member_of(tar, row[f"{part}_offset"], row[f"{part}_size"])))
            assert array.dtype == np.float16 and len(array) == len(row["captions"])
            pieces = [piece[part] for table in tables for piece in table if piece["key"] == row["key"] and piece[part]]
            np.testing.assert_array_equal(array.ravel(), np.concatenate(pieces).astype(np.float16))
    assert {row["text_width"] for row in found.values()} == {WIDTH}


def test_a_clip_that_no_source_speaks_of_is_dropped_or_packed_without(tmp_path: Path) -> None:
    made = make_inputs(tmp_path, [Clip("mute", label=None, captions=None), Clip("said", captions=["x"])])
    assert [row["key"] for row in index_of(run(made, EVERYTHING))] == ["said"]
    kept = index_of(run(made, EVERYTHING, BadInput.model_validate({"policy": {"caption_missing": "keep"}})))[0]
    assert (kept["captions"], kept["caption_sources"]) == ([], [])
    assert kept["similarity_offset"] is kept["text_offset"] is kept["text_width"] is None
    assert kept["motion_offset"] is not None and kept["flow_offset"] is not None
    with pytest.raises(TooManyFailures, match="caption_missing"):
        run(made, EVERYTHING, BadInput.model_validate({"policy": {"caption_missing": "fail"}}))


def test_flow_is_packed_forward_and_backward_in_its_own_resolution(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    tar = run(made, EVERYTHING)
    flow = {r["key"]: r for r in read_table(made.flow).to_pylist()}
    for row in index_of(tar):
        array = np.load(io.BytesIO(member_of(tar, row["flow_offset"], row["flow_size"])))
        assert array.dtype == np.float16 and row["flow_cells"] == 2
        assert array.shape == (2, row["frames"], 2 * row["rows"], 2 * row["columns"], 2)
        for half, name in zip(array, ("forward", "backward"), strict=True):
            np.testing.assert_array_equal(half.ravel(), np.array(flow[row["key"]][name], np.float16))


def test_the_index_says_which_text_encoder_was_used(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    tar = run(made, EVERYTHING)
    assert read_receipt(tar.with_suffix(".parquet"))["text_model"] == {"model": "made"}
    assert read_receipt(run(made).with_suffix(".parquet"))["text_model"] is None
    path = path_of(tmp_path, "text", "label")
    write_rows(path, TEXT_SCHEMA, stream_rows(path, ("text",)), {"model": {"model": "other"}}, group=2)
    with pytest.raises(ValueError, match="come from different text encoders"):
        run(made, EVERYTHING)


def test_the_window_of_the_patches_is_passed_on_to_the_guides(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    one = run(made, ALL, name="one").with_suffix(".parquet")
    assert "similarity_window" not in read_receipt(one)  # shards of cells keep their bytes
    set_window(path_of(tmp_path, "similarity"), 3)
    with pytest.raises(DamagedError, match="were made with different windows"):
        run(made, EVERYTHING)
    three = run(made, ALL, name="three").with_suffix(".parquet")
    assert read_receipt(three)["similarity_window"] == 3
    assert one.with_suffix(".tar").read_bytes() == three.with_suffix(".tar").read_bytes()

    geometry, box = Geometry(image_size=24, patch_size=8, tubelet=1, frames=2, stride=1), Box(3, 2, 24, 25)
    for path, window in ((one, 1), (three, 3)):
        index = ClipIndex([path])
        clip = next(index[number] for number in range(len(index)) if "similarity" in index[number].arrays)
        maps = read_maps(ShardReader(), clip, ("similarity",), np.arange(2), geometry, caption=0)
        expected = crop_map(maps["similarity"], (clip.width, clip.height), box, 3, False, window)
        np.testing.assert_array_equal(cut_maps(maps, clip, box, False, geometry)["similarity"], expected.reshape(2, 9))


def set_window(path: Path, window: int) -> None:
    rows = list(stream_rows(path, ("similarity",)))
    write_rows(path, SIMILARITY_SCHEMA, rows, {"settings": {"window": window}}, group=2)


def test_vectors_of_other_captions_or_another_width_are_refused(tmp_path: Path) -> None:
    made, path = make_inputs(tmp_path), path_of(tmp_path, "text")
    rows = list(stream_rows(path, ("text",)))
    for change, message in (
        ({"captions": ["other"]}, "was encoded from different captions"),
        ({"text": rows[0]["text"][:-1]}, r"has 4 values where \(1, 5\) is expected"),
        ({"text": None}, "has captions but no text"),
    ):
        write_rows(path, TEXT_SCHEMA, [{**rows[0], **change}, *rows[1:]], {"model": {"model": "made"}}, group=2)
        with pytest.raises(ValueError, match=message):
            run(made, EVERYTHING)
    wider = [{**row, "width": 6, "text": np.zeros(6 * len(row["captions"]), np.float16)} for row in rows]
    write_rows(path, TEXT_SCHEMA, wider, {"model": {"model": "made"}}, group=2)
    with pytest.raises(ValueError, match="with 5 and 6 values"):
        run(made, EVERYTHING)


def test_flow_of_another_grid_or_other_frames_is_refused(tmp_path: Path) -> None:
    made = make_inputs(tmp_path)
    rows = list(stream_rows(made.flow, ("forward", "backward")))
    for change, message in (
        ({"rows": rows[0]["rows"] + 1}, "is not a multiple of the map's"),
        ({"rows": 0, "columns": 0}, "is not a multiple of the map's"),
        ({"backward": rows[0]["backward"][:-2]}, "a different grid or from different frames"),
    ):
        write_rows(made.flow, FLOW_SCHEMA, [{**rows[0], **change}, *rows[1:]], {}, group=2)
        with pytest.raises(ValueError, match=message):
            run(made, EVERYTHING)
    made.flow.write_bytes(made.flow.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"flow\.parquet: cannot be read"):
        run(made, EVERYTHING)
    assert not list(tmp_path.glob("*packed*"))
