"""Cached-then-cropped maps against maps of the crop, with a CLIP of random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import simplejpeg
import torch
from safetensors.torch import save_file

from stm.config import CropComparison, Similarity
from stm.data.crop_boxes import Box, draw_crop
from stm.evaluation.masks import crop_agreement
from stm.evaluation.masks.crop_agreement import chance_overlap, measure_crop_agreement, overlap
from stm.preprocess.frames.table import FRAMES_SCHEMA
from stm.preprocess.similarity.patch_scorer import PatchScorer, cosine
from stm.pretrained.clip import load_clip
from stm.storage.tables import write_table
from stm.storage.tars import TarWriter

CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
SIDE, WIDTH, TOKEN = 48, 72, 12
CAPTIONS = ["a red circle", "a square"]


@pytest.mark.parametrize(("tokens", "ratio"), [(16, 0.6), (196, 0.6), (196, 0.9), (9, 0.5)])
def test_chance_is_that_of_drawn_masks(tokens: int, ratio: float) -> None:
    rng, hidden = np.random.default_rng(0), int(ratio * tokens)
    found = []
    for _ in range(4000):
        masks = np.zeros((2, tokens), dtype=bool)
        for mask in masks:
            mask[rng.permutation(tokens)[:hidden]] = True
        found.append(overlap(*masks))
    assert chance_overlap(tokens, ratio) == pytest.approx(np.mean(found), abs=4 * np.std(found) / 4000**0.5)


@pytest.fixture(scope="module")
def make_inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """One clip of two frames of 48 x 72 pixels, with maps of windows of 12 x 12 pixels by a small CLIP, 12 / window apart."""
    folder = tmp_path_factory.mktemp("agreement")
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (folder / "clip").mkdir()
    save_file(model.state_dict(), folder / "clip" / "open_clip_model.safetensors")
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))

    coarse = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    pictures = coarse.repeat(TOKEN, axis=1).repeat(TOKEN, axis=2)
    coded = [simplejpeg.encode_jpeg(np.ascontiguousarray(p), quality=95, colorsubsampling="444") for p in pictures]
    with TarWriter(folder / "train-00000.tar") as tar:
        members = [tar.add(f"a.{t:04d}.jpg", data) for t, data in enumerate(coded)]
    frames = {
        "key": ["a"], "video_id": ["a"], "path": ["a.mp4"], "status": ["ok"], "policy": ["keep"], "detail": [""],
        "kept": [True], "frames": [2], "width": [WIDTH], "height": [SIDE], "source_width": [WIDTH],
        "source_height": [SIDE], "pts": [[0.0, 0.5]], "decode_index": [[0, 4]],
        "offsets": [[m.offset for m in members]], "sizes": [[m.size for m in members]],
        "sha256": [[m.sha256 for m in members]],
    }  # fmt: skip
    write_table(folder / "train-00000.parquet", pa.table(frames, schema=FRAMES_SCHEMA), {})

    def make(window: int) -> dict[str, Any]:
        settings = Similarity(model=f"local-dir:{folder / 'clip'}", batch_size=16, window=window)
        scorer = PatchScorer(load_clip(settings.model, "float32", "cpu"), 4 * window, 16, window=window)
        maps = cosine(
            scorer.embed_frames([simplejpeg.decode_jpeg(data) for data in coded]), scorer.embed_texts(CAPTIONS)
        )
        assert maps.shape == (2, 2, 4 * window, 6 * window)
        similarity = {
            "key": ["a"], "video_id": ["a"], "captions": [CAPTIONS], "frames": [2], "rows": [4 * window],
            "columns": [6 * window], "similarity": pa.array([maps.ravel()], pa.list_(pa.float16())),
        }  # fmt: skip
        write_table(folder / f"similarity-{window}.parquet", pa.table(similarity), {})
        return {
            "frames_tars": [folder / "train-00000.tar"],
            "frames_indexes": [folder / "train-00000.parquet"],
            "similarity": [folder / f"similarity-{window}.parquet"],
            "settings": settings,
            "device": "cpu",
        }

    return make


def compare(crops: int, **values: Any) -> CropComparison:
    return CropComparison(crops=crops, image_size=SIDE, patch_size=TOKEN, **values)


# The whole height at an offset that is a multiple of the cells' side, 12 / window pixels: every token is one stored window.
@pytest.mark.parametrize(
    ("window", "left"), [(1, 0), (1, 12), (1, 24), (2, 0), (2, 6), (2, 24), (3, 4), (3, 20), (3, 24)]
)
def test_a_crop_along_the_cells_has_the_cached_map_itself(
    window: int,
    left: int,
    make_inputs: Callable[[int], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crop_agreement, "draw_crop", lambda *_: (Box(left, 0, SIDE, SIDE), False))
    measure_crop_agreement(**make_inputs(window), comparison=compare(6), output=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["iou"] == found["low"] == found["high"] == 1
    assert found["correlation"] == pytest.approx(1)
    assert (found["smaller_iou"], found["smaller_crops"], found["window"]) == (None, 0, window)


def test_overlapping_windows_follow_a_crop_that_lies_between_the_cells(
    make_inputs: Callable[[int], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crop_agreement, "draw_crop", lambda *_: (Box(6, 0, SIDE, SIDE), False))
    found = {}
    for window in (1, 2):
        measure_crop_agreement(**make_inputs(window), comparison=compare(6), output=tmp_path / "out.json")
        found[window] = json.loads((tmp_path / "out.json").read_text())
    assert found[1]["iou"] < found[2]["iou"] == 1
    assert found[1]["correlation"] < 0.9


def test_random_crops_agree_beyond_chance_and_the_same_each_time(
    make_inputs: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        measure_crop_agreement(**make_inputs(1), comparison=compare(20), output=tmp_path / name, seed=4)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    found = json.loads((tmp_path / "first").read_text())
    assert found["crops"] == 20 and found["tokens"] == 16
    assert found["chance_iou"] == chance_overlap(16, 0.6) < found["low"] <= found["iou"] < 1
    assert 0 < found["correlation"] < 1
    assert 0 < found["smaller_crops"] < 20


def test_the_crops_are_those_of_the_comparison(
    make_inputs: Callable[[int], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[Box] = []

    def record(*arguments: Any) -> tuple[Box, bool]:
        boxes.append(draw_crop(*arguments)[0])
        return boxes[-1], False

    monkeypatch.setattr(crop_agreement, "draw_crop", record)
    comparison = compare(9, crop="random_resized", scale=(0.25, 0.3), ratio=0.25)
    measure_crop_agreement(**make_inputs(1), comparison=comparison, output=tmp_path / "out.json")
    shares = [box.width * box.height / (SIDE * WIDTH) for box in boxes]
    assert len(shares) == 9 and all(0.24 < share < 0.31 for share in shares)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["smaller_crops"] == 9 and found["smaller_iou"] == pytest.approx(found["iou"])
    assert found["ratio"] == 0.25 and found["chance_iou"] == chance_overlap(16, 0.25)


def test_no_maps_are_a_clear_error(make_inputs: Callable[[int], dict[str, Any]], tmp_path: Path) -> None:
    table = pa.table({"key": ["b"], "similarity": pa.array([None], pa.list_(pa.float16()))})
    write_table(tmp_path / "none.parquet", table, {})
    inputs = {**make_inputs(1), "similarity": [tmp_path / "none.parquet"]}
    with pytest.raises(ValueError, match=r"none of .*none.parquet has a map of a stored clip"):
        measure_crop_agreement(**inputs, comparison=compare(1), output=tmp_path / "out.json")
