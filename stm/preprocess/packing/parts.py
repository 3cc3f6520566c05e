"""What is packed beside a clip's frames: its captions and arrays, read from their tables a few clips at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stm.config import BadInput, Pack
from stm.jobs.status import Status
from stm.preprocess.captions.write import read_captions
from stm.preprocess.clip_outcomes import Outcome
from stm.preprocess.packing.tables import OK, STRICTNESS, TABLES, CaptionTable, ClipTable, Row, Values
from stm.storage.tables import DamagedError


@dataclass(frozen=True)
class Inputs:
    """The stages' tables of one shard."""

    captions: Mapping[str, Path] = field(default_factory=dict)  # by source
    # By array; where each caption source has its own, by source.
    arrays: Mapping[str, Path | Mapping[str, Path] | None] = field(default_factory=dict)

    def of_clips(self, array: str) -> Path:
        """The table of an array that does not depend on captions.

        Raises:
            ValueError: it was not given.
        """
        path = self.arrays.get(array)
        if not isinstance(path, Path):
            raise _missing(array)
        return path

    def of_source(self, array: str, source: str) -> Path:
        """One caption source's table of an array.

        Raises:
            ValueError: it was not given.
        """
        paths = self.arrays.get(array)
        if not isinstance(paths, Mapping) or source not in paths:
            raise _missing(array)
        return paths[source]


def _missing(part: str) -> ValueError:
    return ValueError(f"pack.{part} is set, but no table of {part} was given")


class ClipParts(NamedTuple):
    """What a clip has beside its frames; captions are those of all sources, in the order of the sources."""

    captions: list[str]
    sources: list[str]  # of each caption
    arrays: dict[str, Values]  # by name, in the order of the tar; only those that there are
    outcome: Outcome  # the strictest one of the stages that made the parts


def join_parts(kept: Sequence[Row], inputs: Inputs, pack: Pack, grid: int, bad_input: BadInput) -> Iterator[ClipParts]:
    """The parts of each kept clip, in order.

    A clip that some of the sources have no caption for keeps those of the others; their outcome counts when it has no
    caption at all, or when the policy for it is `fail`.

    Args:
        inputs: only the tables that `pack` asks for are read.

    Raises:
        ValueError: a table that is needed was not given.
        DamagedError: a table that is needed is torn, or does not belong to these frames.
    """
    sources = [_Source(name, inputs, pack, grid, bad_input) for name in pack.sources]
    tables: dict[str, ClipTable] = {}
    for array in pack.arrays:
        table = TABLES[array.name]
        if issubclass(table, ClipTable):
            tables[array.name] = table(inputs.of_clips(array.name), grid)
    for row in kept:
        of_sources = [source.find(row) for source in sources]
        of_clip = {name: table.find(row) for name, table in tables.items()}
        found = {name: values for name, (values, _) in of_clip.items()}
        for name in of_sources[0].arrays if of_sources else ():
            found[name] = _concatenate(name, [part.arrays[name] for part in of_sources])
        arrays = {array.name: values for array in pack.arrays if (values := found[array.name]) is not None}
        yield ClipParts(
            captions=[text for part in of_sources for text in part.captions],
            sources=[part.source for part in of_sources for _ in part.captions],
            arrays=arrays,
            outcome=_strictest([_join_outcomes(of_sources), *(outcome for _, outcome in of_clip.values())]),
        )


def _strictest(outcomes: Sequence[Outcome]) -> Outcome:
    return min(outcomes, key=lambda o: (STRICTNESS[o.policy], o.status == Status.OK))


def _concatenate(name: str, parts: Sequence[Values | None]) -> Values | None:
    """An array's values of several sources, caption after caption; sources without captions have none."""
    present = [values for values in parts if values is not None]
    if len({values.shape[1:] for values in present}) > 1:  # maps of one clip always agree, vectors need not
        raise DamagedError(
            f"{name} arrays of {' and '.join(str(values.shape[-1]) for values in present)} numbers are to be packed "
            f"together: they are of different models. Remove the {name} tables and run again"
        )
    return np.concatenate(present) if present else None


# -------------------------------------------------------------------------------------------- a caption source


class _SourceParts(NamedTuple):
    """What one source has on a clip."""

    source: str
    captions: list[str]
    arrays: dict[str, Values | None]
    outcome: Outcome


def _join_outcomes(parts: Sequence[_SourceParts]) -> Outcome:
    """The sources' outcome: `ok` as soon as one has a caption, unless another's policy is `fail`."""
    if not parts:
        return OK
    captioned = any(part.captions for part in parts)
    return _strictest([p.outcome for p in parts if p.captions or not captioned or p.outcome.policy == "fail"])


class _Source:
    """The tables of one caption source."""

    def __init__(self, name: str, inputs: Inputs, pack: Pack, grid: int, bad_input: BadInput) -> None:
        if name not in inputs.captions:
            raise _missing("captions")
        self._name = name
        self._bad_input = bad_input
        self._path = inputs.captions[name]
        self._captions = read_captions(self._path)
        self._tables: dict[str, CaptionTable] = {}
        for array in pack.arrays:
            table = TABLES[array.name]
            if issubclass(table, CaptionTable):
                self._tables[array.name] = table(inputs.of_source(array.name, name), grid)

    def find(self, clip: Row) -> _SourceParts:
        if clip["key"] not in self._captions:
            raise DamagedError(
                f"{self._path}: has nothing on the kept clip {clip['video_id']!r}: it was made from other frames"
            )
        texts, status, detail = self._captions[clip["key"]]
        captions = [text for _, text in texts]
        arrays = {name: table.find(clip, captions) for name, table in self._tables.items()}
        return _SourceParts(self._name, captions, arrays, Outcome(status, self._bad_input.action(status), detail))
