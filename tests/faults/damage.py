"""Damaged copies of good files, drawn from a seed."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Damage:
    """What became of a file."""

    kind: str
    data: bytes
    strict: bool = True  # a reader must notice, or come to the same result; otherwise it may believe the file


Draw = np.random.Generator
HEADERS = (
    b"RIFF\xff\xff\xff\xffAVI LIST", b"GIF89a\xff\xff\xff\xff\xf7\x00\x00", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
    b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", b"ffconcat version 1.0\nfile /etc/hostname\n", b"%PDF-1.7\n", b"PK\x03\x04",
    b"\x7fELF\x02\x01\x01", b"PAR1", b"\x1a\x45\xdf\xa3", b"\x00\x00\x00\x20ftypisom", b"\x1f\x8b\x08\x00",
    b"<?xml version='1.0'?><MPD/>", b"\x80\x04\x95", b"#!/bin/sh\ntouch pwned\n",
)  # fmt: skip


def _cut(data: bytes, draw: Draw) -> bytes:
    return data[: int(draw.integers(1, len(data)))]


def _flip(data: bytes, draw: Draw) -> bytes:
    changed = bytearray(data)
    for _ in range(int(draw.choice([1, 1, 4, 64]))):
        changed[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def _flip_header(data: bytes, draw: Draw) -> bytes:
    return _flip(data[:64], draw) + data[64:]


def _flip_end(data: bytes, draw: Draw) -> bytes:
    return data[:-512] + _flip(data[-512:], draw)


def _blank(data: bytes, draw: Draw) -> bytes:
    start = int(draw.integers(len(data)))
    size = int(draw.integers(1, 1 + len(data) // 4))
    return data[:start] + b"\0" * len(data[start : start + size]) + data[start + size :]


def _other_header(data: bytes, draw: Draw) -> bytes:
    header = HEADERS[int(draw.integers(len(HEADERS)))]
    return header + data[len(header) :]


def _leave_out(data: bytes, draw: Draw) -> bytes:
    start = int(draw.integers(len(data)))
    return data[:start] + data[start + int(draw.integers(1, 1 + len(data) // 4)) :]


def _put_in(data: bytes, draw: Draw) -> bytes:
    start = int(draw.integers(len(data)))
    return data[:start] + draw.bytes(int(draw.integers(1, 200))) + data[start:]


def _largest_number(data: bytes, draw: Draw) -> bytes:
    """Somewhere in the file, a number in all its bits: sizes, counts and offsets become absurd."""
    start = int(draw.integers(len(data)))
    return data[:start] + b"\xff" * 8 + data[start + 8 :]


def _nothing_of_it(data: bytes, draw: Draw) -> bytes:
    whole = [b"", b"\0", b"\0" * 4096, draw.bytes(2000), b"<html><body>404 Not Found</body></html>\n", b"{}\n"]
    return whole[int(draw.integers(len(whole)))]


_BYTES: dict[str, Callable[[bytes, Draw], bytes]] = {
    "cut off": _cut,
    "bits flipped": _flip,
    "bits of the header flipped": _flip_header,
    "bits of the end flipped": _flip_end,
    "blanked": _blank,
    "another header": _other_header,
    "part left out": _leave_out,
    "part put in": _put_in,
    "absurd number": _largest_number,
    "something else": _nothing_of_it,
}


def damage_bytes(data: bytes, draw: Draw) -> Iterator[Damage]:
    """Endless; no copy is the original."""
    while True:
        for kind, change in _BYTES.items():
            damaged = change(data, draw)
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
ABSURD = (-1, 0, 2**31 - 1, -(2**31), 65536, 10**9)


def damage_table(data: bytes) -> list[Damage]:
    """A Parquet table with columns missing, of other types, null or absurd, and with rows twice or in another order."""
    table = pq.read_table(io.BytesIO(data))
    found = []
    for number, field in enumerate(table.schema):
        column = table.column(number)
        found.append(Damage(f"no column {field.name}", _store(table.remove_column(number))))
        for other in _other_types(column):
            name = f"{field.name} as {other.type}"
            found.append(Damage(name, _store(table.set_column(number, field.name, other))))
        rows = column.to_pylist()
        nulls = pa.array([None, *rows[1:]], field.type)
        plain = table.schema.set(number, pa.field(field.name, field.type))
        found.append(
            Damage(
                f"null {field.name}", _store(table.set_column(number, plain.field(number), nulls)), not field.nullable
            )
        )
        for value in _other_values(field.type, rows[0]):
            changed = pa.array([value, *rows[1:]], field.type)
            found.append(
                Damage(f"{field.name} of {value!r:.30}", _store(table.set_column(number, field, changed)), False)
            )
    found.append(Damage("rows twice", _store(pa.concat_tables([table, table]))))
    found.append(Damage("first row twice", _store(pa.concat_tables([table.slice(0, 1), table]))))
    backwards = table.take(list(range(len(table)))[::-1])
    found.append(Damage("rows backwards", _store(backwards)))
    found.append(Damage("no rows", _store(table.slice(0, 0)), False))
    found.append(Damage("first row left out", _store(table.slice(1)), False))
    found.append(Damage("a column twice", _store(table.append_column(table.schema.field(0), table.column(0)))))
    found.append(Damage("no receipt", _store(table.replace_schema_metadata({})), False))
    found.append(Damage("receipt no JSON", _store(table.replace_schema_metadata({b"stm.receipt": b"{"})), False))
    return found


def _other_types(column: pa.ChunkedArray) -> list[pa.Array]:
    """The column as something else."""
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
    """What the first row's value could be instead, in the same type."""
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
