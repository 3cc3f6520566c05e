"""A process's part of a whole: rows that are joined in order, and random numbers of the joint batch."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from stm.distributed.process import Process
from stm.distributed.shares import OwnNoise, Share, SharedDropout, SharedDropPath, join_rows, share_noise

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scripted(Process):
    """One of several processes, whose others are known: what they contribute to each gathering, in order."""

    others: tuple[list[Tensor], ...] = ()

    def gather(self, row: Tensor) -> list[Tensor]:
        given = [other.pop(0) for other in self.others]
        return [row, *(torch.cat([g, g.new_zeros(len(row) - len(g), *g.shape[1:])]) for g in given)]


def test_rows_are_joined_by_their_numbers() -> None:
    rows = torch.tensor([[3.0], [1.0], [2.0]])
    joined = join_rows(Process(0, 1, CPU), torch.tensor([2, 0, 1]), rows, 3)
    assert joined.tolist() == [[1.0], [2.0], [3.0]]


def test_processes_with_fewer_rows_or_none_are_joined_too() -> None:
    few = [torch.tensor([1, 2, 1, 2, 0, 0, 0, 0]), torch.tensor([[9, 8]]), torch.tensor([1])]
    none = [torch.zeros(8, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]
    process = Scripted(0, 3, CPU, (few, none))
    joined = join_rows(process, torch.tensor([0, 2]), torch.tensor([[1, 2], [3, 4]]), 3)
    assert joined.tolist() == [[1, 2], [9, 8], [3, 4]] and joined.dtype == torch.int64


@pytest.mark.parametrize("numbers", [[0, 1], [0, 1, 1], [0, 1, 3]])
def test_a_row_that_is_missing_or_comes_twice_is_an_error(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="each of 3 must come once"):
        join_rows(Process(0, 1, CPU), torch.tensor(numbers), torch.zeros(len(numbers), 2), 3)


def test_pairs_of_mirrored_rows_are_in_one_process() -> None:
    whole = torch.arange(12)
    parts = [Share(rank, 3, paired=True).take(whole).tolist() for rank in range(3)]
    assert parts == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert [Share(rank, 3).take(whole).tolist() for rank in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("one", "shared"), [(DropPath, SharedDropPath), (nn.Dropout, SharedDropout)])
def test_noise_is_that_of_the_joint_batch(
    one: Callable[[float], nn.Module], shared: Callable[[float, Share], nn.Module], paired: bool
) -> None:
    x = torch.randn(8, 3, 5)
    torch.manual_seed(1)
    expected = one(0.4)(x)
    assert (expected == 0).any() and (expected != 0).any()
    for rank in range(2):
        share = Share(rank, 2, paired)
        torch.manual_seed(1)
        assert torch.equal(shared(0.4, share)(share.take(x)), share.take(expected))
        assert torch.equal(shared(0.4, share).eval()(x), x)


def test_dropout_of_a_module_itself_is_shared_and_that_of_its_parts_is_not() -> None:
    def make() -> nn.Module:
        module = nn.Module()
        module.dropout, module.block = nn.Dropout(0.1), nn.ModuleList([DropPath(0.2), nn.Dropout(0.3)])
        return module

    module, alone = make(), make()
    share_noise(module, Share(1, 2))
    share_noise(alone, Share())
    assert [type(part) for part in module.modules()][1:] == [SharedDropout, nn.ModuleList, SharedDropPath, nn.Dropout]
    assert [type(part) for part in alone.modules()][1:] == [nn.Dropout, nn.ModuleList, DropPath, nn.Dropout]


class Text(OwnNoise):
    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        with self.own_noise(x.device):
            dropped: Tensor = self.dropout(x)
        return dropped


def test_dropout_of_a_text_is_independent_in_each_process_and_the_shared_numbers_stay_equal() -> None:
    def draw(rank: int, count: int, probability: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
        text = Text(probability)
        share_noise(nn.ModuleDict({"text": text}), Share(rank, count))
        torch.manual_seed(1)
        return text(torch.ones(20_000)), text(torch.ones(20_000)), torch.rand(3)

    alone, first, second = draw(0, 1), draw(0, 2), draw(1, 2)
    torch.manual_seed(1)
    assert torch.equal(alone[0], nn.Dropout(0.5)(torch.ones(20_000)))
    masks = [*first[:2], *second[:2]]  # of two passes in two processes
    agreement = [(a == b).float().mean().item() for n, a in enumerate(masks) for b in masks[:n]]
    assert agreement == pytest.approx([0.5] * 6, abs=0.02)
    assert torch.equal(first[2], second[2])
    assert torch.equal(torch.stack(draw(1, 2)[:2]), torch.stack(second[:2]))
    found = draw(1, 2, probability=0)[2]
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(3))  # without dropout, the numbers of one process
