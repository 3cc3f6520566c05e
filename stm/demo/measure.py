"""Metrics of the demo's small models on frames from held-out clips."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from torch import Tensor
from torch.nn import functional

from stm.demo.frames import NAMED, NOTHING, OTHER, Frame, describes

GRID = 8  # cells along the short side, as in config/demo.yaml
RATIO = 0.6  # ratio of TGM's text-guided mask (Figure 3a)

Map = npt.NDArray[np.float64]
Tokenize = Callable[..., Tensor]


def grid_of(frame: Frame) -> tuple[int, int]:
    """The numbers of rows and columns of a frame's map; cells are square."""
    height, width = frame.labels.shape
    return round(GRID * height / min(height, width)), round(GRID * width / min(height, width))


@torch.no_grad()
def similarity_map(model: open_clip.CLIP, tokenize: Tokenize, frame: Frame, text: str) -> Map:
    """[rows, columns]: cosine similarity between a text and each cell, resized separately to the model's input size."""
    rows, columns = grid_of(frame)
    cell_height, cell_width = frame.labels.shape[0] // rows, frame.labels.shape[1] // columns
    pixels = torch.from_numpy(frame.pixels).permute(2, 0, 1).float()
    patches = (
        pixels.unfold(1, cell_height, cell_height)
        .unfold(2, cell_width, cell_width)
        .permute(1, 2, 0, 3, 4)
        .flatten(0, 1)
    )
    patches = functional.interpolate(patches, size=model.visual.image_size, mode="bicubic", antialias=True)
    image = model.encode_image(patches.clamp(0, 255).div(127.5).sub(1), normalize=True)
    scores = image @ model.encode_text(tokenize([text]), normalize=True).T
    return np.asarray(scores.view(rows, columns).double().numpy())


def share_of(frame: Frame, values: npt.NDArray[np.bool_]) -> Map:
    """[rows, columns]: the fraction of each cell's pixels where `values` [H, W] is true."""
    rows, columns = grid_of(frame)
    return np.asarray(values.reshape(rows, values.shape[0] // rows, columns, -1).mean(axis=(1, 3)), np.float64)


def box_cover(frame: Frame) -> Map:
    """[rows, columns]: the intersection area, in pixels, of each cell and the named object's box."""
    rows, columns = grid_of(frame)
    height, width = frame.labels.shape
    x0, y0, x1, y1 = (float(v) for v in frame.box)
    xs, ys = np.arange(columns + 1) * width / columns, np.arange(rows + 1) * height / rows
    widths = np.clip(np.minimum(x1, xs[1:]) - np.maximum(x0, xs[:-1]), 0, None)
    heights = np.clip(np.minimum(y1, ys[1:]) - np.maximum(y0, ys[:-1]), 0, None)
    return np.asarray(heights[:, None] * widths)


def coverage(scores: Map, weight: Map) -> float:
    """The fraction of `weight` in the `int(RATIO * cells)` cells with the highest scores."""
    # A stable sort, as in the masking strategies, so that ties are broken in the same way everywhere.
    top = np.argsort(-scores.ravel(), kind="stable")[: int(RATIO * scores.size)]
    return float(weight.ravel()[top].sum() / weight.sum())


def auc(positive: Map, negative: Map) -> float:
    """Area under the ROC curve: the probability that a positive scores higher than a negative; ties count as half."""
    greater, equal = positive[:, None] > negative, positive[:, None] == negative
    return float((greater + 0.5 * equal).mean())


def measure_clip(
    model: open_clip.CLIP, tokenize: Tokenize, frames: Sequence[Frame], text_of: Callable[[Frame], str]
) -> dict[str, float]:
    """The metrics of `measure_map`, averaged over the similarity maps of `frames` with the texts `text_of(frame)`."""
    return average([measure_map(similarity_map(model, tokenize, f, text_of(f)), f) for f in frames])


def measure_ceiling(frames: Sequence[Frame], seed: int = 0) -> dict[str, float]:
    """The same metrics for ideal scores: the fraction of each cell covered by the named object; random ties."""
    rng = np.random.default_rng(seed)
    rows = []
    for frame in frames:
        truth = share_of(frame, frame.labels == NAMED)
        rows.append(measure_map(truth + 1e-6 * rng.random(truth.shape), frame))
    return average(rows)


def measure_map(scores: Map, frame: Frame) -> dict[str, float]:
    """Coverage of the box and of the object's pixels, and AUCs, for one frame's map; undefined AUCs are omitted."""
    box_area, named = box_cover(frame), share_of(frame, frame.labels == NAMED)
    covered = coverage(scores, box_area)
    row = {
        "coverage": covered,
        "coverage_moving" if frame.moving_camera else "coverage_fixed": covered,
        "pixels": coverage(scores, named),
    }
    # A positive cell has at least half of its area inside the box; a negative cell overlaps neither box nor object.
    inside, outside = box_area >= frame.labels.size / scores.size / 2, (box_area == 0) & (named == 0)
    negatives = {
        "auc": outside,
        "auc_background": outside & (share_of(frame, frame.labels != NOTHING) == 0),
        "auc_distractors": outside & (share_of(frame, frame.labels >= OTHER) >= 0.25),
    }
    row |= {name: auc(scores[inside], scores[o]) for name, o in negatives.items() if inside.any() and o.any()}
    return row


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each key over the rows that contain it, and the 5 % quantile of `coverage` as `coverage_low`."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            values[name].append(value)
    means = {name: float(np.mean(v)) for name, v in values.items()}
    return {**means, "coverage_low": float(np.quantile(values["coverage"], 0.05))}


def measure_captions(captions: Sequence[str], frames: Sequence[Frame]) -> dict[str, float]:
    """The fractions of correct captions.

    `named`: exact match with the caption of the named object. `some_object`: exact match with the caption of any
    visible object, because only size and position distinguish the named object from others. `alone`: exact match in
    frames where no other object is visible. `color`, `texture`, `shape`: that attribute is correct, in the same frames.
    `background`: the background is correct, in all frames.
    """
    pairs = list(zip(captions, frames, strict=True))
    alone = [(caption, frame) for caption, frame in pairs if not (frame.labels >= OTHER).any()]
    result = {
        "named": np.mean([caption == frame.appearance for caption, frame in pairs]),
        "some_object": np.mean([describes(caption, frame) for caption, frame in pairs]),
        "background": np.mean([f"{frame.background} background" in caption for caption, frame in pairs]),
    }
    if alone:
        result["alone"] = np.mean([caption == frame.appearance for caption, frame in alone])
        for i, word in enumerate(("color", "texture", "shape")):
            result[word] = np.mean([frame.named[i] in caption.split() for caption, frame in alone])
    return {name: float(value) for name, value in result.items()}
