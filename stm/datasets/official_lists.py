"""Code shared by all benchmarks: their known properties, and reading their official lists."""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.file_names import SimilarNames, bare_name, describe_similar
from stm.datasets.folder import DatasetError
from stm.datasets.text_files import BadRow, BrokenQuotesError, parse_json, read_records, text_encoding
from stm.storage.files import sha256_file
from stm.storage.machine_errors import is_machine_error, name_file


@dataclass(frozen=True)
class Typical:
    """A typical clip, for the plan; replaced by the real numbers once the manifest exists."""

    frames: int  # as encoded in the source
    width: int  # pixels
    height: int
    basis: str  # source of the numbers


@dataclass(frozen=True)
class Entry:
    """A line of an official list: a clip whose file has not been located yet.

    `clip.path` is the file's official name. Its folders are not trusted: files are found by name anywhere under the root,
    so no list can refer to a file outside it.
    """

    clip: AnnotatedClip
    other_names: tuple[str, ...] = ()  # alternative file names in copies of the dataset, without extension
    folders: tuple[str, ...] = ()  # folders in which a file with this name is preferred, most preferred first
    problem: str = ""  # why the line is unusable

    @property
    def name(self) -> str:
        """The official file name without folders and extension; lists may leave the extension out."""
        return bare_name(self.clip.path.rpartition("/")[2])


@dataclass(frozen=True)
class Settings:
    """The settings of a BenchmarkDataset that its clips depend on."""

    fold: int = 1
    label: str = "action"


@dataclass
class Annotations:
    """The folder of the official files, as downloaded; records the hash of each file that is read."""

    folder: Path
    title: str
    subfolders: tuple[str, ...] = ()  # subfolders used by the dataset's archives
    lists_from: str = "its publisher"  # download location, for messages
    hashes: dict[Path, str] = field(default_factory=dict)  # SHA-256 of the files read, by path relative to the folder

    def find(self, *names: str) -> Path:
        """The first of these files that exists, in the folder, a known subfolder or another one at most two levels down.

        Raises:
            DatasetError: none of the files exists, or several other subfolders have one and these differ.
        """
        found = self._search(lambda folder: next(([folder / n] for n in names if (folder / n).is_file()), []))
        if not found:
            raise self._missing(names)
        return found[0]

    def find_all(self, pattern: str) -> list[Path]:
        """The files that match a pattern in the first folder that has any, sorted; searched as in `find`."""
        found = self._search(lambda folder: sorted(folder.glob(pattern)))
        if not found:
            raise self._missing((pattern,))
        return found

    def _search(self, look: Callable[[Path], list[Path]]) -> list[Path]:
        """What `look` finds in the first folder in which it finds anything."""
        for subfolder in ("", *self.subfolders):
            if found := look(self.folder / subfolder):
                return found
        # An archive unpacked in another way: GitHub's, for instance, make a folder that is named after a branch.
        for level in self._levels:
            places = [found for folder in level if (found := look(folder))]
            if len({tuple((path.name, sha256_file(path)) for path in found) for found in places}) > 1:
                shown = ", ".join(f"{found[0].parent.relative_to(self.folder)}/" for found in places)
                raise DatasetError(
                    f"dataset.annotations: {self.folder} has different files called {places[0][0].name} in {shown}; name the "
                    f"folder with the lists of {self.title}"
                )
            if places:
                return places[0]
        return []

    @cached_property
    def _levels(self) -> list[list[Path]]:
        """The subfolders, and their subfolders, sorted and without hidden ones."""
        first = _subfolders(self.folder)
        return [first, [below for folder in first for below in _subfolders(folder)]]

    def _missing(self, names: Sequence[str]) -> DatasetError:
        if not self.folder.is_dir():
            return DatasetError(
                f"dataset.annotations: {self.folder} is not a folder; it must hold the lists of {self.title}"
            )
        missing = f"none of {', '.join(names)}" if len(names) > 1 else f"no {names[0]}"
        folders = [self.folder, *chain.from_iterable(self._levels)]
        files = (path for folder in folders for path in folder.glob(f"*{Path(names[0]).suffix}"))
        similar = SimilarNames((path.relative_to(self.folder).as_posix() for path in islice(files, 1000)), fuzzy=True)
        found = list(dict.fromkeys(path for name in names for path in similar.find(name)))
        return DatasetError(
            f"dataset.annotations: {self.folder} must hold {self.title}'s official lists, but there is {missing} in it or up to "
            f"two levels below{describe_similar(found)}. Get it from {self.lists_from} (docs/datasets.md)"
        )

    def text(self, path: Path) -> str:
        try:
            data = path.read_bytes()
            self.hashes[path.relative_to(self.folder)] = hashlib.sha256(data).hexdigest()
            # Published lists may begin with a byte order mark.
            return data.decode(text_encoding(data[:4]))
        except (OSError, UnicodeError) as error:
            if is_machine_error(error):
                raise name_file(error, path) from error
            raise DatasetError(f"{path}: cannot be read ({error}); download it again, see docs/datasets.md") from error

    def lines(self, path: Path) -> list[tuple[str, str]]:
        """(position, line) of each non-empty line."""
        lines = enumerate(self.text(path).splitlines(), 1)
        return [(f"{path.name}, line {number}", line.strip()) for number, line in lines if line.strip()]

    def csv(self, path: Path, columns: Sequence[str]) -> list[tuple[str, Any]]:
        """(position, values by column, or BadRow) of each row of a file whose header contains `columns`."""
        names: list[str] = []
        rows: list[tuple[str, Any]] = []
        try:
            for record in read_records(io.StringIO(self.text(path), newline=""), ","):
                where = f"{path.name}, line {record.line}"
                if record.last_line > record.line:  # no official list has one, so a quotation mark is misplaced
                    raise BrokenQuotesError(
                        f"line {record.line}: a quoted field spans the lines {record.line} to {record.last_line}"
                    )
                if isinstance(record.fields, BadRow):
                    rows.append((where, record.fields))
                elif names:
                    # Missing fields are handled by `text_of`, whose error names the row.
                    rows.append((where, dict(zip(names, chain(record.fields, repeat("")), strict=False))))
                else:
                    names = record.fields
                    _check_columns(path, names, columns)
        except BrokenQuotesError as error:
            raise DatasetError(
                f"{path}: is not a CSV file ({error}); download it again, see docs/datasets.md"
            ) from error
        if not names:
            _check_columns(path, names, columns)
        return rows

    def json(
        self,
        path: Path,
        kind: type[list[Any]] | type[dict[str, Any]],
        recognise: Callable[[Any], str] = lambda value: "",
    ) -> Any:
        """The contents of a JSON file whose top-level value is a list or an object.

        Args:
            recognise: returns whose format the contents have instead of the expected one; empty if none is known.
        """
        try:
            value = parse_json(self.text(path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DatasetError(
                f"{path}: is not a JSON file ({error}); download it again, see docs/datasets.md"
            ) from error
        if whose := recognise(value):
            raise DatasetError(
                f"{path}: is in the format of {whose}, not in that of {self.title}'s lists. Get them from {self.lists_from} "
                "(docs/datasets.md)"
            )
        if not isinstance(value, kind):
            what = "a list" if kind is list else "an object"
            raise DatasetError(f"{path}: must hold {what}, holds {str(value)[:60]!r}; is it the official file?")
        return value

    def json_rows(self, path: Path, recognise: Callable[[Any], str] = lambda value: "") -> list[tuple[str, Any]]:
        """(position, row) of each row of a JSON list; see `json`."""
        rows = self.json(path, list, recognise)
        return [(f"{path.name}, entry {number}", row) for number, row in enumerate(rows)]


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        if is_machine_error(error):
            raise
        return []


def _check_columns(path: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in names]
    if missing:
        raise DatasetError(
            f"{path}: there is no column `{missing[0]}`, the columns are: {', '.join(names) or 'none'}; is it the official "
            "file?"
        )


@dataclass(frozen=True)
class Benchmark:
    """The properties of a benchmark that are known without its data."""

    source: str  # `dataset.source` in a config; also in `BenchmarkSource` (stm/config/data.py)
    title: str
    counts: Mapping[int, Mapping[str, int]]  # clips per split, for each fold; benchmarks without folds have only fold 1
    typical: Typical
    lists_from: str  # download location of the lists, for messages
    subfolders: tuple[str, ...]
    read: Callable[[Annotations, Settings], Iterable[Entry]]

    def official(self, fold: int) -> Mapping[str, int]:
        return self.counts[fold if fold in self.counts else 1]


def make_entries(split: str, rows: Iterable[tuple[str, Any]], make: Callable[[Any, str], Entry]) -> Iterator[Entry]:
    """One entry per row of a list, in order; a row that cannot be used becomes an entry with a problem.

    Args:
        rows: (position of the row, for messages; the row).
        make: returns the entry of a row and a split; raises BadRow.
    """
    for where, row in rows:
        try:
            yield make(row, split)
        except BadRow as error:
            yield Entry(AnnotatedClip("", split, where), problem=f"{where}: {error}")


def text_of(row: Any, key: str) -> str:
    """A value of a row as text, without surrounding white space.

    Raises:
        BadRow: the value is missing, not finite, or cannot be encoded as UTF-8 (JSON can encode half of a surrogate pair);
            or the row itself is one.
    """
    if isinstance(row, BadRow):
        raise row
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise BadRow(f"has no `{key}`: {str(row)[:80]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"`{key}` is {value!r}")
    text = str(value).strip()
    if not text:
        raise BadRow(f"`{key}` is empty")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"`{key}` is not valid Unicode: {text!r:.80}")
    return text


def integer_of(row: Any, key: str) -> int:
    """An integer value of a row; some releases write integers as `59.0`."""
    text = text_of(row, key)
    try:
        number = float(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise BadRow(f"`{key}` must be a whole number, is {text!r}")
