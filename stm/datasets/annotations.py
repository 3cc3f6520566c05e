"""Annotation files of a folder of videos: CSV, TSV, JSON, JSON lines or Parquet, read into rows of plain values.

An unusable file is an error; an unusable row is a `BadRow`, and the other rows are kept.
"""

import csv
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from stm.datasets.file_names import VIDEO_ENDINGS
from stm.datasets.text_files import (
    BadRow,
    BrokenQuotesError,
    CsvRecord,
    parse_json,
    read_records,
    text_encoding,
)
from stm.manifest import Question
from stm.storage.machine_errors import is_machine_error, name_file

COLUMNS = ("path", "video_id", "split", "label", "caption", "captions", "start", "end", "questions")
_NUMBERED_CAPTION = re.compile(r"caption_\d{1,9}")
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # same pattern as `Name` in stm/config/base.py
# By file extension, the delimiters that are tried; spreadsheets of many countries write semicolons into `.csv`.
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t,;"}


class AnnotationError(ValueError):
    """An unusable annotation file; the message contains the file and the remedy."""


@dataclass(frozen=True, slots=True)
class AnnotatedClip:
    """A clip as described in the annotations, before its file is opened."""

    path: str
    split: str
    video_id: str | None = None
    label: str | None = None
    captions: tuple[str, ...] = ()
    start: float | None = None  # seconds
    end: float | None = None
    questions: tuple[Question, ...] = ()


def read_annotations(file: Path, more: Collection[str] = ()) -> list[tuple[str, Any]]:
    """Reads a file's rows without validating them.

    Args:
        more: columns that are used besides `COLUMNS`.

    Returns:
        (position of the row, for messages; its values, a mapping in a valid file) per row.

    Raises:
        AnnotationError: the file is missing or damaged, its format is unknown, or it has no column `path`.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".ndjson": _read_json_lines,
        ".parquet": partial(_read_parquet, more=more),
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise AnnotationError(f"{file}: unknown format of annotations; use one of {', '.join(sorted(readers))}")
    try:
        rows = list(reader(file))
    except UnicodeError as error:
        raise AnnotationError(
            f"{file}: cannot be read as {file.suffix.lower()[1:]} ({error}); save it as UTF-8"
        ) from error
    except (OSError, csv.Error, json.JSONDecodeError, RecursionError, pa.ArrowException) as error:
        if is_machine_error(error):
            raise name_file(error, file) from error
        raise AnnotationError(f"{file}: cannot be read as {file.suffix.lower()[1:]} ({error})") from error
    columns = {str(key) for _, row in rows if isinstance(row, Mapping) for key in row}
    if rows and not columns:
        where, first = rows[0]
        reason = first if isinstance(first, BadRow) else f"must be an object with a `path`, is {_show(first)}"
        raise AnnotationError(f"{file}: no row can be used; the first, {where}: {reason}")
    if rows and "path" not in columns:
        raise AnnotationError(f"{file}: there is no column `path`; the columns are: {_list_names(sorted(columns))}")
    unknown = sorted(name for name in columns if not _is_used(name, more) and name != _REST)
    if unknown:
        warnings.warn(f"{file}: unused columns: {_list_names(unknown)}", stacklevel=2)
    return rows


_LISTED = 20  # column names in a message
_LONGEST = 80  # characters of a name or value in a message


def _list_names(names: Iterable[str]) -> str:
    """The first of some column names; a table may have thousands, or names of thousands of characters."""
    shown = [name[:_LONGEST] or "(no name)" for name in names]
    more = f", and {len(shown) - _LISTED:,} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more


_REST = "(more fields than columns)"


def _open_text(file: Path) -> TextIO:
    """Open a text file in its encoding, with its line ends unchanged, as the csv module requires."""
    with file.open("rb") as stream:
        encoding = text_encoding(stream.read(4))
    return file.open(encoding=encoding, newline="")


def _read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    with _open_text(file) as stream:
        skipped = 0  # lines before the header
        for header in stream:
            if header.strip() and not header.startswith("sep="):  # spreadsheets announce their delimiter: `sep=;`
                break
            skipped += 1
        else:
            raise AnnotationError(f"{file}: its first line has no column `path`: (empty file)")
        delimiter = _find_delimiter(header, _DELIMITERS[file.suffix.lower()])
        names: list[str] = []
        try:
            for record in read_records(chain([header], stream), delimiter, first_line=skipped + 1):
                if not names:
                    names = _check_header(file, record)
                elif isinstance(record.fields, BadRow):
                    yield f"line {record.line}", record.fields
                elif any(value.strip() for value in record.fields):
                    _refuse_swallowed_rows(file, record, names.index("path"), delimiter)
                    yield f"line {record.line}", _make_mapping(names, record.fields)
        except BrokenQuotesError as error:
            raise AnnotationError(f"{file}: {error}") from None


def _find_delimiter(header: str, candidates: str) -> str:
    """The first delimiter with which the header has the column `path`; the usual one if none has."""
    for delimiter in candidates:
        if any("path" in (name.strip() for name in row) for row in csv.reader([header], delimiter=delimiter)):
            return delimiter
    return candidates[0]


def _check_header(file: Path, header: CsvRecord) -> list[str]:
    """The column names, without surrounding white space."""
    if isinstance(header.fields, BadRow):
        raise AnnotationError(f"{file}: line {header.line}: {header.fields}")
    names = [name.strip() for name in header.fields]
    named = [name for name in names if name]  # spreadsheets may add columns without a name
    if "path" not in named or len(set(named)) < len(named):
        what = "a column name twice" if "path" in names else "no column `path`"
        raise AnnotationError(f"{file}: its first line has {what}: {_list_names(names)}")
    return names


def _make_mapping(names: list[str], values: list[str]) -> dict[str, Any]:
    # CSV does not distinguish an empty string from a missing value. Every row has a path, if only an empty one.
    row: dict[str, Any] = {
        name: value for name, value in zip(names, values, strict=False) if value != "" or name == "path"
    }
    if len(values) > len(names):
        row[_REST] = values[len(names) :]
    return row


def _refuse_swallowed_rows(file: Path, record: CsvRecord, column: int, delimiter: str) -> None:
    """Reject a field with line breaks that contains what looks like rows: its quotation mark is probably a mistake.

    Such rows would vanish into the text of another one. A row is recognised by its path: an extension of the record's own
    path or of a video, or a path without extension in a line with all columns.

    Args:
        column: index of the column `path`.
    """
    assert not isinstance(record.fields, BadRow)
    if record.line == record.last_line:
        return
    own = record.fields[column] if column < len(record.fields) else ""
    endings = {PurePosixPath(own).suffix.lower(), *VIDEO_ENDINGS} - {""}
    for field in record.fields:
        for number, line in enumerate(field.splitlines()[1:], 1):
            parts = [part.strip(' "') for part in line.split(delimiter)]
            path = parts[column] if column < len(parts) and len(parts) > min(1, len(record.fields) - 1) else ""
            bare = not PurePosixPath(own).suffix and len(parts) == len(record.fields) and path and " " not in path
            if bare or PurePosixPath(path).suffix.lower() in endings or field is own:
                raise AnnotationError(
                    f"{file}: line {record.line}: a quoted field spans lines {record.line} to {record.last_line}, and its "
                    f"{_ordinal(number + 1)} line looks like a row: {_show(line)}. Close the quotation mark, or write a "
                    'quotation mark that is part of the text as two: "a 5"" screen"'
                )


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(file)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON lines with a .json extension
            yield from _parse_lines(text)
            return
        raise
    if isinstance(value, BadRow):
        raise AnnotationError(f"{file}: {value}")
    if isinstance(value, dict) and isinstance(value.get("clips"), list):
        value = value["clips"]
    elif isinstance(value, dict) and "path" in value:
        value = [value]
    if not isinstance(value, list):
        raise AnnotationError(f'{file}: must hold a list of clips, or {{"clips": [...]}}, or one clip per line')
    yield from ((f"clip {number}", row) for number, row in enumerate(value))


def _read_text(file: Path) -> str:
    with _open_text(file) as stream:
        return stream.read()


def _read_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    yield from _parse_lines(_read_text(file))


def _parse_lines(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", parse_json(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield f"line {number}", BadRow(f"not JSON: {error}")


def _is_used(name: str, more: Collection[str]) -> bool:
    return name in COLUMNS or name in more or _NUMBERED_CAPTION.fullmatch(name) is not None


def _read_parquet(file: Path, more: Collection[str]) -> Iterator[tuple[str, Any]]:
    names = pq.read_schema(file).names
    if "path" not in names:
        raise AnnotationError(f"{file}: there is no column `path`; the columns are: {_list_names(names)}")
    if len(set(names)) < len(names):
        raise AnnotationError(f"{file}: has a column name twice: {_list_names(names)}")
    # Other columns may be large, or hold values that Python cannot represent, such as times with nanoseconds.
    unused = {name: None for name in names if not _is_used(name, more)}
    table = pq.read_table(file, columns=[name for name in names if name not in unused])
    for number, row in enumerate(table.to_pylist()):
        yield f"row {number}", row if number else unused | row


# ------------------------------------------------------------------------------------------------------- rows


def parse_row(row: Any, default_split: str) -> AnnotatedClip:
    """Parses and validates one row.

    Raises:
        BadRow: the row is unusable; the message contains the column, the value and the allowed values.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow(f"must be an object with a `path`, is {_show(row)}")
    if row.get(_REST):
        raise BadRow(f"has more fields than the first line has columns: {_show(row[_REST])}")
    path = row.get("path")
    if not isinstance(path, str) or not path.strip() or "\x00" in path:
        raise BadRow(f"path must be a file's path, is {_show(path)}")
    split = _text(row, "split") or default_split
    if not _SPLIT.fullmatch(split):
        raise BadRow(f"split must be letters, digits, _ and -, at most 64, is {_show(split)}")
    start, end = _number(row, "start"), _number(row, "end")
    if (end is not None and (start or 0.0) >= end) or (start is not None and start < 0):
        raise BadRow(f"start and end must be 0 <= start < end, are {start} and {end}")
    return AnnotatedClip(
        path=PurePosixPath(path).as_posix(),  # `./a.mp4` and `a.mp4` are the same file
        split=split,
        video_id=_text(row, "video_id"),
        label=_plain_label(_text(row, "label")),
        captions=tuple(_captions(row)),
        start=start,
        end=end,
        questions=tuple(_questions(row.get("questions"))),
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _check_text(value: str, name: str) -> str:
    """Checks that a text can be encoded as UTF-8; JSON can contain lone surrogates, which cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not valid Unicode: {value!r:.80}") from None
    return value


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """A string without surrounding white space, or an integer as one, because labels and ids are often numbers.

    None if it is missing or blank.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"{name} must be text, is {_show(value)}")
    return _check_text(str(value).strip(), name) or None


def _plain_label(label: str | None) -> str | None:
    """A label in one spelling: labels that differ only in white space or in the composition of accents are one class."""
    return None if label is None else unicodedata.normalize("NFC", " ".join(label.split()))


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of seconds."""
    value = row.get(name)
    if value is None:
        return None
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name} must be a number of seconds, is {_show(value)}")
    return number


def _captions(row: Mapping[str, Any]) -> list[str]:
    """Reads `captions` (a list, or text separated by |), `caption`, `caption_1`, `caption_2`, ..., in that order.

    Empty captions are kept; the captions stage marks them.
    """
    numbered = sorted((c for c in row if _NUMBERED_CAPTION.fullmatch(str(c))), key=lambda c: int(c[8:]))
    values: list[Any] = []
    for name in ("captions", "caption", *numbered):
        value = row.get(name)
        if name == "captions" and isinstance(value, str):
            value = _split_captions(value)
        values += value if isinstance(value, list) else [value]
    captions = [value for value in values if value is not None]
    if not all(isinstance(caption, str) for caption in captions):
        raise BadRow(f"captions must be text, are {_show(captions)}")
    return [_check_text(caption.strip(), "caption") for caption in captions]


def _split_captions(text: str) -> list[Any]:
    """The captions in a text: a JSON list, or captions separated by |. A caption may begin with a bracket: `[Music]`."""
    if not text.lstrip().startswith("["):
        return text.split("|")
    try:
        value = parse_json(text)
    except (json.JSONDecodeError, RecursionError) as error:
        # Meant as a list: it begins with a quote (Python's own lists, as pandas writes them, have single quotes), or has
        # nothing but numbers.
        if re.match(r"\s*\[\s*([\"']|[-\d.,\s]*$)", text):
            raise BadRow(f"captions is not valid JSON: {error}; write a list as {_JSON_LIST}") from None
        return text.split("|")
    return value if isinstance(value, list) else [value]


_JSON_LIST = '["a dog", "a cat"]'


def _parse_json(text: str, name: str) -> Any:
    try:
        return parse_json(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRow(f"{name} is not valid JSON: {error}") from None


def _questions(value: Any) -> Iterator[Question]:
    if isinstance(value, str):
        value = _parse_json(value, "questions")
    if value is None:
        return
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, Mapping) or not all(isinstance(pair.get(k), str) for k in ("question", "answer")):
            raise BadRow(f'questions must be [{{"question": text, "answer": text}}, ...], have {_show(pair)}')
        question, answer = _check_text(pair["question"], "question"), _check_text(pair["answer"], "answer")
        yield Question(question, answer, _choices(pair.get("choices"), answer))


def _choices(value: Any, answer: str) -> tuple[str, ...]:
    """The choices of a multiple-choice question, which include its answer."""
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise BadRow(f"choices must be a list of texts, are {_show(value)}")
    if answer not in value:
        raise BadRow(f"the answer {_show(answer)} is not among the choices {_show(value)}")
    return tuple(_check_text(choice, "choice") for choice in value)
