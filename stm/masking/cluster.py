"""Cluster-wise masking (ClusterSTM): of each cluster of a frame's tokens, the one that recurs most in other frames stays.

The tokens of each frame are clustered by the features of a frozen teacher, without regard to their places, by density
peaks (Rodriguez and Laio 2014): centres are tokens in dense surroundings that are far from any denser token. There are
as many clusters as tokens to keep, and of each the token of the highest temporal density is kept: what stays in view,
wherever it moves. All other tokens are hidden, so that no frame tells much about what is hidden in the next.

Known are the abstract and figures of the paper, and from a note on it that clusters are density peaks, one a kept
token, and that temporal density is a sum of exp(-distance / cutoff) over all tokens of all other frames. Our inference
[INF] is the rest: the kernel of the local density, centres by the product of density and separation, labels by the
nearest centre, what is done with ties and images, and the values of `stm.config.Cluster`.

Where scores are equal, the lower noise comes first, then the lower place. That this decides, and not the rounding of
sums in one order or another, is why densities are summed in float64 and compared as float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stm.config import Cluster
from stm.masking import Guides, Strategy, count_masked, number_tokens, register, sort_by

SAME = 2.0**-18  # a cosine distance below this is 0: unit vectors of float32 that are equal come out some 1e-7 apart
DEFAULTS = Cluster()


class Clusters(NamedTuple):
    """The clusters of frames."""

    labels: Tensor  # int64 [B, T, N], each token's cluster
    centres: Tensor  # int64 [B, T, clusters], each cluster's centre; the most prominent first


@register("cluster", needs=("features",))
def cluster(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K], with the default settings; see `keep_clusters`."""
    return keep_clusters(guides["features"], guides["noise"], ratio, DEFAULTS)


def make_cluster_strategy(settings: Cluster) -> Strategy:
    """The strategy "cluster" with a run's settings."""
    return Strategy(
        "cluster", ("features",), lambda g, ratio: keep_clusters(g["features"], g["noise"], ratio, settings)
    )


def keep_clusters(features: Tensor, noise: Tensor, ratio: float, settings: Cluster) -> Tensor:
    """Keeps one token of each cluster.

    Args:
        features: unit vectors [B, T, N, D], any float dtype.
        noise: float [B, T, N], decides between equal scores.
        ratio: share of a frame's tokens to hide; at least one stays.
        settings: density, cutoff and neighbours are read.

    Returns:
        Kept tokens, int64 [B, T * (N - int(ratio * N))], sorted ascending, as many in each frame.

    Raises:
        ValueError: nothing would be kept.
    """
    tokens = noise.shape[-1]
    clusters = tokens - count_masked(tokens, ratio)
    labels = cluster_tokens(features, noise, clusters, settings).labels
    density = temporal_density(features, settings.cutoff)
    return number_tokens(keep_densest(density, labels, noise, clusters), tokens)


def cluster_tokens(features: Tensor, noise: Tensor, clusters: int, settings: Cluster) -> Clusters:
    """Density-peaks clustering of each frame.

    The centres are the tokens of the highest density x separation; a centre belongs to its own cluster, any other token
    to the nearest centre, or of equally near ones to the most prominent. So no cluster is empty. [INF]; the original
    gives a token the cluster of its nearest denser neighbour.

    Args:
        features: unit vectors [B, T, N, D], any float dtype.
        noise: float [B, T, N].
        clusters: 1 to N, how many in each frame.
        settings: density, cutoff and neighbours are read.

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
    # Of two centres in one place, argmin would leave the second one's cluster empty.
    numbers = torch.arange(clusters, device=labels.device).expand_as(centres)
    return Clusters(labels.scatter(-1, centres, numbers), centres)


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - cosine of unit vectors, [..., N, D] and [..., M, D] -> float32 [..., N, M], in [0, 2]; 0 below `SAME`.

    Computed in float32 at least, also under autocast: what bfloat16 leaves of the distance of near tokens is noise.
    """
    with torch.autocast(first.device.type, enabled=False):
        dtype = torch.promote_types(first.dtype, torch.float32)
        product = first.to(dtype) @ second.to(dtype).transpose(-1, -2)
        return torch.threshold_(product.neg_().add_(1), SAME, 0.0).float()


def local_density(distance: Tensor, settings: Cluster) -> Tensor:
    """How densely a token is surrounded within its frame. [INF]: the paper's kernel is unknown.

    Args:
        distance: float32 [..., N, N].
        settings: `kernel` is the sum of exp(-distance / cutoff) over all tokens, itself among them; `knn` is exp(-mean
            squared distance to the k nearest others), of all others where there are fewer.

    Returns:
        float32 [..., N], in [1, N] or (0, 1].
    """
    if settings.density == "kernel":
        return _kernel(distance, settings.cutoff).sum(dim=-1, dtype=torch.float64).float()
    others = min(settings.neighbours, distance.shape[-1] - 1)
    # The nearest of all is the token itself, at 0, which adds nothing to the sum.
    nearest = distance.topk(others + 1, dim=-1, largest=False).values
    return torch.exp(-nearest.double().square().sum(dim=-1) / max(others, 1)).float()


def separation(distance: Tensor, density: Tensor, noise: Tensor) -> Tensor:
    """Distance to the nearest denser token of the frame.

    Args:
        distance: float32 [..., N, N].
        density: float32 [..., N]. Of equally dense tokens the one of lower noise counts as denser.
        noise: float [..., N].

    Returns:
        float32 [..., N]. The densest token of a frame gets the frame's largest distance, so that it is a centre.
    """
    place = sort_by(-density, noise).argsort(dim=-1)  # in descending order
    denser = place[..., None, :] < place[..., :, None]
    nearest = torch.where(denser, distance, torch.inf).amin(dim=-1)
    return torch.where(place == 0, distance.amax(dim=(-2, -1))[..., None], nearest)


def temporal_density(features: Tensor, cutoff: float) -> Tensor:
    """How much of a token is found again in other frames, wherever it is there.

    Each pair of frames is compared once; in memory are at any time the pairs of one distance in time, B x T x N x N
    numbers at most.

    Args:
        features: unit vectors [B, T, N, D], any float dtype.
        cutoff: of the cosine distance, above 0.

    Returns:
        float32 [B, T, N], the sum of exp(-distance / cutoff) over all tokens of all other frames. An image has none: its
        sum is over its own tokens, the local density `kernel` [INF].
    """
    if features.shape[1] == 1:
        return _kernel(cosine_distance(features, features), cutoff).sum(dim=-1, dtype=torch.float64).float()
    # With the frames first, a range of frames is one block of memory, which the product need not copy.
    frames = features.transpose(0, 1).contiguous()
    density = torch.zeros(frames.shape[:3], dtype=torch.float64, device=frames.device)
    for step in range(1, frames.shape[0]):
        kernel = _kernel(cosine_distance(frames[:-step], frames[step:]), cutoff).double()
        density[:-step] += kernel.sum(dim=-1)
        density[step:] += kernel.sum(dim=-2)
    return density.transpose(0, 1).float()


def keep_densest(density: Tensor, labels: Tensor, noise: Tensor, clusters: int) -> Tensor:
    """The densest token of each cluster.

    Args:
        density: float [..., N]; of equal ones the lower noise is kept.
        labels: int64 [..., N], from 0 to `clusters` - 1; each occurs.
        noise: float [..., N].
        clusters: how many.

    Returns:
        int64 [..., clusters], places within the frame, sorted ascending.
    """
    order = sort_by(-density, noise)
    place = order.argsort(dim=-1)
    first = place.new_full((*place.shape[:-1], clusters), place.shape[-1]).scatter_reduce(-1, labels, place, "amin")
    return order.gather(-1, first).sort(dim=-1).values


def _kernel(distance: Tensor, cutoff: float) -> Tensor:
    return (distance / -cutoff).exp_()
