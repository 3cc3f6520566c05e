"""Annotation files with millions of lines, read one line at a time: JSON lists and SQLite tables."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stm.datasets.folder import DatasetError
from stm.datasets.text_files import JSON_DECODER, text_encoding
from stm.storage.machine_errors import is_machine_error, name_file

_CHUNK = 1 << 20  # characters
_LONGEST = 1 << 24  # characters per element; prevents a file that is not a list of captions from exhausting memory
_SPACE = " \t\r\n"
_AFTER = frozenset(f"{_SPACE},]")  # characters that may follow an element

# VindLU names the file name column after the media type.
_QUERIES = {
    "filename": "SELECT id, filename, caption FROM annos ORDER BY id",
    "video": "SELECT id, video, caption FROM annos ORDER BY id",
    "image": "SELECT id, image, caption FROM annos ORDER BY id",
}


def stream_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(position, row) of each entry of a `.json` list or of the table `annos` in an SQLite file.

    A row of the table has the keys `filename` and `caption`, regardless of the column name in the file.

    Raises:
        DatasetError: the file is damaged, or does not have the expected format.
    """
    return _stream_json(path) if path.suffix == ".json" else _stream_table(path)


def _stream_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as start:
            encoding = text_encoding(start.read(4))
        with path.open(encoding=encoding) as file:
            for number, row in enumerate(_elements(_Text(file))):
                yield f"{path.name}, entry {number}", row
    except (OSError, ValueError, RecursionError) as error:
        if is_machine_error(error):
            raise name_file(error, path) from error
        raise DatasetError(f"{path}: is not a JSON list ({error}); download it again, see docs/datasets.md") from error


class _Text:
    """A sliding window over a text file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.window = ""
        self.at = 0  # index in the window
        self.ended = False

    def more(self) -> None:
        """Appends a chunk and drops the consumed characters."""
        chunk = self._file.read(_CHUNK)
        self.window = self.window[self.at :] + chunk
        self.at = 0
        self.ended = not chunk

    def peek(self) -> str:
        """The next non-white-space character; empty at the end of the file."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.window) or self.ended:
                return self.window[self.at : self.at + 1]
            self.more()


def _elements(text: _Text) -> Iterator[Any]:
    """The elements of a JSON list."""
    if text.peek() != "[":
        raise ValueError("it does not begin with [")
    text.at += 1
    if text.peek() == "]":
        return
    while True:
        text.peek()
        yield _element(text)
        separator = text.peek()
        text.at += 1
        if separator == "]":
            return
        if separator != ",":
            raise ValueError("it ends early" if not separator else f"expected , or ] but found {separator!r}")


def _element(text: _Text) -> Any:
    """The element at the current position; the window grows until it contains the whole element."""
    while True:
        try:
            value, end = JSON_DECODER.raw_decode(text.window, text.at)
            if text.ended or text.window[end : end + 1] in _AFTER:  # otherwise a number may continue in the next chunk
                text.at = end
                return value
        except json.JSONDecodeError:
            if text.ended:
                raise
        if len(text.window) - text.at > _LONGEST:
            raise ValueError("an entry is too long to be a caption")
        text.more()


def _stream_table(path: Path) -> Iterator[tuple[str, Any]]:
    # Read-only; no locks (unsupported on network disks), and no functions that views in an untrusted file could call.
    address = f"file:{quote(path.absolute().as_posix())}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.text_factory = bytes  # str would raise an error on the first text that is not UTF-8
            columns = {row[1].decode() for row in connection.execute("PRAGMA table_info(annos)")}
            named = [column for column in _QUERIES if column in columns]
            if not named or not {"id", "caption"} <= columns:
                names = ", ".join(sorted(columns)) or "none"
                raise DatasetError(f"{path}: there is no table annos(id, filename, caption); columns found: {names}")
            for number, name, caption in connection.execute(_QUERIES[named[0]]):
                yield f"{path.name}, id {number}", {"filename": _decoded(name), "caption": _decoded(caption)}
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path}: is not an SQLite file ({error}); download it again, see docs/datasets.md"
        ) from error


def _decoded(value: Any) -> Any:
    """Decodes text; invalid bytes become lone surrogates, which `text_of` rejects row by row."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
