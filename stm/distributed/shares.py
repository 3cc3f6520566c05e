"""The parts of a whole that each process has: rows of results, and random numbers of a batch.

Results are gathered without pickles, as tensors, and every row counts once. Random numbers are drawn for the whole batch by every
process, from equal states of the generator, and each process uses those of its own rows: a batch then has the same noise however
it is divided.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from stm.distributed.process import Process

_TYPES = (torch.float32, torch.float64, torch.int64)
_LONGEST = 8  # numbers that describe a tensor: its rows, type, dimensions and shape


def join_rows(process: Process, numbers: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """Join the rows of all processes in one tensor; all processes must call it together.

    Args:
        numbers: int64 [n], the places of this process's rows in the result; those of all processes are the numbers from 0 to
            total - 1.
        rows: [n, ...], float32, float64 or int64; None in a process without rows.
        total: rows of the result.

    Returns:
        [total, ...], on the CPU.

    Raises:
        ValueError: a row is missing or has come twice.
    """
    if process.count == 1:
        joined, places = rows, numbers
    else:
        joined, places = _gather_unequal(process, numbers, rows)
    if joined is None or not torch.equal(places.sort().values, torch.arange(total)):
        raise ValueError(f"the processes have {len(places)} rows, of which each of {total} must come once")
    result = torch.empty_like(joined, device="cpu")
    result[places] = joined.cpu()
    return result


def _gather_unequal(process: Process, numbers: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows and numbers of all processes in rank order, on the CPU. Shorter ones are filled up on the way."""
    own = torch.zeros(_LONGEST, dtype=torch.int64)
    if rows is not None and len(rows):
        about = [len(rows), _TYPES.index(rows.dtype), rows.dim() - 1, *rows.shape[1:]]
        own[: len(about)] = torch.tensor(about)
    told = [part.tolist() for part in process.gather(own)]
    most, kind, dimensions, *shape = max(told)
    shape = shape[:dimensions]
    padded = torch.zeros(most, *shape, dtype=_TYPES[kind])
    places = torch.zeros(most, dtype=torch.int64)
    if own[0]:
        assert rows is not None
        padded[: len(rows)], places[: len(rows)] = rows.cpu(), numbers
    parts, owners = process.gather(padded), process.gather(places)
    counts = [count for count, *_ in told]
    return tuple(
        torch.cat([part[:count] for part, count in zip(each, counts, strict=True)]) for each in (parts, owners)
    )  # type: ignore[return-value]


@dataclass(frozen=True)
class Share:
    """A process's rows of the batch of a forward pass.

    Attributes:
        rank: the process's number.
        count: the number of processes.
        paired: whether row i and row B - 1 - i of the batch's B rows are in one process; see `ClipLoader`. Otherwise the rows
            of a process lie side by side.
    """

    rank: int = 0
    count: int = 1
    paired: bool = False

    def take(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This process's rows of a tensor with a row for each of the batch's."""
        rows = whole.shape[dim] // self.count
        if not self.paired:
            return whole.narrow(dim, self.rank * rows, rows)
        half, end = rows // 2, whole.shape[dim] - self.rank * (rows // 2)
        return torch.cat([whole.narrow(dim, self.rank * half, half), whole.narrow(dim, end - half, half)], dim)


class _SharedNoise(nn.Module, ABC):
    """Multiplies by a process's part of the joint batch's noise in training."""

    def __init__(self, probability: float, share: Share) -> None:
        super().__init__()
        self.probability = probability
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        return x * self.share.take(self._draw(x))

    @abstractmethod
    def _draw(self, x: Tensor) -> Tensor:
        """Factors for all rows of the joint batch: 0 with the probability, otherwise what keeps the mean."""


class SharedDropPath(_SharedNoise):
    """timm's stochastic depth, with a process's part of the joint batch's noise."""

    def _draw(self, x: Tensor) -> Tensor:
        keep = 1 - self.probability
        return x.new_empty((len(x) * self.share.count, *[1] * (x.dim() - 1))).bernoulli_(keep) / keep


class SharedDropout(_SharedNoise):
    """torch's dropout, with a process's part of the joint batch's noise."""

    def _draw(self, x: Tensor) -> Tensor:
        whole = torch.ones_like(x).repeat(self.share.count, *[1] * (x.dim() - 1))
        return nn.functional.dropout(whole, self.probability)


class OwnNoise(nn.Module):
    """Base class of modules whose dropout each process draws for its own rows: a kernel of attention takes no noise."""

    share = Share()

    @contextmanager
    def own_noise(self, device: torch.device) -> Iterator[None]:
        """A block of the forward pass with random numbers of this process's own; a single process draws as without it.

        Their seed is drawn from the shared ones, which are the same in all processes after the block: the noise depends on the
        seed, step and rank, and a resumed run repeats it.
        """
        if self.share.count == 1 or not self.training:
            yield
            return
        generator, state = _seed_own(device, self.share.rank)
        try:
            yield
        finally:
            _restore(generator, state)


@torch.compiler.disable
def _seed_own(device: torch.device, rank: int) -> tuple[torch.Generator, Tensor]:
    """Seed a device's random numbers for this process alone; return their generator, and its state before."""
    seed = int(torch.randint(2**31, ()))
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed + rank)
    return generator, state


@torch.compiler.disable
def _restore(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def share_noise(module: nn.Module, share: Share) -> None:
    """Let stochastic depth and the dropout of `module` itself draw the noise of the joint batch; in place.

    Dropout inside other modules is not replaced; that of `OwnNoise` is drawn independently by each process.
    """
    if share.count == 1:
        return
    for name, part in list(module.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(part, DropPath):
            setattr(module.get_submodule(parent), own, SharedDropPath(part.drop_prob or 0.0, share))
        elif isinstance(part, nn.Dropout) and not parent:
            setattr(module, own, SharedDropout(part.p, share))
        elif isinstance(part, OwnNoise) and any(isinstance(p, nn.Dropout) and p.p for p in part.modules()):
            part.share = share  # without dropout, no random number is drawn, not even a seed
