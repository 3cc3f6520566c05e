"""Agreement between masks from cached, cropped maps and masks from maps computed on the crop.

Similarity is computed once, on the full frame's cells, and resampled to the tokens of each crop. The paper (TGM)
instead scores the patches of the crop. This module computes both for random crops and compares the resulting
text-guided masks.
"""

from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stm.config import Augmentation, CropComparison, Similarity
from stm.data.crop_boxes import Box, draw_crop
from stm.data.dataset import cut_frames, make_generator
from stm.data.guides.crop import crop_map
from stm.evaluation.masks.box_coverage import bootstrap_interval
from stm.jobs.progress import Progress
from stm.masking import count_masked, get_strategy, to_boolean
from stm.preprocess.frames.extract import read_kept
from stm.preprocess.frames.table import load_frame
from stm.preprocess.similarity.patch_scorer import PatchScorer, cosine
from stm.pretrained.clip import load_clip
from stm.storage.files import write_json
from stm.storage.receipts import make_receipt
from stm.storage.tables import stream_rows

Map = NDArray[np.float32]

# Crops below this share of the largest square are also averaged separately: the others are nearly the frame itself.
SMALLER = 0.85


def overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of the same shape."""
    return float((first & second).sum() / (first | second).sum())


def chance_overlap(tokens: int, ratio: float) -> float:
    """The expected intersection over union of two independent masks that hide `int(ratio * tokens)` tokens each.

    The intersection k of two random m-subsets is hypergeometric, and their union has 2 m - k elements.
    """
    hidden = count_masked(tokens, ratio)
    ways = comb(tokens, hidden)
    shared = range(max(0, 2 * hidden - tokens), hidden + 1)
    return sum(comb(hidden, k) * comb(tokens - hidden, hidden - k) / ways * k / (2 * hidden - k) for k in shared)


def mask_by_text(scores: Map, noise: Map, ratio: float) -> NDArray[np.bool_]:
    """The tokens of one frame hidden by `text_top`: scores and noise [side, side] -> bool [side * side]."""
    guides = {
        "similarity": torch.from_numpy(scores.reshape(1, 1, -1)),
        "noise": torch.from_numpy(noise.reshape(1, 1, -1)),
    }
    return to_boolean(get_strategy("text_top")(guides, ratio), 1, scores.size).numpy().reshape(-1)


def measure_crop_agreement(
    frames_tars: Sequence[Path],
    frames_indexes: Sequence[Path],
    similarity: Sequence[Path],
    settings: Similarity,
    comparison: CropComparison,
    output: Path,
    *,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Compares text-guided masks from cached-then-cropped maps with those from maps computed on the crop.

    Args:
        frames_tars: `frames/{shard}.tar`, one per entry of `frames_indexes` and `similarity`, in the same order.
        similarity: `similarity/{source}/{shard}.parquet` of one caption source, computed with `settings`.
        comparison: number and kind of the crops, each of a random frame and caption of a random clip; tokens and ratio.
        output: JSON file: {"iou" (mean), "low", "high" (95 %, bootstrap over crops), "chance_iou", "correlation"
            (mean Pearson correlation of the two maps), "smaller_iou" (mean over the crops of less than 0.85 of the largest
            square; null if there are none), "smaller_crops", "crops", "tokens", "ratio", "window", "receipt"}.

    Raises:
        ValueError: no clip has a similarity map.
    """
    side, ratio = comparison.image_size // comparison.patch_size, comparison.ratio
    # Crops are scored one at a time, so a larger batch would be mostly padding.
    batch = min(settings.batch_size, side * side)
    scorer = PatchScorer(load_clip(settings.model, settings.precision, device), side, batch)
    samples = _sample_crops(frames_tars, frames_indexes, similarity, comparison, seed)
    overlaps, correlations, areas = [], [], []
    with Progress("crop_agreement", comparison.crops, "crops") as progress:
        for frame, caption, cached, box, noise_key in samples:
            size = (frame.shape[1], frame.shape[0])
            resampled = crop_map(cached, size, box, side, False, settings.window)
            computed = _score_crop(scorer, frame, box, comparison.image_size, caption)
            # Use the same noise for both masks: otherwise ties would count as disagreement.
            noise = make_generator(seed, 0, noise_key, 0).random((side, side), dtype=np.float32)
            overlaps.append(overlap(*(mask_by_text(m, noise, ratio) for m in (resampled, computed))))
            correlations.append(_correlate(resampled, computed))
            areas.append(box.width * box.height / min(size) ** 2)
            progress.advance()
    low, high = bootstrap_interval(np.array(overlaps))
    smaller = [iou for iou, area in zip(overlaps, areas, strict=True) if area < SMALLER]
    identity = scorer.clip.identity
    used = settings.fingerprint() | {"model": identity["model"]}
    receipt = make_receipt("crop_agreement", used, ("torch", "open_clip_torch"), model=identity, seed=seed)
    receipt |= {"comparison": comparison.fingerprint(), "source": similarity[0].parent.name}
    write_json(
        output,
        {
            "iou": float(np.mean(overlaps)),
            "low": low,
            "high": high,
            "chance_iou": chance_overlap(side * side, ratio),
            "correlation": float(np.mean(correlations)),
            "smaller_iou": float(np.mean(smaller)) if smaller else None,
            "smaller_crops": len(smaller),
            "crops": len(overlaps),
            "tokens": side * side,
            "ratio": ratio,
            "window": settings.window,
            "receipt": receipt,
        },
    )


def _sample_crops(
    tars: Sequence[Path], indexes: Sequence[Path], similarity: Sequence[Path], comparison: CropComparison, seed: int
) -> list[tuple[NDArray[np.uint8], str, Map, Box, str]]:
    """For each crop, the frame, the caption, their cached map [R, C], the crop box and the key of the noise."""
    frames = {row["key"]: (tar, row) for tar, index in zip(tars, indexes, strict=True) for row in read_kept(index)}
    # Sorted, so that the sampled crops do not depend on how clips are assigned to shards.
    usable = sorted(
        row["key"]
        for path in similarity
        for row in stream_rows(path, ("similarity",))
        if row["similarity"] is not None and row["key"] in frames
    )
    if not usable:
        raise ValueError(f"crop_agreement: none of {', '.join(map(str, similarity))} has a map of a stored clip")
    chosen: dict[str, list[int]] = {}
    for number, index in enumerate(np.random.default_rng(seed).integers(len(usable), size=comparison.crops)):
        chosen.setdefault(usable[index], []).append(number)
    samples = []
    # Read the tables a second time, so that only the maps of sampled clips are held in memory.
    for path in similarity:
        for row in stream_rows(path, ("similarity",)):
            for number in chosen.get(row["key"], []):
                tar, stored = frames[row["key"]]
                samples.append(_sample_crop(tar, stored, row, f"{row['key']}/{number}", comparison, seed))
    return samples


def _sample_crop(
    tar: Path, stored: Mapping[str, Any], row: Mapping[str, Any], name: str, comparison: CropComparison, seed: int
) -> tuple[NDArray[np.uint8], str, Map, Box, str]:
    generator = make_generator(seed, 1, name, 0)
    caption, frame = int(generator.integers(len(row["captions"]))), int(generator.integers(row["frames"]))
    augmentation = Augmentation(crop=comparison.crop, scale=comparison.scale)
    maps = row["similarity"].reshape(-1, row["frames"], row["rows"], row["columns"])
    box, _ = draw_crop(generator, augmentation, stored["width"], stored["height"])
    cached = maps[caption, frame].astype(np.float32)
    return load_frame(tar, stored, frame), row["captions"][caption], cached, box, name


def _score_crop(scorer: PatchScorer, frame: NDArray[np.uint8], box: Box, image_size: int, caption: str) -> Map:
    """Similarity of each token of the resized crop, [side, side]."""
    crop = np.ascontiguousarray(cut_frames([frame], box, image_size, False)[0].transpose(1, 2, 0))
    similarity = cosine(scorer.embed_frames([crop]), scorer.embed_texts([caption]))
    return similarity[0, 0].astype(np.float32)


def _correlate(first: Map, second: Map) -> float:
    """Pearson correlation; 0 if either map is constant."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first.reshape(-1), second.reshape(-1))[0, 1])
