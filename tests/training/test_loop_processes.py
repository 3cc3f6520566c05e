"""What the loop does differently in each of several processes, seen from one: its own noise, and when gradients are exchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from twin_process import Twin

from stm.config import Optimisation
from stm.data.loader import Batch
from stm.training.loop import TrainingPlan, fit

STEPS = 3


class Recorded(nn.Module):
    """Its loss is 0; keeps each pass's random number, and whether gradients would be exchanged after it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.noise: list[float] = []
        self.exchanged: list[bool] = []
        self.synchronised = True

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.noise.append(torch.rand(()).item())
        self.exchanged.append(self.synchronised)
        return {"loss": self.weight * 0}


class Wrapped(DistributedDataParallel):
    """Like DDP for the loop, without a process group."""

    def __init__(self, module: Recorded) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.module.synchronised = False
        yield
        self.module.synchronised = True


class OneOfTwo(Twin):
    def wrap(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, Recorded)
        return Wrapped(module)


def train(folder: Path, rank: int, seed: int, accumulate: int = 2) -> Recorded:
    module = Recorded()
    settings = Optimisation(epochs=1, batch_size=4, accumulate=accumulate, warmup_epochs=0)

    def batches(step: int) -> Iterator[Batch]:
        for _ in range((STEPS - step) * accumulate):
            yield {"video": torch.zeros(2)}

    fit(module, batches, TrainingPlan("test", settings, STEPS, seed), folder, OneOfTwo(rank, 2, torch.device("cpu")))
    return module


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_gradients_are_exchanged_with_the_last_pass_of_a_step_alone(accumulate: int, tmp_path: Path) -> None:
    found = train(tmp_path, 0, 1, accumulate).exchanged
    assert found == ([False] * (accumulate - 1) + [True]) * STEPS


def test_each_process_and_seed_has_noise_of_its_own(tmp_path: Path) -> None:
    found = {
        (rank, seed): tuple(train(tmp_path / f"{rank}-{seed}", rank, seed).noise) for rank in (0, 1) for seed in (1, 2)
    }
    assert len({value for noise in found.values() for value in noise}) == 4 * 2 * STEPS
    torch.manual_seed(99)  # whatever the process did before
    assert tuple(train(tmp_path / "again", 1, 2).noise) == found[1, 2]
