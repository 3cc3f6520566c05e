"""Cached-then-cropped maps against maps of the crop, with a CLIP of random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import simplejpeg
import torch
from safetensors.torch import save_file

from stm.config import Similarity
from stm.data.crop_boxes import Box
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
SIDE, CAPTIONS = 64, ["a red circle", "a square"]


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
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One clip of two square frames, with the similarity of a small CLIP on a map of 4 x 4 cells."""
    folder = tmp_path_factory.mktemp("faithfulness")
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (folder / "clip").mkdir()
    save_file(model.state_dict(), folder / "clip" / "open_clip_model.safetensors")
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    settings = Similarity(model=f"local-dir:{folder / 'clip'}", batch_size=16)

    coarse = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    pictures = coarse.repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    with TarWriter(folder / "train-00000.tar") as tar:
        members = [
            tar.add(
                f"a.{t:04d}.jpg", simplejpeg.encode_jpeg(np.ascontiguousarray(p), quality=95, colorsubsampling="444")
            )
            for t, p in enumerate(pictures)
        ]
        stored = [
            simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(p), quality=95, colorsubsampling="444"))
            for p in pictures
        ]
    frames = {
        "key": ["a"], "video_id": ["a"], "path": ["a.mp4"], "status": ["ok"], "policy": ["keep"], "detail": [""],
        "kept": [True], "frames": [2], "width": [SIDE], "height": [SIDE], "source_width": [SIDE],
        "source_height": [SIDE], "pts": [[0.0, 0.5]], "decode_index": [[0, 4]],
        "offsets": [[m.offset for m in members]], "sizes": [[m.size for m in members]],
        "sha256": [[m.sha256 for m in members]],
    }  # fmt: skip
    write_table(folder / "train-00000.parquet", pa.table(frames, schema=FRAMES_SCHEMA), {})
    scorer = PatchScorer(load_clip(settings.model, "float32", "cpu"), 4, 16)
    maps = cosine(scorer.embed_frames(stored), scorer.embed_texts(CAPTIONS))
    similarity = {
        "key": ["a"], "video_id": ["a"], "captions": [CAPTIONS], "frames": [2], "rows": [4], "columns": [4],
        "similarity": pa.array([maps.ravel()], pa.list_(pa.float16())),
    }  # fmt: skip
    write_table(folder / "similarity.parquet", pa.table(similarity), {})
    return {
        "frames_tars": [folder / "train-00000.tar"],
        "frames_indexes": [folder / "train-00000.parquet"],
        "similarity": [folder / "similarity.parquet"],
        "settings": settings,
        "image_size": SIDE,
        "patch_size": SIDE // 4,
        "device": "cpu",
    }


def test_a_crop_of_the_whole_frame_has_the_cached_map_itself(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crop_agreement, "draw_crop", lambda *_: (Box(0, 0, SIDE, SIDE), False))
    measure_crop_agreement(**inputs, output=tmp_path / "out.json", crops=6)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["iou"] == found["low"] == found["high"] == 1
    assert found["correlation"] == pytest.approx(1)


def test_random_crops_agree_beyond_chance_and_the_same_each_time(inputs: dict[str, Any], tmp_path: Path) -> None:
    for name in ("first", "second"):
        measure_crop_agreement(**inputs, output=tmp_path / name, crops=20, seed=4)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    found = json.loads((tmp_path / "first").read_text())
    assert found["crops"] == 20 and found["tokens"] == 16
    assert found["chance_iou"] == chance_overlap(16, 0.6) < found["low"] <= found["iou"] < 1
    assert 0 < found["correlation"] < 1


def test_no_maps_are_a_clear_error(inputs: dict[str, Any], tmp_path: Path) -> None:
    table = pa.table({"key": ["b"], "similarity": pa.array([None], pa.list_(pa.float16()))})
    write_table(tmp_path / "none.parquet", table, {})
    with pytest.raises(ValueError, match=r"none of .*none.parquet has a map of a stored clip"):
        measure_crop_agreement(**{**inputs, "similarity": [tmp_path / "none.parquet"]}, output=tmp_path / "out.json")
