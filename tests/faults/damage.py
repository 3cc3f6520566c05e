"""Damaged copies of good files, sampled with a seed."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Damage:
    """A damaged copy of a file."""

    kind: str
    data: bytes
    strict: bool = True  # a reader must notice the damage or return the same result; otherwise it may accept the file


Rng = np.random.Generator
# Other formats' first bytes, and formats that make a reader open other files.
HEADERS = (
    b"RIFF\xff\xff\xff\xffAVI LIST", b"GIF89a\xff\xff\xff\xff\xf7\x00\x00", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
    b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", b"ffconcat version 1.0\nfile /etc/hostname\n", b"%PDF-1.7\n", b"PK\x03\x04",
    b"\x7fELF\x02\x01\x01", b"PAR1", b"\x1a\x45\xdf\xa3", b"\x00\x00\x00\x20ftypisom", b"\x1f\x8b\x08\x00",
    b"<?xml version='1.0'?><MPD/>", b"\x80\x04\x95", b"#!/bin/sh\ntouch pwned\n",
)  # fmt: skip


def _cut(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def _flip(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 4, 64]))):
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _flip_header(data: bytes, rng: Rng) -> bytes:
    return _flip(data[:64], rng) + data[64:]


def _flip_end(data: bytes, rng: Rng) -> bytes:
    return data[:-512] + _flip(data[-512:], rng)


def _blank(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    size = int(rng.integers(1, 1 + len(data) // 4))
    return data[:start] + b"\0" * len(data[start : start + size]) + data[start + size :]


def _other_header(data: bytes, rng: Rng) -> bytes:
    header = HEADERS[int(rng.integers(len(HEADERS)))]
    return header + data[len(header) :]


def _remove(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    return data[:start] + data[start + int(rng.integers(1, 1 + len(data) // 4)) :]


def _insert(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    return data[:start] + rng.bytes(int(rng.integers(1, 200))) + data[start:]


def _largest_number(data: bytes, rng: Rng) -> bytes:
    """Set eight bytes at a random place to 0xff: sizes, counts and offsets become absurd."""
    start = int(rng.integers(len(data)))
    return data[:start] + b"\xff" * 8 + data[start + 8 :]


def _replace(data: bytes, rng: Rng) -> bytes:
    contents = [b"", b"\0", b"\0" * 4096, rng.bytes(2000), b"<html><body>404 Not Found</body></html>\n", b"{}\n"]
    return contents[int(rng.integers(len(contents)))]


_BYTES: dict[str, Callable[[bytes, Rng], bytes]] = {
    "cut off": _cut,
    "bits flipped": _flip,
    "bits of the header flipped": _flip_header,
    "bits of the end flipped": _flip_end,
    "blanked": _blank,
    "another header": _other_header,
    "part removed": _remove,
    "part inserted": _insert,
    "absurd number": _largest_number,
    "something else": _replace,
}


def damage_bytes(data: bytes, rng: Rng) -> Iterator[Damage]:
    """Damaged copies without end, of each kind in turn; none equals the original."""
    while True:
        for kind, change in _BYTES.items():
            damaged = change(data, rng)
            if damaged != data:
                yield Damage(kind, damaged)


HOSTILE = (
    "",
    "../../outside",
    "/etc/hostname",
    "a/b",
    "nul\0",
    "x" * 5000,
    "\x1b[2J",
    "<script>alert(1)</script>",
    "-rf",
    "%s%n",
    "مرحبا\u202e",
)
# Tables that earlier versions wrote lack these columns and are read without them.
ABSENT_IN_OLDER_TABLES = ("ends_hash",)
ABSURD = (-1, 0, 2**31 - 1, -(2**31), 65536, 10**9)


def damage_table(data: bytes) -> list[Damage]:
    """Copies of a Parquet table with missing, null or absurd columns, other types, and duplicate or reordered rows."""
    table = pq.read_table(io.BytesIO(data))
    damages = []
    for number, field in enumerate(table.schema):
        column = table.column(number)
        without = _store(table.remove_column(number))
        damages.append(Damage(f"no column {field.name}", without, field.name not in ABSENT_IN_OLDER_TABLES))
        for other in _other_types(column):
            name = f"{field.name} as {other.type}"
            damages.append(Damage(name, _store(table.set_column(number, field.name, other))))
        rows = column.to_pylist()
        nulls = pa.array([None, *rows[1:]], field.type)
        plain = table.schema.set(number, pa.field(field.name, field.type))
        damages.append(
            Damage(
                f"null {field.name}", _store(table.set_column(number, plain.field(number), nulls)), not field.nullable
            )
        )
        for value in _other_values(field.type, rows[0]):
            changed = pa.array([value, *rows[1:]], field.type)
            damages.append(
                Damage(f"{field.name} of {value!r:.30}", _store(table.set_column(number, field, changed)), False)
            )
    damages.append(Damage("rows twice", _store(pa.concat_tables([table, table]))))
    damages.append(Damage("first row twice", _store(pa.concat_tables([table.slice(0, 1), table]))))
    backwards = table.take(list(range(len(table)))[::-1])
    damages.append(Damage("rows in reverse order", _store(backwards)))
    damages.append(Damage("no rows", _store(table.slice(0, 0)), False))
    damages.append(Damage("first row missing", _store(table.slice(1)), False))
    damages.append(Damage("a column twice", _store(table.append_column(table.schema.field(0), table.column(0)))))
    damages.append(Damage("no receipt", _store(table.replace_schema_metadata({})), False))
    damages.append(Damage("receipt not JSON", _store(table.replace_schema_metadata({b"stm.receipt": b"{"})), False))
    return damages


def _other_types(column: pa.ChunkedArray) -> list[pa.Array]:
    """The column converted to other types."""
    kind, rows = column.type, column.to_pylist()
    if pa.types.is_list(kind):
        other = [pa.array([str(row) for row in rows]), pa.array([0] * len(rows), pa.int64())]
        if pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type):
            texts = [None if row is None else [str(value) for value in row] for row in rows]
            other += [
                pa.array(texts, pa.list_(pa.string())),
                pa.array([[[]]] * len(rows), pa.list_(pa.list_(kind.value_type))),
            ]
        return other
    if pa.types.is_string(kind):
        raw = [None if row is None else row.encode() for row in rows]
        return [pa.array(raw, pa.binary()), pa.array(range(len(rows)), pa.int64()), pa.array([[row] for row in rows])]
    return [pa.array([str(row) for row in rows]), pa.array([float(row or 0) for row in rows], pa.float32())]


def _other_values(kind: pa.DataType, value: Any) -> list[Any]:
    """Unusual values of the same type to replace the first row's value."""
    if pa.types.is_string(kind):
        return [other for other in HOSTILE if other != value]
    if pa.types.is_integer(kind):
        info = np.iinfo(kind.to_pandas_dtype())
        return [n for n in (*ABSURD, int(info.max), int(info.min)) if n != value and info.min <= n <= info.max]
    if pa.types.is_floating(kind):
        return [float("nan"), float("inf"), -1e300 if kind.bit_width == 64 else -1.0, 0.0]
    if pa.types.is_boolean(kind):
        return [not value]
    if pa.types.is_list(kind) and value:
        first = [[other, *value[1:]] for other in _other_values(kind.value_type, value[0])]
        return [[], value[:-1], value + value, *first]
    return []


def _store(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()
