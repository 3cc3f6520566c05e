"""ClusterSTM's mask once more, slowly: loops over plain numbers, frame by frame and token by token. Also random clips.

Distances and densities are rounded to float32 once they are exact, as the code does; nothing else is shared with it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stm.config import Cluster

Vectors = list[list[float]]  # of a frame


class Looped(NamedTuple):
    """What the loops find of a clip; a list of frames each."""

    density: list[list[float]]
    labels: list[list[int]]
    centres: list[list[int]]
    temporal: list[list[float]]
    kept: list[list[int]]


def draw_clips(seed: int, batch: int, slots: int, tokens: int, width: int, kind: str) -> tuple[Tensor, Tensor]:
    """Unit vectors float64 [B, T, N, D] and noise [B, T, N].

    `random`: all different; `copies`: every token is one of a few, shared by all frames, so that most are tied; `grid`:
    four entries of 1/2 or -1/2, of width at least 4, so that tokens that differ are tied as well; `same`: all tokens are
    one. Ties are also in the noise, but for `random`.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, slots, tokens)
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "random":
        return unit(torch.randn(*shape, width, generator=generator, dtype=torch.float64)), noise
    noise = (noise * 2 * tokens).floor() / (2 * tokens)
    if kind == "grid":
        sign = torch.randint(0, 2, (*shape, 4), generator=generator).double() - 0.5
        place = torch.rand(*shape, width, generator=generator).argsort(dim=-1)[..., :4]
        return torch.zeros(*shape, width, dtype=torch.float64).scatter(-1, place, sign), noise
    few = 1 if kind == "same" else max(tokens // 2, 1)
    pool = unit(torch.randn(batch, few, width, generator=generator, dtype=torch.float64))
    which = torch.randint(0, few, (batch, slots * tokens), generator=generator)
    return pool.gather(1, which[..., None].expand(-1, -1, width)).view(*shape, width), noise


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(dim=-1, keepdim=True).sqrt()


def single(value: float) -> float:
    return float(np.float32(value))


def distance(a: list[float], b: list[float]) -> float:
    d = 1 - math.fsum(x * y for x, y in zip(a, b, strict=True))
    return 0.0 if d <= 2**-18 else single(d)


def frame_density(distances: Vectors, settings: Cluster) -> list[float]:
    if settings.density == "kernel":
        return [single(math.fsum(math.exp(-d / settings.cutoff) for d in row)) for row in distances]
    found = []
    for i, row in enumerate(distances):
        nearest = sorted(d for j, d in enumerate(row) if j != i)[: settings.neighbours]
        found.append(single(math.exp(-math.fsum(d * d for d in nearest) / max(len(nearest), 1))))
    return found


def cluster_frame(
    distances: Vectors, density: list[float], noise: list[float], clusters: int
) -> tuple[list[int], list[int]]:
    """Labels and centres of a frame."""
    tokens = range(len(noise))
    rank = {i: (-density[i], noise[i], i) for i in tokens}  # the smaller, the denser
    delta = []
    for i in tokens:
        denser = [distances[i][j] for j in tokens if rank[j] < rank[i]]
        delta.append(min(denser) if denser else max(max(row) for row in distances))
    prominence = {i: (-single(density[i] * delta[i]), noise[i], i) for i in tokens}
    centres = sorted(tokens, key=lambda i: prominence[i])[:clusters]
    labels = []
    for i in tokens:
        if i in centres:
            labels.append(centres.index(i))
        else:
            labels.append(min(range(clusters), key=lambda c: (distances[centres[c]][i], c)))
    return labels, centres


def clip_temporal_density(frames: list[Vectors], cutoff: float) -> list[list[float]]:
    alone = len(frames) == 1
    return [
        [
            single(
                math.fsum(
                    math.exp(-distance(token, other) / cutoff)
                    for u, rest in enumerate(frames)
                    if u != t or alone
                    for other in rest
                )
            )
            for token in frame
        ]
        for t, frame in enumerate(frames)
    ]


def mask_by_loops(features: Tensor, noise: Tensor, clusters: int, settings: Cluster) -> Looped:
    """One clip: features [T, N, D], noise [T, N]."""
    frames, draws = features.tolist(), noise.tolist()
    temporal = clip_temporal_density(frames, settings.cutoff)
    result = Looped([], [], [], temporal, [])
    for frame, draw, dense in zip(frames, draws, temporal, strict=True):
        distances = [[distance(a, b) for b in frame] for a in frame]
        density = frame_density(distances, settings)
        labels, centres = cluster_frame(distances, density, draw, clusters)
        kept = []
        for c in range(clusters):
            members = [i for i, label in enumerate(labels) if label == c]
            kept.append(min(members, key=lambda i: (-dense[i], draw[i], i)))
        result.density.append(density)
        result.labels.append(labels)
        result.centres.append(centres)
        result.kept.append(sorted(kept))
    return result
