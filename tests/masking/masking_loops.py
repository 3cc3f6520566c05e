"""The strategies once more, slowly: loops over plain numbers, written from their descriptions. Also random guides."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stm.config.strategies import find_strategy, strategy_names

GUIDED = {
    "text_top": "similarity",
    "text_bottom": "similarity",
    "motion": "motion",
    "motion_box": "motion",
    "motion_compensated": "motion_compensated",
    "motion_compensated_box": "motion_compensated",
    "attention": "attention",
    "attention_hidden": "attention",
    "spatiotemporal": "spatiotemporal",
}
NAMES = sorted([*GUIDED, "random", "tube", "flow"])  # those that have a loop here
CELLS = 8  # of the flow strategy's maps, on a token's side


def draw_guides(
    seed: int, slots: int, tokens: int, batch: int = 3, levels: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random guides; with `levels`, scores and noise take only so many values: nearly everything is tied.

    N is a square wherever "flow" is to be used; its frames are two a slot, its cells two on a token's side.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if levels is None:
            return torch.rand(*shape, generator=generator, dtype=dtype)
        return torch.randint(0, levels, shape, generator=generator).to(dtype) / levels

    side, shape = math.isqrt(tokens), (batch, slots, tokens)
    guides = {
        "noise": draw(*shape),
        "similarity": draw(*shape) * 2 - 1,
        "motion": draw(*shape) * 5,
        "motion_compensated": draw(*shape) * 5,
        "attention": draw(*shape) / tokens,
        "spatiotemporal": draw(*shape) * 4 - 2,
        "flow": draw(batch, 2, 2 * slots, 2 * side, 2 * side, 2) * 2 - (0 if levels == 1 else 1),
        "features": torch.nn.functional.normalize(torch.randn(*shape, 8, generator=generator, dtype=dtype), dim=-1),
    }
    # What a strategy that was added later needs.
    needed = sorted({guide for name in strategy_names() for guide in find_strategy(name).needs} - guides.keys())
    return guides | {guide: draw(*shape) for guide in needed}


def hide_by_loops(name: str, guides: dict[str, Tensor], ratio: float) -> list[list[int]]:
    """Kept tokens of each sample, for every strategy but "flow"."""
    noise = guides["noise"]
    batch, slots, tokens = noise.shape
    masked = int(ratio * tokens)
    scores = guides[GUIDED[name]].tolist() if name in GUIDED else torch.zeros_like(noise).tolist()
    draws = (noise[:, :1].expand_as(noise) if name == "tube" else noise).tolist()
    keep = SLOTS.get(name, keep_lowest)
    return [
        [slot * tokens + token for slot in range(slots) for token in keep(scores[b][slot], draws[b][slot], masked)]
        for b in range(batch)
    ]


def keep_lowest(score: list[float], noise: list[float], masked: int) -> list[int]:
    """Of one slot: the tokens of the lowest score, by sorting tuples."""
    rows = sorted(zip(score, noise, range(len(score)), strict=True))
    return sorted(token for _, _, token in rows[: len(score) - masked])


def keep_highest(score: list[float], noise: list[float], masked: int) -> list[int]:
    return keep_lowest([-value for value in score], noise, masked)


def keep_outside_box(motion: list[float], noise: list[float], masked: int) -> list[int]:
    """Of one slot: tries every size of box, then every place of it."""
    side = math.isqrt(len(motion))
    sizes = [
        (h * w, h, w)
        for h in range(1, side + 1)
        for w in range(h, side + 1)
        if h * w <= masked and 2 * w <= 3 * h  # at most half as wide again as tall
    ]
    inside: set[int] = set()
    if sizes:
        _, height, width = max(sizes)  # the largest; of those as large the tallest, which is the squarer
        places = []
        for top in range(side - height + 1):
            for left in range(side - width + 1):
                box = [(top + y) * side + left + x for y in range(height) for x in range(width)]
                places.append((math.fsum(motion[token] for token in box), noise[box[0]], box))
        inside = set(max(places)[2])
    rows = sorted((token in inside, motion[token], noise[token], token) for token in range(len(motion)))
    return sorted(row[-1] for row in rows[: len(motion) - masked])


def keep_drawn(weight: list[float], noise: list[float], masked: int) -> list[int]:
    """Of one slot: the tokens whose exponential time, by the inverse of its distribution function, is the shortest."""
    times = [-math.log1p(-u) / w if w > 0 else math.inf for w, u in zip(weight, noise, strict=True)]
    return keep_lowest(times, noise, masked)


SLOTS: dict[str, Callable[[list[float], list[float], int], list[int]]] = {
    "text_bottom": keep_highest,
    "motion_box": keep_outside_box,
    "motion_compensated_box": keep_outside_box,
    "attention": keep_drawn,
}


def flow_scores(noise: Tensor, flow: Tensor, ratio: float, cells: int = CELLS) -> np.ndarray:
    """The score of each token by which MGMAE ranks them, float64 [B, slots, N]; clip by clip, frame by frame."""
    return np.stack([_clip_scores(n, f, ratio, cells) for n, f in zip(noise.numpy(), flow.numpy(), strict=True)])


def _clip_scores(noise: np.ndarray, flow: np.ndarray, ratio: float, cells: int) -> np.ndarray:
    slots, tokens = noise.shape
    side, frames = math.isqrt(tokens), flow.shape[1]
    base, width = frames // 2, side * cells
    seeds = np.argsort(noise[base * slots // frames], kind="stable")[: tokens - int(ratio * tokens)]
    y, x = (np.indices((width, width)) + 0.5) / cells
    start = np.max([np.exp(-((x - s % side - 0.5) ** 2) - (y - s // side - 0.5) ** 2) for s in seeds], axis=0)
    maps: dict[int, np.ndarray] = {base: start}
    for t in range(base - 1, -1, -1):  # from t to the frame after it, which is known
        maps[t] = _warp(maps[t + 1], _enlarge(flow[0, t], width) * cells, start)
    for t in range(base + 1, frames):  # from t to the frame before it
        maps[t] = _warp(maps[t - 1], _enlarge(flow[1, t], width) * cells, start)
    volume = np.stack([maps[t] for t in range(frames)])
    parts = volume.reshape(slots, frames // slots, side, cells, side, cells)
    return parts.sum(axis=(1, 3, 5)).reshape(slots, tokens)


def _enlarge(field: np.ndarray, width: int) -> np.ndarray:
    """Linear interpolation between the centres of cells, [R, R, 2] -> [width, width, 2]; constant beyond the outer ones."""
    # In new cells, where both are exact: whether a place is just outside of the frame may hang on the last bit.
    old, new = (np.arange(field.shape[0]) + 0.5) * (width / field.shape[0]), np.arange(width) + 0.5
    rows = np.apply_along_axis(lambda column: np.interp(new, old, column), 0, field)
    return np.apply_along_axis(lambda row: np.interp(new, old, row), 1, rows)


def _warp(known: np.ndarray, step: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Backward warping by the sum of four corners; nothing lies outside of the frame."""
    width = known.shape[0]
    row, column = np.indices((width, width))
    x, y = column + step[..., 0], row + step[..., 1]
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    result = np.zeros_like(known)
    for corner_y in (top, top + 1):
        for corner_x in (left, left + 1):
            weight = (1 - abs(x - corner_x)) * (1 - abs(y - corner_y))
            within = (corner_x >= 0) & (corner_x < width) & (corner_y >= 0) & (corner_y < width)
            values = known[corner_y.clip(0, width - 1), corner_x.clip(0, width - 1)]
            result += np.where(within, weight * values, 0)
    return np.where(result == 0, start, result)
