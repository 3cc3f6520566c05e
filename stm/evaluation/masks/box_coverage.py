"""Coverage of the named object by masks: the ground-truth box of moving-shapes against the masks of each guide.

Masks are computed from the full frame's map, separately for each stored frame, with the strategies used in training.
Coverage is the share of the box's AREA that hidden cells cover, including fractions of cells. A mask that is
independent of the content covers, on average, the share of cells that it hides; this share is `chance`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stm.config import MaskQuality
from stm.data.dataset import make_generator
from stm.jobs.progress import Progress
from stm.masking import count_masked, get_strategy, to_boolean
from stm.storage.files import write_json
from stm.storage.receipts import make_receipt
from stm.storage.tables import read_table, stream_rows

Map = NDArray[np.float32]
Shares = NDArray[np.float64]

# Guide name in the report -> the strategy, and the guide that the strategy reads. "random" is the baseline.
GUIDES = {
    "text_top": ("text_top", "similarity"),
    "motion": ("motion", "motion"),
    "motion_minus_camera": ("motion", "motion"),
    "random": ("random", "noise"),
}


@dataclass(frozen=True)
class TrueClip:
    """The ground truth of one clip."""

    camera: str
    boxes: Shares  # [stored frames, 4]: left, top, right, bottom as shares of the frame's sides


def share_in_cells(boxes: Shares, rows: int, columns: int) -> Shares:
    """Share of each box's area in each cell of its frame's map.

    Args:
        boxes: float64 [T, 4]: left, top, right, bottom as shares of the frame's width and height.

    Returns:
        float64 [T, rows * columns]; the cells of a frame sum to 1, or to 0 if the box has no area (the object is out of
        view).
    """
    across = _share_along(boxes[:, 0], boxes[:, 2], columns)
    down = _share_along(boxes[:, 1], boxes[:, 3], rows)
    return (down[:, :, None] * across[:, None, :]).reshape(len(boxes), -1)


def _share_along(low: Shares, high: Shares, cells: int) -> Shares:
    """Share of each interval, with bounds [T] in [0, 1], in each of `cells` equal parts of [0, 1]: [T, cells]."""
    edges = np.arange(cells + 1) / cells
    overlap = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    length = (high - low)[:, None]
    return np.divide(overlap.clip(0), length, out=np.zeros_like(overlap), where=length > 0)


def subtract_camera(vectors: NDArray[np.floating]) -> Map:
    """Magnitude of each cell's vector minus the frame's median vector: [T, R, C, 2] -> float32 [T, R, C].

    Most cells show background, so the median estimates the camera motion.
    """
    vectors = vectors.astype(np.float32)  # the difference would lose precision in the packed float16
    return np.linalg.norm(vectors - np.median(vectors, axis=(1, 2), keepdims=True), axis=-1)


def measure_coverage(guide: str, scores: Map, clip: TrueClip, ratio: float, key: str) -> tuple[float, float] | None:
    """The coverage of a clip's box by one guide's masks, and the chance level.

    Args:
        guide: a key of `GUIDES`.
        scores: float32 [K, T, R, C]: K maps of the clip (one per caption), over which the result is averaged.
        ratio: mask ratio in each frame.
        key: the clip's key, which seeds the noise that breaks ties.

    Returns:
        Means over the frames that show the object; None if no frame does.

    Raises:
        ValueError: the numbers of map frames and stored frames differ.
    """
    captions, frames, rows, columns = scores.shape
    if frames != len(clip.boxes):
        raise ValueError(
            f"clip {key!r}: the map has {frames} frames, and {len(clip.boxes)} are stored; they come from different runs"
        )
    cells = rows * columns
    strategy, reads = GUIDES[guide]
    noise = make_generator(0, 0, key, 0).random((captions, frames, cells), dtype=np.float32)
    maps = {"noise": torch.from_numpy(noise)}
    if reads != "noise":
        maps[reads] = torch.from_numpy(scores.reshape(captions, frames, cells))
    hidden = to_boolean(get_strategy(strategy)(maps, ratio), frames, cells).numpy()
    shares = share_in_cells(clip.boxes, rows, columns)
    in_view = shares.sum(1) > 0
    if not in_view.any():
        return None
    coverage = (hidden[:, in_view] * shares[in_view]).sum(2).mean()
    # Use the rounded number of hidden cells instead of the ratio: a random mask hides exactly that many.
    return float(coverage), count_masked(cells, ratio) / cells


def measure_mask_quality(
    frames_indexes: Sequence[Path],
    similarity: Mapping[str, Sequence[Path]],
    motion: Sequence[Path],
    truth: Path,
    settings: MaskQuality,
    output: Path,
) -> None:
    """Measures how much of the named object each guide's masks hide, and writes the result as JSON.

    Every guide is measured at the text ratio and at the motion ratio, so that guides can be compared at the same ratio.
    `motion_minus_camera` is `motion` after subtracting each frame's median vector.

    Args:
        frames_indexes: `frames/{shard}.parquet` of the held-out shards.
        similarity: caption source -> `similarity/{source}/{shard}.parquet` of these shards.
        motion: `motion/{shard}.parquet` of these shards; may be empty.
        truth: `generated/truth.parquet`.
        settings: split and ratios.
        output: JSON file: {"split", "receipt", "rows": [{"guide", "source" (caption source or null), "camera"
            ("fixed" or "moving"), "ratio", "coverage" (mean share of the box's area that is hidden), "low",
            "high" (its 95 % interval, bootstrap over clips), "clips", "chance" (share of cells that is
            hidden)}]}.

    Raises:
        ValueError: no clip of the split has both a box and a map, or the files belong to different datasets.
    """
    clips = read_truth(frames_indexes, truth, settings.split)
    # Use a set, because the two ratios may be equal.
    ratios = sorted({settings.text_ratio, settings.motion_ratio})
    measurements: dict[tuple[str, str, str, float], list[tuple[float, float]]] = defaultdict(list)
    with Progress("mask quality", len(clips) * (len(similarity) + bool(motion)), "clips") as progress:
        for key, source, guides in _read_maps(similarity, motion):
            if key not in clips:
                continue
            for guide, scores in guides.items():
                for ratio in ratios:
                    measured = measure_coverage(guide, scores, clips[key], ratio, key)
                    if measured is not None:
                        measurements[guide, source, clips[key].camera, ratio].append(measured)
            progress.advance()
    if not measurements:
        raise ValueError(
            f"mask quality: none of the {len(clips)} clips of split {settings.split!r} in {truth} has a similarity or "
            "motion map; give the maps of that split's shards"
        )
    rows = [_make_row(*group, measurements[group]) for group in sorted(measurements, key=_order)]
    receipt = make_receipt("mask_quality", settings, ("numpy", "torch"), sources=list(similarity))
    write_json(output, {"split": settings.split, "rows": rows, "receipt": receipt})


def read_truth(frames_indexes: Sequence[Path], truth: Path, split: str) -> dict[str, TrueClip]:
    """The ground truth of a split's kept clips by key, with the named object's box in each stored frame.

    Raises:
        ValueError: a stored frame has no box: truth and frames come from different videos.
    """
    truths = {row["video_id"]: row for row in read_table(truth).to_pylist() if row["split"] == split}
    clips = {}
    for index in frames_indexes:
        for row in read_table(index, ("key", "video_id", "kept", "decode_index")).to_pylist():
            if row["kept"] and row["video_id"] in truths:
                true = truths[row["video_id"]]
                boxes = np.array(true["boxes"], dtype=np.float64).reshape(-1, 4)
                if max(row["decode_index"]) >= len(boxes):
                    raise ValueError(
                        f"{truth}: clip {row['video_id']!r} has boxes for {len(boxes)} frames, and {index} stores its "
                        f"frame {max(row['decode_index'])}; they come from different videos"
                    )
                # Store boxes as shares of the frame's sides: the stored frames may be smaller than the generated ones.
                size = np.array([true["width"], true["height"]] * 2)
                clips[row["key"]] = TrueClip(true["camera"], boxes[row["decode_index"]] / size)
    return clips


def _read_maps(
    similarity: Mapping[str, Sequence[Path]], motion: Sequence[Path]
) -> Iterator[tuple[str, str, dict[str, Map]]]:
    """Yields, for each clip and source, the key, the caption source ("" for none) and the maps [K, T, R, C] by guide."""
    controlled: set[str] = set()  # clips whose random masks are already measured: once per clip, whatever its maps

    def with_control(row: Mapping[str, Any], guides: dict[str, Map]) -> dict[str, Map]:
        if row["key"] not in controlled:
            guides["random"] = np.zeros((1, row["frames"], row["rows"], row["columns"]), np.float32)
            controlled.add(row["key"])
        return guides

    for path in motion:
        for row in stream_rows(path, ("magnitude", "vector")):
            if row["magnitude"] is not None:
                yield row["key"], "", with_control(row, _motion_maps(row))
    for source, paths in similarity.items():
        for path in paths:
            for row in stream_rows(path, ("similarity",)):
                if row["similarity"] is not None:
                    shape = (-1, row["frames"], row["rows"], row["columns"])
                    yield row["key"], source, {"text_top": row["similarity"].astype(np.float32).reshape(shape)}
                    if row["key"] not in controlled:  # a clip without a motion map
                        yield row["key"], "", with_control(row, {})


def _motion_maps(row: Mapping[str, Any]) -> dict[str, Map]:
    shape = (row["frames"], row["rows"], row["columns"])
    maps = {"motion": row["magnitude"].astype(np.float32).reshape(1, *shape)}
    if row["vector"] is not None:
        maps["motion_minus_camera"] = subtract_camera(row["vector"].reshape(*shape, 2))[None]
    return maps


def _order(group: tuple[str, str, str, float]) -> tuple[int, str, float, str]:
    guide, source, camera, ratio = group
    return list(GUIDES).index(guide), source, ratio, camera


def _make_row(
    guide: str, source: str, camera: str, ratio: float, measured: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    coverage, chance = np.array(measured).T
    low, high = bootstrap_interval(coverage)
    return {
        "guide": guide,
        "source": source or None,
        "camera": camera,
        "ratio": ratio,
        "coverage": float(coverage.mean()),
        "low": low,
        "high": high,
        "clips": len(coverage),
        "chance": float(chance.mean()),
    }


def bootstrap_interval(values: NDArray[np.floating], draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` [n], with a fixed seed."""
    resamples = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[resamples].mean(1), [2.5, 97.5])
    return float(low), float(high)
