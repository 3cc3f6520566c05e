"""Captions and arrays that are packed with a clip's frames, read from their tables a few clips at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stm.config import BadInput, Pack
from stm.jobs.status import Status
from stm.preprocess.captions.write import read_captions
from stm.preprocess.clip_outcomes import STRICTNESS, Outcome
from stm.preprocess.packing.tables import CaptionTable, ClipTable, Row, Values, table_of
from stm.storage.tables import DamagedError, read_receipt


@dataclass(frozen=True)
class Inputs:
    """The tables of one shard, as written by the stages."""

    captions: Mapping[str, Path] = field(default_factory=dict)  # by source
    # By array name, and for arrays with one table per caption source, then by source.
    arrays: Mapping[str, Path | Mapping[str, Path] | None] = field(default_factory=dict)

    def of_clips(self, array: str) -> Path:
        """Return the table of an array that does not depend on captions.

        Raises:
            ValueError: no table was given.
        """
        path = self.arrays.get(array)
        if not isinstance(path, Path):
            raise _missing(array)
        return path

    def of_source(self, array: str, source: str) -> Path:
        """Return the table of an array for one caption source.

        Raises:
            ValueError: no table was given.
        """
        paths = self.arrays.get(array)
        if not isinstance(paths, Mapping) or source not in paths:
            raise _missing(array)
        return paths[source]

    def receipts(self) -> dict[str, dict[str, Any]]:
        """Return the receipts of all tables, by `{array}`, or by `{array}/{source}` if there is one table per source."""
        paths = {f"captions/{source}": path for source, path in self.captions.items()}
        for array, tables in self.arrays.items():
            if isinstance(tables, Mapping):
                paths |= {f"{array}/{source}": path for source, path in tables.items()}
            elif tables is not None:
                paths[array] = tables
        return {name: read_receipt(path) for name, path in paths.items()}


def _missing(part: str) -> ValueError:
    return ValueError(f"pack.{part} is set, but no table of {part} was given")


class ClipParts(NamedTuple):
    """A clip's data other than its frames, with the captions of all sources in source order."""

    captions: list[str]
    sources: list[str]  # the source of each caption
    arrays: dict[str, Values]  # by name, in tar order; absent arrays are omitted
    outcome: Outcome  # the strictest outcome of the stages that produced the parts


def join_parts(kept: Sequence[Row], inputs: Inputs, pack: Pack, grid: int, bad_input: BadInput) -> Iterator[ClipParts]:
    """Yield the parts of each kept clip, in order.

    A clip that lacks captions from some sources keeps the captions from the others. The outcome of a source without a
    caption counts only if the clip has no caption at all, or if the outcome's policy is `fail`.

    Args:
        kept: rows of the frames index.
        inputs: the tables, of which only those of packed parts are read.
        grid: cells along the short side of a map.

    Raises:
        ValueError: the table of a packed part was not given.
        DamagedError: the table of a packed part is damaged, or was made from different frames.
    """
    sources = [_Source(name, inputs, pack, grid, bad_input) for name in pack.sources]
    tables: dict[str, ClipTable] = {}
    for array in pack.arrays:
        table = table_of(array)
        if issubclass(table, ClipTable):
            tables[array.name] = table(array, inputs.of_clips(array.name), grid)
    for row in kept:
        source_parts = [source.find(row) for source in sources]
        clip_parts = {name: table.find(row) for name, table in tables.items()}
        values_by_name = {name: values for name, (values, _) in clip_parts.items()}
        for name in source_parts[0].arrays if source_parts else ():
            values_by_name[name] = _concatenate(name, [part.arrays[name] for part in source_parts])
        arrays = {array.name: values for array in pack.arrays if (values := values_by_name[array.name]) is not None}
        yield ClipParts(
            captions=[text for part in source_parts for text in part.captions],
            sources=[part.source for part in source_parts for _ in part.captions],
            arrays=arrays,
            outcome=_strictest([_join_outcomes(source_parts), *(outcome for _, outcome in clip_parts.values())]),
        )


def _strictest(outcomes: Sequence[Outcome]) -> Outcome:
    # Among equal policies, prefer a status other than `ok`, because it is more informative.
    return min(outcomes, key=lambda o: (STRICTNESS[o.policy], o.status == Status.OK))


def _concatenate(name: str, parts: Sequence[Values | None]) -> Values | None:
    """Concatenate the values of all sources, [captions, ...]; None stands for a source without captions."""
    present = [values for values in parts if values is not None]
    # Maps of one clip always agree in shape, but vectors of two encoders may not.
    if len({values.shape[1:] for values in present}) > 1:
        raise DamagedError(
            f"{name} arrays with {' and '.join(str(values.shape[-1]) for values in present)} values cannot be packed "
            f"together: they were made by different models. Remove the {name} tables and run again"
        )
    return np.concatenate(present) if present else None


# -------------------------------------------------------------------------------------------- a caption source


class _SourceParts(NamedTuple):
    """Captions and arrays of a clip from one source."""

    source: str
    captions: list[str]
    arrays: dict[str, Values | None]
    outcome: Outcome


def _join_outcomes(parts: Sequence[_SourceParts]) -> Outcome:
    """Return the joint outcome of all sources: `ok` if any has a caption, unless the policy of any other is `fail`."""
    if not parts:
        return Outcome(Status.OK, "keep", "")
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
            table = table_of(array)
            if issubclass(table, CaptionTable):
                self._tables[array.name] = table(array, inputs.of_source(array.name, name), grid)

    def find(self, clip: Row) -> _SourceParts:
        """Return the captions and arrays of a clip.

        Raises:
            DamagedError: a table has no row for the clip, or the captions and arrays do not belong together.
        """
        if clip["key"] not in self._captions:
            raise DamagedError(
                f"{self._path}: has no row for the kept clip {clip['video_id']!r}: it was made from different frames. Remove "
                "it and run again"
            )
        texts, status, detail = self._captions[clip["key"]]
        captions = [text for _, text in texts]
        arrays = {name: table.find(clip, captions) for name, table in self._tables.items()}
        return _SourceParts(self._name, captions, arrays, Outcome(status, self._bad_input.action(status), detail))
