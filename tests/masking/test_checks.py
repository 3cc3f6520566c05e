"""What a strategy returns is checked on the first batch."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stm.masking import Guides, MaskError, Strategy, get_strategy, start_checks, strategy_names

SLOTS, TOKENS, RATIO = 2, 4, 0.5
KEPT = [[0, 1, 4, 6], [0, 1, 4, 6], [2, 3, 5, 7]]


@pytest.fixture(autouse=True)
def _new_run() -> None:
    start_checks()


def noise(batch: int = 3) -> Guides:
    return {"noise": torch.rand(batch, SLOTS, TOKENS)}


def returning(value: object, equal_slots: bool = True) -> Strategy:
    return Strategy("mine", (), lambda guides, ratio: value, equal_slots)  # type: ignore[arg-type, return-value]


def changed(clip: int, place: int, value: int) -> Tensor:
    kept = torch.tensor(KEPT)
    kept[clip, place] = value
    return kept


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (KEPT, "returned a list"),
        (torch.tensor(KEPT).int(), r"returned int32 \[3, 4\]"),
        (torch.tensor(KEPT)[:, :2], r"returned int64 \[3, 2\], which hides 0.75"),
        (torch.tensor(KEPT)[:2], r"returned int64 \[2, 4\]"),
        (torch.tensor(KEPT).flatten(), r"returned int64 \[12\]"),
        (changed(1, 0, -1), "numbers from -1 to 7"),
        (changed(1, 3, 8), "numbers from 0 to 8"),
        (changed(2, 3, 4), "clip 2 of the batch has token 5 before token 4"),
        (changed(2, 3, 5), "clip 2 of the batch has token 5 before token 5"),
        (changed(1, 2, 3), r"slot 0 of clip 1 keeps 3.*equal_slots=False"),
    ],
)
def test_what_is_wrong_is_named(value: object, fault: str) -> None:
    expected = r"'mine' at ratio 0.5 must return 2 kept tokens of 4 in each of 2 slots: int64 \[3, 4\].* from 0 to 7"
    with pytest.raises(MaskError, match=f"{expected}; .*{fault}"):
        returning(value)(noise(), RATIO)


def test_right_masks_pass_and_come_back_as_they_are() -> None:
    kept = torch.tensor(KEPT)
    assert returning(kept)(noise(), RATIO) is kept


def test_slots_may_differ_where_the_strategy_says_so() -> None:
    whole = torch.arange(4).expand(3, -1)  # the first slot is kept, the second hidden
    assert returning(whole, equal_slots=False)(noise(), RATIO) is whole
    with pytest.raises(MaskError, match=r"4 kept tokens of 8: int64 \[3, 4\]"):
        returning(whole[:, :3], equal_slots=False)(noise(), RATIO)


def test_a_strategy_that_kept_half_at_a_ratio_of_three_quarters_is_refused() -> None:
    half = Strategy("half", (), lambda guides, ratio: torch.arange(0, 256, 2).expand(len(guides["noise"]), -1))
    with pytest.raises(MaskError, match=r"'half' at ratio 0.75 must return 64 kept tokens of 256.*hides 0.5"):
        half({"noise": torch.rand(2, 1, 256)}, 0.75)


def test_only_the_first_batch_of_each_shape_is_looked_at() -> None:
    """The check waits for the device, and must not do so in every step."""
    looks: list[int] = []

    class Watched(Tensor):
        def cpu(self, *args: object, **kwargs: object) -> Tensor:
            looks.append(len(self))
            return self.as_subclass(Tensor)

    def strategy(batch: int) -> Strategy:
        return returning(torch.tensor(KEPT)[:batch].as_subclass(Watched))

    for batch in (3, 3, 2, 3, 2):
        strategy(batch)(noise(batch), RATIO)
    assert looks == [3, 2]
    start_checks()
    strategy(3)(noise(), RATIO)
    assert looks == [3, 2, 3]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_step_is_one_graph_and_checked(compiler: str) -> None:
    torch._dynamo.reset()

    def step(choose: Callable[[Tensor], Tensor]) -> Callable[[Guides], Tensor]:
        strategy = Strategy("mine", (), lambda guides, ratio: choose(guides["noise"]))
        return torch.compile(lambda guides: strategy(guides, RATIO) + 1, fullgraph=True, backend=compiler)

    right = step(
        lambda noise: noise.argsort(dim=-1)[..., :2].sort(dim=-1).values.flatten(1) + torch.tensor([0, 0, 4, 4])
    )
    assert right(noise()).shape == (3, 4)
    start_checks()
    with pytest.raises(MaskError, match=r"'mine'.*before token"):
        step(lambda noise: noise.argsort(dim=-1)[..., :2].sort(dim=-1).values.flatten(1))(noise())


@pytest.mark.parametrize("name", sorted(set(strategy_names()) - {"cluster", "flow"}))
def test_the_packages_strategies_pass(name: str) -> None:
    strategy = get_strategy(name)
    guides = {guide: torch.rand(3, 2, 49) for guide in ("noise", *strategy.needs)}
    assert strategy(guides, 0.75).shape == (3, 2 * 13)
