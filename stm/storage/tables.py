"""What a table of ours must be before anything is read from it: its columns, their types, no nulls where none belong."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stm.storage.files import atomic_path

RECEIPT_KEY = b"stm.receipt"


def write_table(path: Path, table: pa.Table, receipt: Mapping[str, Any], *, row_group_size: int = 1024) -> None:
    """Writes a Parquet file (zstd) atomically, with the receipt in its schema's metadata."""
    metadata = {RECEIPT_KEY: json.dumps(receipt, sort_keys=True).encode()}
    strings = [f.name for f in table.schema if pa.types.is_string(f.type)]
    with atomic_path(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            temporary,
            compression="zstd",
            use_dictionary=strings,
            row_group_size=row_group_size,
            write_page_checksum=True,
        )


def read_table(path: Path, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Reads a Parquet file and checks its pages' checksums, where it has any.

    Args:
        schema: what the columns must be; of those only these are read. Further columns are left out.

    Raises:
        DamagedError: the file is missing, torn, changed or not Parquet, lacks a column, or has another type than
            `schema` or a null where that allows none; the message names the file, and the row where it is one.
    """
    names = list(columns) if columns is not None else None if schema is None else schema.names
    try:
        if schema is not None:
            check_schema(path, pq.read_schema(path), schema, names)
        table = pq.read_table(path, columns=names, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    if schema is not None:
        check_nulls(path, table, schema)
    return table


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt of a Parquet file that `write_table` wrote; empty when it has none.

    Raises:
        DamagedError: the file is no Parquet table, or its receipt no JSON object.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    try:
        receipt = json.loads(metadata.get(RECEIPT_KEY, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: its receipt is no JSON ({error}); remove it and run again") from error
    if not isinstance(receipt, dict):
        raise DamagedError(f"{path}: its receipt is no JSON object; remove it and run again")
    return receipt


LONGEST_SIDE = 65535
"""Pixels on the side of a stored picture; a JPEG has no more."""


class DamagedError(ValueError):
    """A file that a stage wrote and that is not what it was, or belongs to other files; the message says which and where."""


def unreadable(path: Path, error: Exception) -> DamagedError:
    """The error for a file that is no sound Parquet table."""
    return DamagedError(f"{path}: cannot be read as a Parquet table ({_first_line(error)}); remove it and run again")


def _first_line(error: Exception) -> str:
    return f"{error}".strip().split("\n")[0]


def check_schema(path: Path, found: pa.Schema, wanted: pa.Schema, names: Sequence[str] | None = None) -> None:
    """Refuses a table that lacks a column, or has one of another type.

    Args:
        names: the columns that matter; by default all of `wanted`.

    Raises:
        DamagedError: with the file, the column and the types.
    """
    for name in wanted.names if names is None else names:
        count, kind = found.names.count(name), wanted.field(name).type
        if count != 1:
            raise DamagedError(f"{path}: has {count} columns `{name}`, 1 is needed; remove it and run again")
        if not _same_type(found.field(name).type, kind):
            raise DamagedError(
                f"{path}: column `{name}` is {found.field(name).type}, {kind} is needed; remove it and run again"
            )


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether types agree; of a struct fields may be missing, as tables of older versions lack what came later."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _same_type(found.value_type, wanted.value_type)
    if pa.types.is_struct(found) and pa.types.is_struct(wanted):
        return all(wanted.get_field_index(f.name) >= 0 and _same_type(f.type, wanted.field(f.name).type) for f in found)
    return bool(found == wanted)


def check_nulls(path: Path, table: pa.Table | pa.RecordBatch, schema: pa.Schema, first_row: int = 0) -> None:
    """Refuses nulls in columns that `schema` says have none, and inside of lists.

    Args:
        first_row: the number of the table's first row in the file.

    Raises:
        DamagedError: with the file, the row and the column.
    """
    for field in schema:
        if field.name not in table.schema.names:
            continue
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DamagedError(f"{path}: row {first_row + row} has no `{field.name}`; remove it and run again")
        if pa.types.is_list(field.type) and pc.list_flatten(column).null_count:
            raise DamagedError(f"{path}: a list of `{field.name}` has nulls in it; remove it and run again")


def write_rows(
    path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]], receipt: Mapping[str, Any], group: int
) -> int:
    """Writes rows as they come, atomically, `group` rows a row group; returns how many there were.

    Values of list columns of numbers may be numpy arrays of the column's type, of any shape; they are flattened.
    """
    stamped = schema.with_metadata({RECEIPT_KEY: json.dumps(receipt, sort_keys=True).encode()})
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    count = 0
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(
            temporary, stamped, compression="zstd", use_dictionary=strings, write_page_checksum=True
        ) as writer,
    ):
        waiting: list[Mapping[str, Any]] = []
        for row in rows:
            waiting.append(row)
            count += 1
            if len(waiting) == group:
                writer.write_table(_make_table(stamped, waiting))
                waiting = []
        if waiting:
            writer.write_table(_make_table(stamped, waiting))
    return count


def _make_table(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = [_make_column(field, [row[field.name] for row in rows]) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _make_column(field: pa.Field, values: list[Any]) -> pa.Array:
    if not any(isinstance(value, np.ndarray) for value in values):
        return pa.array(values, field.type)
    flat = [None if value is None else np.ascontiguousarray(value).reshape(-1) for value in values]
    lengths = [0 if value is None else len(value) for value in flat]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    numbers = pa.array(np.concatenate([value for value in flat if value is not None]), field.type.value_type)
    missing = pa.array([value is None for value in flat])
    return pa.ListArray.from_arrays(offsets, numbers, type=field.type, mask=missing)


def stream_rows(
    path: Path, arrays: Sequence[str] = (), group: int = 4, schema: pa.Schema | None = None
) -> Iterator[dict[str, Any]]:
    """Reads a Parquet file row by row, `group` rows in memory at a time, and checks its pages' checksums.

    Args:
        arrays: list columns of numbers that come as flat numpy arrays (None when null) instead of lists.
        schema: what the columns must be; of those only these are read.

    Raises:
        DamagedError: the file is missing, torn, changed, not Parquet or not of this schema.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            wanted = file.schema_arrow if schema is None else schema
            check_schema(path, file.schema_arrow, wanted)
            first = 0
            for batch in file.iter_batches(batch_size=group, columns=wanted.names):
                check_nulls(path, batch, wanted, first)
                first += batch.num_rows
                plain = batch.drop_columns(list(arrays)).to_pylist() if arrays else batch.to_pylist()
                for number, row in enumerate(plain):
                    cells = {name: batch.column(name)[number] for name in arrays}
                    row |= {n: c.values.to_numpy() if c.is_valid else None for n, c in cells.items()}
                    yield row
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
