"""What holds for all strategies, and the masks of those that have one against slow loops over plain numbers.

`EVERY` has each strategy that is there, so that a new file is held to the rules of docs/masking.md with no test edited.
"""

import math

import pytest
import torch
from masking_loops import GUIDED, NAMES, draw_guides, flow_scores, hide_by_loops
from torch import Tensor

from stm.masking import complement, get_strategy, strategy_names, to_boolean

EVERY = strategy_names()
RATIOS = (0.1, 0.5, 0.6, 0.75, 0.9)
SPATIAL = ("motion_box", "motion_compensated_box", "flow")
SLOTS_TOGETHER = ("tube", "flow")  # a slot's mask depends on others


def check_against_loops(name: str, guides: dict[str, Tensor], ratio: float) -> None:
    kept = get_strategy(name)(guides, ratio)
    assert kept.dtype == torch.int64
    if name not in ("flow", "attention_hidden"):
        assert kept.tolist() == hide_by_loops(name, guides, ratio)
        return
    # Sums in another order differ by rounding, and so do equal times of different weights: tokens of equal score may change
    # places.
    if name == "flow":
        score = torch.from_numpy(flow_scores(guides["noise"], guides["flow"], ratio))
    else:
        # The time at which a token rings; the longest are kept.
        score = -torch.log1p(-guides["noise"].double()) / guides["attention"].double()
        score = torch.where(guides["attention"] > 0, score, 1e9)
    hidden = to_boolean(kept, *score.shape[1:])
    least_kept = score.masked_fill(hidden, math.inf).amin(dim=2)
    most_hidden = score.masked_fill(~hidden, -math.inf).amax(dim=2)
    assert (least_kept >= most_hidden - (1e-9 if name == "flow" else 1e-4)).all()


def test_strategies_are_found_by_their_files() -> None:
    assert {*NAMES, "cluster"} <= {*EVERY}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("levels", [None, 1, 2, 4])
def test_masks_equal_those_of_loops_even_with_massive_ties(name: str, levels: int | None) -> None:
    """2560 slots here, 10,240 a strategy."""
    for seed in range(160):
        tokens = (2 + seed // 3 % 4) ** 2
        # In double precision the loops' sums and logarithms cannot but order random numbers alike.
        guides = draw_guides(seed, [1, 2, 3][seed % 3], tokens, batch=8, levels=levels, dtype=torch.float64)
        check_against_loops(name, guides, RATIOS[seed % 5])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masks_equal_those_of_loops_at_the_size_of_vit_b(name: str, ratio: float) -> None:
    check_against_loops(name, draw_guides(11, slots=8, tokens=196, batch=2, dtype=torch.float64), ratio)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("ratio", "masked"), [(0.9, 176), (0.8, 156), (0.75, 147), (0.6, 117), (0.5, 98)])
def test_each_slot_hides_the_count_that_videomae_s_truncation_gives(name: str, ratio: float, masked: int) -> None:
    guides = draw_guides(0, slots=8, tokens=196, levels=5)
    hidden = to_boolean(get_strategy(name)(guides, ratio), 8, 196)
    assert hidden.dtype == torch.bool
    check_counts(name, hidden, masked)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("ratio", "masked"), [(0.001, 0), (0.07, 1), (0.13, 2), (0.94, 15), (0.99999, 15)])
def test_extreme_ratios_hide_nothing_or_all_but_one(name: str, ratio: float, masked: int) -> None:
    hidden = to_boolean(get_strategy(name)(draw_guides(5, 3, 16), ratio), 3, 16)
    check_counts(name, hidden, masked)


def check_counts(name: str, hidden: Tensor, masked: int) -> None:
    """Each slot of bool [B, slots, N] hides so many tokens, or all together so many times their number."""
    if get_strategy(name).equal_slots:
        assert (hidden.sum(dim=2) == masked).all()
    assert (hidden.sum(dim=(1, 2)) == masked * hidden.shape[1]).all()


@pytest.mark.parametrize("name", EVERY)
def test_kept_tokens_ascend_strictly_and_a_mask_depends_on_its_own_sample_alone(name: str) -> None:
    guides = draw_guides(1, slots=4, tokens=49, batch=4)
    kept = get_strategy(name)(guides, 0.7)
    assert (kept.diff(dim=1) > 0).all()
    assert kept.min() >= 0 and kept.max() < 4 * 49
    for sample in range(4):
        alone = {guide: values[sample : sample + 1] for guide, values in guides.items()}
        assert torch.equal(get_strategy(name)(alone, 0.7)[0], kept[sample])


@pytest.mark.parametrize("name", EVERY)
def test_strategies_leave_the_guides_alone_and_repeat_themselves(name: str) -> None:
    guides = draw_guides(2, slots=2, tokens=16)
    before = {guide: values.clone() for guide, values in guides.items()}
    first = get_strategy(name)(guides, 0.5)
    assert all(torch.equal(guides[guide], before[guide]) for guide in guides)
    assert torch.equal(get_strategy(name)(guides, 0.5), first)


@pytest.mark.parametrize("name", EVERY)
def test_strategies_use_only_the_guides_that_they_declare(name: str) -> None:
    guides = draw_guides(3, slots=2, tokens=16)
    needed = {guide: guides[guide] for guide in ("noise", *get_strategy(name).needs)}
    assert torch.equal(get_strategy(name)(needed, 0.5), get_strategy(name)(guides, 0.5))


@pytest.mark.parametrize("name", EVERY)
def test_strategies_compile_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    strategy = get_strategy(name)
    compiled = torch.compile(lambda guides: strategy(guides, 0.75), fullgraph=True, backend="eager")
    for seed in range(2):
        guides = draw_guides(seed, slots=4, tokens=16)
        assert torch.equal(compiled(guides), strategy(guides, 0.75))


@pytest.mark.parametrize("name", EVERY)
def test_autocast_around_the_mask_changes_nothing(name: str) -> None:
    guides = draw_guides(12, slots=4, tokens=49)
    with torch.autocast("cpu", torch.bfloat16):
        kept = get_strategy(name)(guides, 0.75)
    assert torch.equal(kept, get_strategy(name)(guides, 0.75))


@pytest.mark.parametrize("name", NAMES)
def test_a_mirrored_clip_has_the_mirrored_mask(name: str) -> None:
    guides = draw_guides(8, slots=4, tokens=49, batch=8)
    del guides["features"]  # of the strategy cluster alone; test_cluster.py
    mirrored = {guide: mirror(values) for guide, values in guides.items()}
    mask = to_boolean(get_strategy(name)(guides, 0.6), 4, 49)
    assert torch.equal(to_boolean(get_strategy(name)(mirrored, 0.6), 4, 49), mirror(mask))


def mirror(values: Tensor) -> Tensor:
    """A guide or mask [B, slots, N], or a flow [B, 2, T, R, C, 2], of the clip seen in a mirror."""
    if values.dim() == 6:
        return values.flip(4) * torch.tensor([-1.0, 1.0])
    side = math.isqrt(values.shape[-1])
    return values.unflatten(-1, (side, side)).flip(-1).flatten(-2)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SPATIAL)))
def test_strategies_without_geometry_do_not_mind_the_order_of_tokens(name: str) -> None:
    guides = draw_guides(9, slots=3, tokens=36)
    del guides["flow"], guides["features"]
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    mixed = {guide: values[..., order] for guide, values in guides.items()}
    mask = to_boolean(get_strategy(name)(guides, 0.75), 3, 36)
    assert torch.equal(to_boolean(get_strategy(name)(mixed, 0.75), 3, 36), mask[..., order])


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SLOTS_TOGETHER)))
def test_slots_are_masked_one_by_one(name: str) -> None:
    guides = draw_guides(10, slots=5, tokens=36)
    del guides["flow"], guides["features"]
    backwards = {guide: values.flip(1) for guide, values in guides.items()}
    mask = to_boolean(get_strategy(name)(guides, 0.75), 5, 36)
    assert torch.equal(to_boolean(get_strategy(name)(backwards, 0.75), 5, 36), mask.flip(1))


@pytest.mark.parametrize("name", sorted(set(GUIDED) - {"attention", "attention_hidden"}))
def test_noise_never_overrules_scores_that_differ_by_the_least_possible(name: str) -> None:
    """Adding a small multiple of the noise to the score would fail here: neighbouring floats, contrary noise."""
    values = torch.full((1, 1, 16), 0.25)
    for token in range(1, 16):
        values[0, 0, token] = torch.nextafter(values[0, 0, token - 1], torch.tensor(1.0))
    noise = torch.linspace(0.99, 0.0, 16)[None, None]
    kept = get_strategy(name)({"noise": noise, GUIDED[name]: values}, 0.5).tolist()[0]
    # A box of 8 tokens is 2 x 3 and takes 9 to 11 and 13 to 15; the two that it lacks are the highest of the others.
    assert kept == (list(range(8, 16)) if name == "text_bottom" else list(range(8)))


@pytest.mark.parametrize("name", sorted(GUIDED))
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_broken_scores_still_give_exact_counts_and_do_not_reach_other_slots(name: str, broken: float) -> None:
    guides = draw_guides(7, slots=2, tokens=16)
    mask = to_boolean(get_strategy(name)(guides, 0.75), 2, 16)
    guide = guides[GUIDED[name]]
    guide[0, 0, :6], guide[1, 1, 3], guide[2, 0] = broken, broken, broken
    hidden = to_boolean(get_strategy(name)(guides, 0.75), 2, 16)
    assert (hidden.sum(dim=2) == 12).all()
    whole = [(0, 1), (1, 0), (2, 1)]
    assert all(torch.equal(hidden[where], mask[where]) for where in whole)


@pytest.mark.parametrize("name", ["motion", "motion_compensated", "motion_box", "motion_compensated_box", "text_top"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_no_numbers_count_as_the_highest(name: str, broken: float) -> None:
    guides = draw_guides(7, slots=2, tokens=16)
    guides[GUIDED[name]][0, 0, [1, 2, 5, 6]] = broken
    hidden = to_boolean(get_strategy(name)(guides, 0.75), 2, 16)
    assert hidden[0, 0, [1, 2, 5, 6]].all()


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


# With equal attention `attention_hidden` is random too, but hides what `attention` keeps.
GROUPED = {"tube", "flow", "motion_box", "motion_compensated_box", "attention_hidden"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - GROUPED))
def test_with_constant_guides_every_strategy_of_single_tokens_is_random(name: str) -> None:
    guides = draw_guides(13, slots=4, tokens=49)
    constant = {"noise": guides["noise"], "similarity": torch.full((3, 4, 49), 0.25)}
    constant |= dict.fromkeys(("motion", "motion_compensated", "attention", "spatiotemporal"), constant["similarity"])
    assert torch.equal(get_strategy(name)(constant, 0.75), get_strategy("random")(guides, 0.75))


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
