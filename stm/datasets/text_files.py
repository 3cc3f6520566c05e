"""Strict reading of other people's text files: their encoding, CSV whose quotation marks match, and JSON."""

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_FIELD_LIMIT = 16 * 2**20  # characters
# The largest integer that Python converts from text by default has 4,300 digits; no value of a clip has as many as this.
_MOST_DIGITS = 400


class BadRow(ValueError):
    """An unusable row; the message contains the reason."""


def text_encoding(start: bytes) -> str:
    """The encoding of a text file: UTF-8, or UTF-16 or UTF-32 if it begins with their byte order mark.

    Args:
        start: its first bytes, at least 4 if it has as many.

    Raises:
        UnicodeError: it begins with a NUL byte or has one in between, as UTF-16 without a byte order mark has.
    """
    if start.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "utf-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\x00" in start:
        raise UnicodeError("it begins with NUL bytes: UTF-16 without a byte order mark, or not a text")
    return "utf-8-sig"


class BrokenQuotesError(ValueError):
    """A CSV file in which a quotation mark swallows rows; the message names the line where the field begins."""


class CsvRecord(NamedTuple):
    """A record of a CSV file. Quoted fields may contain line breaks, so a record may span several lines."""

    line: int  # the first line
    last_line: int
    fields: list[str] | BadRow


def read_records(lines: Iterable[str], delimiter: str, first_line: int = 1) -> Iterator[CsvRecord]:
    """Read CSV strictly: text after a closing quotation mark is an error, and so is a quotation mark that is never closed.

    A mistake that affects only its own line becomes a BadRow; empty lines are skipped.

    Args:
        first_line: number of the first line in its file.

    Raises:
        BrokenQuotesError: a mistake reaches over several lines, or to the end of the file.
    """
    # Python's default limit of 131,072 characters is too small for a column that contains all captions of a clip.
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + first_line
        try:
            fields: list[str] | BadRow = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = reader.line_num + first_line - 1
            if end > start or str(error) == "unexpected end of data":
                raise BrokenQuotesError(_describe(start, end, error)) from None
            fields = BadRow(f"its quotation marks do not match ({error}); {_REMEDY}")
        if fields:
            yield CsvRecord(start, reader.line_num + first_line - 1, fields)


_REMEDY = 'inside quotes, write a quotation mark that is part of the text as two: "a 5"" screen"'


def _describe(start: int, end: int, error: csv.Error) -> str:
    rest = f"the rows up to line {end} would become part of its field" if end > start else "it is the last line"
    return f"line {start}: a quotation mark is opened and not closed: {rest} ({error}). Close it; {_REMEDY}"


class HugeNumber(float):
    """An integer with more digits than any value of a clip: infinite, and described by its number of digits."""

    digits: int

    def __new__(cls, text: str) -> "HugeNumber":
        """Keep only the number of digits of `text`."""
        number = super().__new__(cls, "inf")
        number.digits = len(text.lstrip("-"))
        return number

    def __repr__(self) -> str:
        return f"a number of {self.digits:,} digits"


def _parse_integer(text: str) -> int | float:
    return int(text) if len(text) <= _MOST_DIGITS else HugeNumber(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object as a mapping; a BadRow if it has a key twice, of which Python would drop the first."""
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    return BadRow(f"the key `{twice:.80}` is given twice")


JSON_DECODER = json.JSONDecoder(parse_int=_parse_integer, object_pairs_hook=_unique_keys)


def parse_json(text: str) -> Any:
    """Parse JSON; an object that has a key twice becomes a BadRow, an integer of hundreds of digits a HugeNumber.

    Raises:
        json.JSONDecodeError, RecursionError: the text is not JSON, or nested too deeply.
    """
    return JSON_DECODER.decode(text)
