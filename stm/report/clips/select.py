"""Select the clips that the page shows, with the ground-truth boxes of the object that their caption names."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stm.config import Config
from stm.layout import Layout
from stm.manifest import split_of
from stm.storage.tables import read_table


@dataclass(frozen=True)
class ReportClip:
    """A packed clip, with its camera type and boxes if the dataset has ground truth."""

    key: str
    video_id: str
    split: str
    label: str
    captions: list[str]
    frames: int  # number of stored frames
    size: tuple[int, int]  # width and height of the stored frames, pixels
    index: Path  # index of the clip's shard
    camera: str = ""
    boxes: NDArray[np.float64] | None = None  # [frames, 4], as fractions of the frame


def choose_clips(config: Config, layout: Layout, shards: Sequence[str], count: int | None = None) -> list[ReportClip]:
    """Choose packed clips of one split, alternating between camera types and between labels.

    Args:
        config: the config of the dataset.
        layout: the layout of the dataset.
        shards: names of the dataset's shards.
        count: maximum number of clips; `config.report.clips` by default. Fewer are returned if the split has fewer.
    """
    count = config.report.clips if count is None else count
    split = choose_split(config, layout, shards)
    candidates: list[ReportClip] = []
    for shard in shards:
        # A few shards contain enough camera types and labels; a large dataset has thousands of shards.
        if split_of(shard) == split and layout.shard(shard).exists() and len(candidates) < 8 * count:
            candidates += _with_truth(layout, shard, _read_index(layout.shard(shard)))
    cameras = sorted({clip.camera for clip in candidates})
    groups = [_labels_in_turn([c for c in candidates if c.camera == camera]) for camera in cameras]
    turns = (clip for turn in zip_longest(*groups) for clip in turn if clip is not None)
    return list(islice(turns, count))


def choose_split(config: Config, layout: Layout, shards: Iterable[str]) -> str | None:
    """Return the config's split if it has packed clips, else the alphabetically first split that does, else None."""
    indexes = {shard: layout.shard(shard) for shard in shards}
    packed = [split_of(s) for s, index in indexes.items() if index.exists() and read_table(index, ["key"]).num_rows]
    return config.report.split if config.report.split in packed else min(packed, default=None)


def _read_index(index: Path) -> list[ReportClip]:
    columns = ["key", "video_id", "split", "label", "captions", "frames", "width", "height"]
    return [
        ReportClip(
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


def _labels_in_turn(clips: list[ReportClip]) -> list[ReportClip]:
    """Interleave the labels: the first clip of each label, then the second of each, and so on."""
    per_label: Counter[str] = Counter()
    ranked = []
    for clip in clips:
        per_label[clip.label] += 1
        ranked.append((per_label[clip.label], clip.label, clip.key, clip))
    return [entry[-1] for entry in sorted(ranked, key=lambda entry: entry[:3])]


def _with_truth(layout: Layout, shard: str, clips: list[ReportClip]) -> list[ReportClip]:
    """Add the camera type and boxes to the clips of a dataset with ground truth."""
    path = layout.generated / "truth.parquet"
    if not path.exists() or not layout.frames(shard).exists():
        return clips
    columns = ["video_id", "camera", "boxes", "width", "height"]
    truth = {row["video_id"]: row for row in read_table(path, columns).to_pylist()}
    decoded = read_table(layout.frames(shard), ["video_id", "decode_index"]).to_pylist()
    indexes = {row["video_id"]: row["decode_index"] for row in decoded}
    return [
        replace(clip, camera=truth[clip.video_id]["camera"], boxes=_boxes(truth[clip.video_id], indexes[clip.video_id]))
        if clip.video_id in truth and indexes.get(clip.video_id)
        else clip
        for clip in clips
    ]


def _boxes(row: Mapping[str, Any], decode_index: list[int]) -> NDArray[np.float64]:
    """Boxes of the stored frames, float64 [frames, 4], as fractions of the frame; NaN past the last annotated frame."""
    boxes = np.array(row["boxes"], dtype=np.float64).reshape(-1, 4)
    shares = boxes / np.tile([row["width"], row["height"]], 2)
    padded = np.concatenate([shares, np.full((1, 4), np.nan)])
    return padded[np.minimum(np.array(decode_index), len(boxes))]
