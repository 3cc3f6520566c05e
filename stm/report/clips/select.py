"""Which clips the page shows, and where their named object truly is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stm.config import Config
from stm.layout import Layout
from stm.manifest import split_of
from stm.report.results.records import Results
from stm.storage.tables import read_table


@dataclass(frozen=True)
class Chosen:
    """A clip of a shard's index, with what the truth says about it."""

    key: str
    video_id: str
    split: str
    label: str
    captions: list[str]
    frames: int  # stored
    size: tuple[int, int]  # width and height, stored pixels
    index: Path  # of its shard
    camera: str = ""
    boxes: NDArray[np.float64] | None = None  # [frames, 4], shares of the whole frame


def choose_clips(config: Config, layout: Layout, results: Results) -> list[Chosen]:
    """Up to `config.report.clips` packed clips, kinds of camera in turn, each with another label while they last."""
    split = choose_split(config, layout, results.shards)
    candidates: list[Chosen] = []
    for shard in results.shards:
        if split_of(shard) == split and layout.shard(shard).exists() and len(candidates) < 8 * config.report.clips:
            candidates += _with_truth(layout, shard, _read_index(layout.shard(shard)))
    cameras = sorted({clip.camera for clip in candidates})
    groups = [_labels_in_turn([c for c in candidates if c.camera == camera]) for camera in cameras]
    turns = (clip for turn in zip_longest(*groups) for clip in turn if clip is not None)
    return [clip for clip, _ in zip(turns, range(config.report.clips), strict=False)]


def choose_split(config: Config, layout: Layout, shards: Iterable[str]) -> str | None:
    """The config's split, or the first one that has packed clips."""
    packed = [split_of(s) for s in shards if layout.shard(s).exists() and _count(layout.shard(s))]
    return config.report.split if config.report.split in packed else min(packed, default=None)


def _count(index: Path) -> int:
    return read_table(index, ["key"]).num_rows


def _read_index(index: Path) -> list[Chosen]:
    columns = ["key", "video_id", "split", "label", "captions", "frames", "width", "height"]
    return [
        Chosen(
            key=row["key"],
            video_id=row["video_id"],
            split=row["split"],
            label=row["label"] or "",
            captions=list(row["captions"] or []),
            frames=row["frames"],
            size=(row["width"], row["height"]),
            index=index,
        )
        for row in read_table(index, columns).to_pylist()
    ]


def _labels_in_turn(clips: list[Chosen]) -> list[Chosen]:
    """The first clip of each label, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for clip in clips:
        seen[clip.label] = seen.get(clip.label, 0) + 1
        ranked.append((seen[clip.label], clip.label, clip.key, clip))
    return [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:3])]


def _with_truth(layout: Layout, shard: str, clips: list[Chosen]) -> list[Chosen]:
    """Adds camera and boxes where the dataset knows them."""
    path = layout.generated / "truth.parquet"
    if not path.exists() or not layout.frames(shard).exists():
        return clips
    truth = {row["video_id"]: row for row in read_table(path, _TRUTH).to_pylist()}
    decoded = read_table(layout.frames(shard), ["video_id", "decode_index"]).to_pylist()
    indexes = {row["video_id"]: row["decode_index"] for row in decoded}
    return [
        replace(clip, camera=truth[clip.video_id]["camera"], boxes=_boxes(truth[clip.video_id], indexes[clip.video_id]))
        if clip.video_id in truth and indexes.get(clip.video_id)
        else clip
        for clip in clips
    ]


_TRUTH = ["video_id", "camera", "boxes", "width", "height"]


def _boxes(row: Mapping[str, Any], decode_index: list[int]) -> NDArray[np.float64]:
    """Boxes of the stored frames, float64 [frames, 4], as shares of the frame; NaN where the truth has no such frame."""
    boxes = np.array(row["boxes"], dtype=np.float64).reshape(-1, 4)
    shares = boxes / np.tile([row["width"], row["height"]], 2)
    padded = np.concatenate([shares, np.full((1, 4), np.nan)])
    return padded[np.minimum(np.array(decode_index), len(boxes))]
