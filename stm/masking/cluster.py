"""Cluster-wise masking (ClusterSTM): each cluster of a frame's tokens keeps the token that recurs most in other frames.

The tokens of each frame are clustered by the features of a frozen teacher, regardless of position, by density peaks
(Rodriguez and Laio 2014): centres are tokens with dense neighbourhoods that are far from any denser token. There are as
many clusters as tokens to keep, and each keeps its token with the highest temporal density: content that stays in view,
wherever it moves. All other tokens are hidden, so that a frame reveals little of what is hidden in the next one.

Only the paper's abstract and figures are known to us and, from a note on it, that clusters are density peaks, one per
kept token, and that temporal density is a sum of exp(-distance / cutoff) over all tokens of all other frames. Everything else
is our inference [INF]: the kernel of the local density, the choice of centres by the product of density and separation, the
assignment to the nearest centre, ties, images, and the values of `stm.config.Cluster`.

If scores are equal, the token with the lower noise comes first, then the one with the lower position. Densities are summed
in float64 and compared as float32, so that the noise breaks ties rather than the rounding of sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stm.config import Cluster
from stm.masking import Guides, Strategy, count_masked, number_tokens, register, sort_by

SAME = 2.0**-18  # smaller cosine distances count as 0: for equal float32 unit vectors, about 1e-7 is computed
DEFAULTS = Cluster()


class Clusters(NamedTuple):
    """The clusters of each frame."""

    labels: Tensor  # int64 [B, T, N], the cluster of each token
    centres: Tensor  # int64 [B, T, clusters], the centre of each cluster, most prominent first


@register("cluster", needs=("features",))
def cluster(guides: Guides, ratio: float) -> Tensor:
    """Keep one token per cluster, with the default settings; kept tokens, int64 [B, K], see `keep_clusters`."""
    return keep_clusters(guides["features"], guides["noise"], ratio, DEFAULTS)


def make_cluster_strategy(settings: Cluster) -> Strategy:
    """Return the strategy "cluster" with a run's settings."""
    return Strategy(
        "cluster", ("features",), lambda g, ratio: keep_clusters(g["features"], g["noise"], ratio, settings)
    )


def keep_clusters(features: Tensor, noise: Tensor, ratio: float, settings: Cluster) -> Tensor:
    """Keep one token of each cluster.

    Args:
        features: unit vectors [B, T, N, D], any float dtype.
        noise: float [B, T, N], breaks ties.
        ratio: share of a frame's tokens to hide; at least one stays visible.
        settings: `density`, `cutoff` and `neighbours` are used.

    Returns:
        Kept tokens, int64 [B, T * (N - int(ratio * N))], ascending, the same number in each frame.

    Raises:
        ValueError: no token would be kept at this ratio.
    """
    tokens = noise.shape[-1]
    clusters = tokens - count_masked(tokens, ratio)
    labels = cluster_tokens(features, noise, clusters, settings).labels
    density = temporal_density(features, settings.cutoff)
    return number_tokens(keep_densest(density, labels, noise, clusters), tokens)


def cluster_tokens(features: Tensor, noise: Tensor, clusters: int, settings: Cluster) -> Clusters:
    """Cluster each frame by density peaks.

    The centres are the tokens with the highest density x separation. A centre belongs to its own cluster, so that no cluster
    is empty; any other token is assigned to the nearest centre, or to the most prominent of several equally near ones [INF].
    The original algorithm assigns a token to the cluster of its nearest denser neighbour.

    Args:
        features: unit vectors [B, T, N, D], any float dtype.
        noise: float [B, T, N].
        clusters: number of clusters per frame, 1 to N.
        settings: `density`, `cutoff` and `neighbours` are used.

    Raises:
        ValueError: `clusters` is out of range.
    """
    if not 1 <= clusters <= noise.shape[-1]:
        raise ValueError(f"a frame of {noise.shape[-1]} tokens cannot have {clusters} clusters; change the mask ratio")
    distance = cosine_distance(features, features)
    density = local_density(distance, settings)
    prominence = density * separation(distance, density, noise)
    centres = sort_by(-prominence, noise)[..., :clusters]
    rows = centres[..., None].expand(*centres.shape, distance.shape[-1])
    labels = distance.gather(-2, rows).argmin(dim=-2)
    # If two centres coincide, argmin would leave the second one's cluster empty.
    numbers = torch.arange(clusters, device=labels.device).expand_as(centres)
    return Clusters(labels.scatter(-1, centres, numbers), centres)


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - cosine of unit vectors, [..., N, D] and [..., M, D] -> float32 [..., N, M], in [0, 2]; 0 below `SAME`.

    Computed in float32 or better, also under autocast: in bfloat16 the distance between similar tokens is rounding noise.
    """
    with torch.autocast(first.device.type, enabled=False):
        dtype = torch.promote_types(first.dtype, torch.float32)
        product = first.to(dtype) @ second.to(dtype).transpose(-1, -2)
        return torch.threshold_(product.neg_().add_(1), SAME, 0.0).float()


def local_density(distance: Tensor, settings: Cluster) -> Tensor:
    """The density of a token's neighbourhood within its frame. [INF]: the paper's kernel is unknown.

    Args:
        distance: float32 [..., N, N].
        settings: `kernel` is the sum of exp(-distance / cutoff) over all tokens including itself; `knn` is exp(-mean squared
            distance to the k nearest others), or to all others if there are fewer than k.

    Returns:
        float32 [..., N]; in [1, N] for `kernel`, in (0, 1] for `knn`.
    """
    if settings.density == "kernel":
        return _kernel(distance, settings.cutoff).sum(dim=-1, dtype=torch.float64).float()
    others = min(settings.neighbours, distance.shape[-1] - 1)
    # The nearest one is the token itself, at distance 0, which adds nothing to the sum.
    nearest = distance.topk(others + 1, dim=-1, largest=False).values
    return torch.exp(-nearest.double().square().sum(dim=-1) / max(others, 1)).float()


def separation(distance: Tensor, density: Tensor, noise: Tensor) -> Tensor:
    """The distance to the nearest denser token of the same frame.

    Args:
        distance: float32 [..., N, N].
        density: float32 [..., N]. Among equally dense tokens, the one with the lower noise counts as denser.
        noise: float [..., N].

    Returns:
        float32 [..., N]. The densest token of a frame gets the frame's largest distance, so that it becomes a centre.
    """
    place = sort_by(-density, noise).argsort(dim=-1)  # rank by descending density
    denser = place[..., None, :] < place[..., :, None]
    nearest = torch.where(denser, distance, torch.inf).amin(dim=-1)
    return torch.where(place == 0, distance.amax(dim=(-2, -1))[..., None], nearest)


def temporal_density(features: Tensor, cutoff: float) -> Tensor:
    """How strongly a token recurs in the other frames, at any position.

    Each pair of frames is compared once. Pairs of one temporal distance are in memory at a time, at most
    B x T x N x N values.

    Args:
        features: unit vectors [B, T, N, D], any float dtype.
        cutoff: scale of the cosine distance, above 0.

    Returns:
        float32 [B, T, N], the sum of exp(-distance / cutoff) over all tokens of all other frames. For an image, which has
        only one frame, the sum is over its own tokens, as in the local density `kernel` [INF].
    """
    if features.shape[1] == 1:
        return _kernel(cosine_distance(features, features), cutoff).sum(dim=-1, dtype=torch.float64).float()
    # With frames as the first dimension, a range of frames is contiguous, and the product needs no copies.
    frames = features.transpose(0, 1).contiguous()
    density = torch.zeros(frames.shape[:3], dtype=torch.float64, device=frames.device)
    for step in range(1, frames.shape[0]):
        kernel = _kernel(cosine_distance(frames[:-step], frames[step:]), cutoff).double()
        # Each pair contributes to both of its frames, because the kernel is symmetric.
        density[:-step] += kernel.sum(dim=-1)
        density[step:] += kernel.sum(dim=-2)
    return density.transpose(0, 1).float()


def keep_densest(density: Tensor, labels: Tensor, noise: Tensor, clusters: int) -> Tensor:
    """Return the densest token of each cluster.

    Args:
        density: float [..., N]; of equally dense tokens, the one with the lower noise is kept.
        labels: int64 [..., N], from 0 to `clusters` - 1; each value must occur.
        noise: float [..., N].
        clusters: number of clusters.

    Returns:
        int64 [..., clusters], positions within the frame, ascending.
    """
    order = sort_by(-density, noise)
    place = order.argsort(dim=-1)
    first = place.new_full((*place.shape[:-1], clusters), place.shape[-1]).scatter_reduce(-1, labels, place, "amin")
    return order.gather(-1, first).sort(dim=-1).values


def _kernel(distance: Tensor, cutoff: float) -> Tensor:
    return (distance / -cutoff).exp_()
