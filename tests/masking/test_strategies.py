"""Masks against brute force: plain Python sorting of (score, noise) pairs."""

import math

import pytest
import torch

from stm.masking import complement, get_strategy, strategy_names, to_boolean

NAMES = ["motion", "random", "text_bottom", "text_top", "tube"]
GUIDED = {"text_top": "similarity", "text_bottom": "similarity", "motion": "motion"}


def draw_guides(seed: int, slots: int, tokens: int, batch: int = 3, levels: int | None = None) -> dict:
    """Random guides; with `levels`, scores and noise take only so many values: nearly everything is tied."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        if levels is None:
            return torch.rand(batch, slots, tokens, generator=generator)
        return torch.randint(0, levels, (batch, slots, tokens), generator=generator).float() / levels

    return {"noise": draw(), "similarity": draw() * 2 - 1, "motion": draw() * 5}


def hide_by_sorting(name: str, guides: dict, ratio: float) -> list[list[int]]:
    """The same masks by sorting Python tuples, one slot at a time."""
    noise = guides["noise"]
    batch, slots, tokens = noise.shape
    masked = int(ratio * tokens)
    result = []
    for sample in range(batch):
        kept = []
        for slot in range(slots):
            rows = []
            for token in range(tokens):
                draw = noise[sample, 0 if name == "tube" else slot, token].item()
                score = guides[GUIDED[name]][sample, slot, token].item() if name in GUIDED else 0.0
                rows.append((-score if name == "text_bottom" else score, draw, token))
            kept += [slot * tokens + row[2] for row in sorted(rows)[: tokens - masked]]
        result.append(sorted(kept))
    return result


def test_all_strategies_are_found_by_their_files() -> None:
    assert strategy_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("levels", [None, 1, 2, 3])
def test_masks_equal_brute_force_sorting_even_with_massive_ties(name: str, levels: int | None) -> None:
    for seed in range(12):
        side = 2 + seed % 4
        guides = draw_guides(seed, slots=1 + seed % 3, tokens=side**2, levels=levels)
        for ratio in (0.1, 0.5, 0.6, 0.75, 0.9):
            kept = get_strategy(name)(guides, ratio)
            assert kept.dtype == torch.int64
            assert kept.tolist() == hide_by_sorting(name, guides, ratio), (seed, ratio)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ratio", "masked"), [(0.9, 176), (0.8, 156), (0.75, 147), (0.6, 117), (0.5, 98)])
def test_each_slot_hides_the_count_that_videomae_s_truncation_gives(name: str, ratio: float, masked: int) -> None:
    guides = draw_guides(0, slots=8, tokens=196, levels=5)
    hidden = to_boolean(get_strategy(name)(guides, ratio), 8, 196)
    assert hidden.dtype == torch.bool
    assert (hidden.sum(dim=2) == masked).all()


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_ascend_strictly_and_a_mask_depends_on_its_own_sample_alone(name: str) -> None:
    guides = draw_guides(1, slots=4, tokens=49, batch=4)
    kept = get_strategy(name)(guides, 0.7)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0 and kept.max() < 4 * 49
    for sample in range(4):
        alone = {guide: values[sample : sample + 1] for guide, values in guides.items()}
        assert torch.equal(get_strategy(name)(alone, 0.7)[0], kept[sample])


@pytest.mark.parametrize("name", NAMES)
def test_strategies_leave_the_guides_alone_and_repeat_themselves(name: str) -> None:
    guides = draw_guides(2, slots=2, tokens=16)
    before = {guide: values.clone() for guide, values in guides.items()}
    first = get_strategy(name)(guides, 0.5)
    assert all(torch.equal(guides[guide], before[guide]) for guide in guides)
    assert torch.equal(get_strategy(name)(guides, 0.5), first)


@pytest.mark.parametrize("name", NAMES)
def test_strategies_use_only_the_guides_that_they_declare(name: str) -> None:
    guides = draw_guides(3, slots=2, tokens=16)
    needed = {guide: guides[guide] for guide in ("noise", *get_strategy(name).needs)}
    assert torch.equal(get_strategy(name)(needed, 0.5), get_strategy(name)(guides, 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_strategies_compile_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    strategy = get_strategy(name)
    compiled = torch.compile(lambda guides: strategy(guides, 0.75), fullgraph=True, backend="eager")
    for seed in range(2):
        guides = draw_guides(seed, slots=4, tokens=16)
        assert torch.equal(compiled(guides), strategy(guides, 0.75))


@pytest.mark.parametrize("name", sorted(GUIDED))
def test_noise_never_overrules_scores_that_differ_by_the_least_possible(name: str) -> None:
    """Adding a small multiple of the noise to the score would fail here: neighbouring floats, contrary noise."""
    values = torch.full((1, 1, 16), 0.25)
    for token in range(1, 16):
        values[0, 0, token] = torch.nextafter(values[0, 0, token - 1], torch.tensor(1.0))
    noise = torch.linspace(0.99, 0.0, 16)[None, None]
    kept = get_strategy(name)({"noise": noise, GUIDED[name]: values}, 0.5)
    assert kept.tolist() == [list(range(8, 16)) if name == "text_bottom" else list(range(8))]


def test_text_top_hides_the_object_and_text_bottom_keeps_it() -> None:
    similarity = torch.full((1, 2, 16), 0.1)
    similarity[:, :, [5, 6, 9, 10]] = 0.3  # an object of 4 tokens
    guides = {"noise": torch.rand(1, 2, 16), "similarity": similarity}
    top = to_boolean(get_strategy("text_top")(guides, 0.5), 2, 16)
    bottom = to_boolean(get_strategy("text_bottom")(guides, 0.5), 2, 16)
    assert top[:, :, [5, 6, 9, 10]].all()
    assert not bottom[:, :, [5, 6, 9, 10]].any()


def test_tube_is_the_same_in_every_slot_and_random_is_not() -> None:
    guides = draw_guides(4, slots=8, tokens=196)
    tube = to_boolean(get_strategy("tube")(guides, 0.9), 8, 196)
    assert (tube == tube[:, :1]).all()
    loose = to_boolean(get_strategy("random")(guides, 0.9), 8, 196)
    assert not (loose == loose[:, :1]).all()


@pytest.mark.parametrize("name", ["random", "tube"])
def test_unguided_masks_hide_every_token_equally_often(name: str) -> None:
    guides = draw_guides(5, slots=2, tokens=16, batch=4000)
    rate = to_boolean(get_strategy(name)(guides, 0.75), 2, 16).float().mean(dim=0)
    # 5 standard deviations of a share of 0.75 in 4000 draws.
    assert (rate - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_random_masks_of_different_slots_are_independent() -> None:
    guides = draw_guides(6, slots=2, tokens=4, batch=8000)
    hidden = to_boolean(get_strategy("random")(guides, 0.5), 2, 4).float()
    both = (hidden[:, 0, 0] * hidden[:, 1, 0]).mean()
    assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 8000)


def test_broken_scores_still_give_exact_counts() -> None:
    guides = draw_guides(7, slots=2, tokens=16)
    guides["motion"][0, 0, :6] = float("nan")
    guides["motion"][1, 1, :3] = float("inf")
    hidden = to_boolean(get_strategy("motion")(guides, 0.75), 2, 16)
    assert (hidden.sum(dim=2) == 12).all()
    assert hidden[0, 0, :6].all() and hidden[1, 1, :3].all()


def test_complement_and_boolean_agree_with_sets() -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        total, count = 24, 1 + seed
        kept = torch.stack([torch.randperm(total, generator=generator)[:count].sort().values for _ in range(5)])
        hidden = complement(kept, total)
        for row in range(5):
            expected = sorted(set(range(total)) - set(kept[row].tolist()))
            assert hidden[row].tolist() == expected
            assert to_boolean(kept, 4, 6)[row].flatten().nonzero().flatten().tolist() == expected
