"""ClusterSTM's mask: against loops over plain numbers, and what must hold whatever the features are."""

import math

import pytest
import torch
from cluster_loops import draw_clips, mask_by_loops, unit
from torch import Tensor

from stm.config import Cluster
from stm.masking import count_masked, get_strategy, number_tokens, to_boolean
from stm.masking.cluster import (
    cluster_tokens,
    cosine_distance,
    keep_densest,
    local_density,
    make_cluster_strategy,
    separation,
    temporal_density,
)

KINDS = ["random", "copies", "grid", "same"]
SETTINGS = [Cluster(), Cluster(density="knn", neighbours=3), Cluster(cutoff=0.1), Cluster(density="knn", neighbours=50)]


def draw_guides(tokens: int = 49, slots: int = 4, batch: int = 3, width: int = 16, seed: int = 0) -> dict[str, Tensor]:
    features, noise = draw_clips(seed, batch, slots, tokens, width, "random")
    return {"features": features.float(), "noise": noise.float()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=["kernel", "knn", "narrow", "all-neighbours"])
def test_clusters_densities_and_kept_tokens_equal_those_of_loops(kind: str, settings: Cluster) -> None:
    """72 frames here, 1152 in all; half of the kinds and more are full of ties."""
    for seed in range(12):
        slots, tokens = 1 + seed % 3, [1, 2, 5, 9, 12, 16][seed % 6]
        clusters = 1 + (7 * seed) % tokens
        features, noise = draw_clips(seed, 3, slots, tokens, 4 + seed % 5, kind)
        found = cluster_tokens(features, noise, clusters, settings)
        dense = local_density(cosine_distance(features, features), settings)
        temporal = temporal_density(features, settings.cutoff)
        kept = keep_densest(temporal, found.labels, noise, clusters)
        assert found.labels.dtype == found.centres.dtype == kept.dtype == torch.int64
        for clip in range(3):
            loops = mask_by_loops(features[clip], noise[clip], clusters, settings)
            assert found.centres[clip].tolist() == loops.centres
            assert found.labels[clip].tolist() == loops.labels
            assert kept[clip].tolist() == loops.kept
            torch.testing.assert_close(dense[clip], torch.tensor(loops.density), rtol=1e-6, atol=0)
            torch.testing.assert_close(temporal[clip], torch.tensor(loops.temporal), rtol=1e-6, atol=0)


def test_the_strategy_equals_the_loops_at_the_size_of_vit_b_with_the_run_s_settings() -> None:
    settings = Cluster(density="knn", neighbours=7, cutoff=0.2)
    features, noise = draw_clips(1, 1, 2, 196, 24, "random")
    kept = make_cluster_strategy(settings)({"features": features, "noise": noise}, 0.85)
    loops = mask_by_loops(features[0], noise[0], 30, settings)
    assert kept[0].tolist() == [token for t in range(2) for token in (t * 196 + k for k in loops.kept[t])]
    assert not torch.equal(kept, get_strategy("cluster")({"features": features, "noise": noise}, 0.85))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 4, 16, 49, 196])
def test_each_frame_keeps_exactly_one_token_a_cluster(kind: str, tokens: int) -> None:
    for ratio in (0.01, 0.3, 0.5, 0.6, 0.75, 0.8, 0.85, 0.9, 0.95, 0.999):
        features, noise = draw_clips(3, 2, 3, tokens, 6, kind)
        kept = get_strategy("cluster")({"features": features.float(), "noise": noise.float()}, ratio)
        masked = count_masked(tokens, ratio)
        assert kept.dtype == torch.int64 and kept.shape == (2, 3 * (tokens - masked))
        assert (kept.diff(dim=1) > 0).all()
        assert (to_boolean(kept, 3, tokens).sum(dim=2) == masked).all()


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_are_in_their_clusters_and_none_there_is_denser(kind: str) -> None:
    features, noise = draw_clips(4, 2, 4, 49, 8, kind)
    labels, centres = cluster_tokens(features, noise, 10, Cluster())
    density = temporal_density(features, 0.5)
    kept = keep_densest(density, labels, noise, 10)
    assert (labels.gather(-1, centres) == torch.arange(10)).all()
    assert (labels.gather(-1, kept).sort(dim=-1).values == torch.arange(10)).all()
    best = density.gather(-1, kept)[..., None]
    own = labels.gather(-1, kept)[..., None] == labels[..., None, :]
    assert torch.where(own, density[..., None, :] <= best, True).all()


def test_every_token_is_labelled_with_its_nearest_centre() -> None:
    features, noise = draw_clips(5, 2, 2, 30, 8, "random")
    labels, centres = cluster_tokens(features, noise, 6, Cluster())
    for clip in range(2):
        for frame in range(2):
            vectors = features[clip, frame]
            nearest = (vectors @ vectors[centres[clip, frame]].T).argmax(dim=1)
            assert torch.equal(labels[clip, frame], nearest)


def blobs(groups: int, each: int, width: int = 32, slots: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tight groups around directions at right angles, in another order in each frame: features, noise, groups."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.02 * torch.randn(1, slots, groups * each, width, generator=generator, dtype=torch.float64)
    group = torch.arange(groups).repeat_interleave(each).expand(1, slots, -1)
    group = group.gather(-1, torch.rand(group.shape, generator=generator).argsort(dim=-1))
    noise = torch.rand(group.shape, generator=generator, dtype=torch.float64)
    return unit(torch.eye(width, dtype=torch.float64)[group] + spread), noise, group


@pytest.mark.parametrize("settings", [Cluster(), Cluster(cutoff=0.05), Cluster(density="knn", neighbours=5)])
def test_groups_far_apart_are_the_clusters_and_each_keeps_one_token(settings: Cluster) -> None:
    features, noise, group = blobs(groups=6, each=8)
    labels, _ = cluster_tokens(features, noise, 6, settings)
    together = labels[..., None] == labels[..., None, :]
    assert torch.equal(together, group[..., None] == group[..., None, :])
    kept = make_cluster_strategy(settings)({"features": features, "noise": noise}, 0.88)  # 42 of 48
    frames = (kept.view(1, 4, 6) % 48).sort(dim=-1).values
    assert (group.gather(-1, frames).sort(dim=-1).values == torch.arange(6)).all()


def test_what_recurs_in_other_frames_is_kept_wherever_it_moves_and_what_is_seen_once_is_hidden() -> None:
    """In each frame two clusters of three tokens: one of each is at the same place of feature space in all frames."""
    slots, width = 5, 24
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(width, dtype=torch.float64)
    features, lasting = torch.empty(1, slots, 6, width, dtype=torch.float64), torch.zeros(1, slots, 6, dtype=torch.bool)
    for frame in range(slots):
        vectors = []
        for thing in range(2):
            passing = [axes[thing] + 0.5 * axes[2 + 4 * frame + 2 * thing + k] for k in range(2)]
            vectors += [axes[thing], *passing]
        order = torch.randperm(6, generator=generator)
        features[0, frame] = unit(torch.stack(vectors))[order]
        lasting[0, frame] = (order == 0) | (order == 3)
    noise = torch.rand(1, slots, 6, generator=generator, dtype=torch.float64)
    kept = get_strategy("cluster")({"features": features, "noise": noise}, 0.67)
    assert torch.equal(~to_boolean(kept, slots, 6), lasting)


def test_density_and_separation_of_three_tokens_by_hand() -> None:
    """At the angles 0, 60 and 90 degrees: the middle one is the densest."""
    angle = torch.tensor([0.0, 60.0, 90.0], dtype=torch.float64).deg2rad()
    features = torch.stack([angle.cos(), angle.sin()], dim=-1)[None, None]
    near, far = 1 - math.sqrt(0.75), 0.5
    distance = cosine_distance(features, features)
    torch.testing.assert_close(distance[0, 0], torch.tensor([[0, far, 1], [far, 0, near], [1, near, 0]]))
    density = local_density(distance, Cluster(cutoff=0.25))
    kernel = {d: math.exp(-d / 0.25) for d in (near, far, 1)}
    expected = [1 + kernel[far] + kernel[1], 1 + kernel[far] + kernel[near], 1 + kernel[1] + kernel[near]]
    torch.testing.assert_close(density[0, 0], torch.tensor(expected))
    knn = local_density(distance, Cluster(density="knn", neighbours=2))
    means = [(far**2 + 1) / 2, (far**2 + near**2) / 2, (1 + near**2) / 2]
    torch.testing.assert_close(knn[0, 0], torch.tensor([math.exp(-mean) for mean in means]))
    apart = separation(distance, density, torch.zeros(1, 1, 3))
    # The first is nearest to the middle one; the middle one is the peak and has the frame's largest distance.
    torch.testing.assert_close(apart[0, 0], torch.tensor([far, 1, near]))


def test_temporal_density_is_a_sum_over_other_frames_alone() -> None:
    features, _ = draw_clips(6, 2, 4, 9, 8, "random")
    kernel = torch.exp((torch.einsum("btnd,bumd->btunm", features, features) - 1) / 0.3).sum(dim=-1)
    everything = kernel.sum(dim=2)
    own = torch.stack([kernel[:, t, t] for t in range(4)], dim=1)
    torch.testing.assert_close(temporal_density(features, 0.3), (everything - own).float(), rtol=1e-6, atol=0)


def test_an_image_keeps_the_densest_of_each_cluster_within_itself() -> None:
    features, noise = draw_clips(7, 3, 1, 49, 8, "random")
    kept = get_strategy("cluster")({"features": features, "noise": noise}, 0.8)
    density = local_density(cosine_distance(features, features), Cluster())
    assert torch.equal(temporal_density(features, 0.5), density)
    labels = cluster_tokens(features, noise, 10, Cluster()).labels
    assert torch.equal(kept, number_tokens(keep_densest(density, labels, noise, 10), 49))


@pytest.mark.parametrize("width", [24, 768])
def test_identical_frames_keep_identical_tokens(width: int) -> None:
    guides = draw_guides(tokens=196, slots=1, batch=2, width=width)
    still = {name: values.expand(-1, 4, *values.shape[2:]) for name, values in guides.items()}
    mask = to_boolean(get_strategy("cluster")(still, 0.8), 4, 196)
    assert (mask == mask[:, :1]).all()


@pytest.mark.parametrize("density", ["kernel", "knn"])
@pytest.mark.parametrize("width", [8, 512, 768])
def test_where_all_tokens_are_one_vector_the_noise_keeps_its_lowest(density: str, width: int) -> None:
    """Centres are the tokens of the lowest noise; all that are none belong to the first, which is kept before them."""
    vector = unit(torch.randn(2, 1, 1, width, generator=torch.Generator().manual_seed(2)))
    guides = {"features": vector.expand(-1, 3, 49, -1).contiguous(), "noise": draw_guides(slots=3, batch=2)["noise"]}
    kept = make_cluster_strategy(Cluster.model_validate({"density": density}))(guides, 0.8)
    lowest = guides["noise"].argsort(dim=-1)[..., :10].sort(dim=-1).values
    assert torch.equal(kept, number_tokens(lowest, 49))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_tokens_and_frames_does_not_matter(kind: str, dtype: torch.dtype) -> None:
    for seed in range(5):
        features, noise = draw_clips(seed, 3, 4, 36, 8, kind)
        noise = torch.rand(noise.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        features, noise = features.to(dtype), noise.to(dtype)
        order, times = torch.randperm(36), torch.randperm(4)
        mask = to_boolean(get_strategy("cluster")({"features": features, "noise": noise}, 0.8), 4, 36)
        mixed = {"features": features[:, times][:, :, order], "noise": noise[:, times][:, :, order]}
        assert torch.equal(to_boolean(get_strategy("cluster")(mixed, 0.8), 4, 36), mask[:, times][:, :, order])


def test_a_mask_depends_on_its_own_clip_alone_and_leaves_the_guides_as_they_were() -> None:
    guides = draw_guides()
    before = {name: values.clone() for name, values in guides.items()}
    kept = get_strategy("cluster")(guides, 0.8)
    assert all(torch.equal(guides[name], before[name]) for name in guides)
    assert torch.equal(get_strategy("cluster")(guides, 0.8), kept)
    for clip in range(3):
        alone = {name: values[clip : clip + 1] for name, values in guides.items()}
        assert torch.equal(get_strategy("cluster")(alone, 0.8)[0], kept[clip])


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0])
def test_broken_features_still_give_exact_counts(broken: float) -> None:
    guides = draw_guides()
    guides["features"][0, 0, :6], guides["features"][1] = broken, broken
    whole = get_strategy("cluster")(draw_guides(), 0.8)
    kept = get_strategy("cluster")(guides, 0.8)
    assert (to_boolean(kept, 4, 49).sum(dim=2) == 39).all()
    assert torch.equal(kept[2], whole[2])


@pytest.mark.parametrize("cutoff", [1e-40, 1e-6, 2.0])
def test_no_cutoff_makes_numbers_that_are_none(cutoff: float) -> None:
    features, noise = draw_clips(8, 2, 3, 16, 8, "copies")
    assert temporal_density(features, cutoff).isfinite().all()
    labels = cluster_tokens(features, noise, 5, Cluster(cutoff=cutoff)).labels
    assert labels.min() == 0 and labels.max() == 4


def test_autocast_around_the_mask_changes_nothing() -> None:
    guides = draw_guides()
    with torch.autocast("cpu", torch.bfloat16):
        kept = get_strategy("cluster")(guides, 0.8)
    assert torch.equal(kept, get_strategy("cluster")(guides, 0.8))


@pytest.mark.parametrize("slots", [1, 4])
def test_the_mask_compiles_to_one_graph(slots: int) -> None:
    torch._dynamo.reset()
    strategy = make_cluster_strategy(Cluster(density="knn"))
    compiled = torch.compile(lambda guides: strategy(guides, 0.8), fullgraph=True, backend="eager")
    for seed in range(2):
        guides = draw_guides(slots=slots, seed=seed)
        assert torch.equal(compiled(guides), strategy(guides, 0.8))


def test_a_frame_cannot_have_no_cluster_or_more_than_tokens() -> None:
    guides = draw_guides(tokens=9)
    for clusters in (0, 10):
        with pytest.raises(ValueError, match=f"9 tokens cannot have {clusters} clusters"):
            cluster_tokens(guides["features"], guides["noise"], clusters, Cluster())
