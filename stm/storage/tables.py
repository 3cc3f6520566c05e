"""Reads and writes Parquet tables, with checks of columns, types, nulls and page checksums."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stm.storage.files import atomic_path
from stm.storage.machine_errors import is_machine_error, name_file

RECEIPT_KEY = b"stm.receipt"


def write_table(path: Path, table: pa.Table, receipt: Mapping[str, Any], *, row_group_size: int = 1024) -> None:
    """Atomically write a Parquet file (zstd) with the receipt in its schema metadata."""
    with atomic_path(path) as temporary:
        _write_parquet(table, temporary, receipt, row_group_size)


def serialize_table(table: pa.Table, receipt: Mapping[str, Any]) -> bytes:
    """Return the bytes of the file that `write_table` writes."""
    sink = pa.BufferOutputStream()
    _write_parquet(table, sink, receipt, 1024)
    return sink.getvalue().to_pybytes()


def _write_parquet(table: pa.Table, sink: Any, receipt: Mapping[str, Any], row_group_size: int) -> None:
    metadata = {RECEIPT_KEY: json.dumps(receipt, sort_keys=True).encode()}
    # Dictionary encoding pays off for strings, which repeat; maps and vectors hardly ever do.
    strings = [field.name for field in table.schema if pa.types.is_string(field.type)]
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        use_dictionary=strings,
        row_group_size=row_group_size,
        write_page_checksum=True,
    )


def read_table(path: Path, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Read a Parquet file and check its pages' checksums, if it has any.

    Args:
        columns: the columns to read; by default those of `schema`, or all columns if there is no `schema`.
        schema: the required types and nullability of these columns.

    Raises:
        DamagedError: the file is missing, truncated, corrupt or not Parquet, or a column is missing, has the wrong type
            or contains a null that `schema` forbids; the message names the file and, for a null, the row.
    """
    if columns is None and schema is not None:
        columns = schema.names
    try:
        if schema is not None:
            check_schema(path, pq.read_schema(path), schema, columns)
        table = pq.read_table(path, columns=None if columns is None else list(columns), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise explain_unreadable(path, error) from error
    if schema is not None:
        check_nulls(path, table, schema)
    return table


def read_receipt(path: Path) -> dict[str, Any]:
    """Return the receipt that `write_table` stored in a Parquet file; empty if there is none.

    Raises:
        DamagedError: the file is not a Parquet table, or its receipt is not a JSON object.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise explain_unreadable(path, error) from error
    try:
        receipt = json.loads(metadata.get(RECEIPT_KEY, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: its receipt is not JSON ({error})", REMOVE) from error
    if not isinstance(receipt, dict):
        raise DamagedError(f"{path}: its receipt is not a JSON object", REMOVE)
    return receipt


LONGEST_SIDE = 65535
"""Maximum side of a stored image in pixels, the limit of JPEG."""


REMOVE = "remove it and run again"
"""What mends a file that is a declared output of a stage: Snakemake makes it again."""


class DamagedError(ValueError):
    """Raised for a stage's output file that is damaged or inconsistent with other files.

    Args:
        problem: names the file and the place.
        remedy: says what to remove and what to run; empty if `problem` does.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


def explain_unreadable(path: Path, error: Exception) -> Exception:
    """Return the error for a file that could not be read as a Parquet table.

    Returns:
        DamagedError if the file is missing or damaged. An error of the machine and a lack of permission say nothing about
        the file, so removing it would not help: they remain what they are, with the file's name.
    """
    if isinstance(error, FileNotFoundError):
        return DamagedError(f"{path}: there is no such file", "run the stage that writes it")
    if is_machine_error(error) or isinstance(error, PermissionError):
        return name_file(error, path)
    # Some Arrow messages contain details on several lines.
    first_line = f"{error}".strip().split("\n")[0]
    return DamagedError(f"{path}: cannot be read as a Parquet table ({first_line})", REMOVE)


def check_schema(path: Path, actual: pa.Schema, expected: pa.Schema, names: Sequence[str] | None = None) -> None:
    """Reject a table with a missing column or a column of the wrong type.

    Args:
        names: the columns to check; by default all columns of `expected`.

    Raises:
        DamagedError: the check failed; the message contains the file, the column and the types.
    """
    for name in expected.names if names is None else names:
        count = actual.names.count(name)
        kind = expected.field(name).type
        if count != 1:
            raise DamagedError(f"{path}: has {count} columns `{name}`, needs exactly 1", REMOVE)
        if not _same_type(actual.field(name).type, kind):
            raise DamagedError(f"{path}: column `{name}` is {actual.field(name).type}, must be {kind}", REMOVE)


def _same_type(actual: pa.DataType, expected: pa.DataType) -> bool:
    """Whether the types match; a struct may lack fields, because older versions wrote tables without them."""
    if pa.types.is_list(actual) and pa.types.is_list(expected):
        return _same_type(actual.value_type, expected.value_type)
    if pa.types.is_struct(actual) and pa.types.is_struct(expected):
        return all(
            expected.get_field_index(field.name) >= 0 and _same_type(field.type, expected.field(field.name).type)
            for field in actual
        )
    return bool(actual == expected)


def check_nulls(path: Path, table: pa.Table | pa.RecordBatch, schema: pa.Schema, first_row: int = 0) -> None:
    """Reject nulls in columns that `schema` declares non-nullable, and nulls inside lists.

    Args:
        first_row: the index in the file of the table's first row.

    Raises:
        DamagedError: a null was found; the message contains the file, the row and the column.
    """
    for field in schema:
        if field.name not in table.schema.names:
            continue
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DamagedError(f"{path}: row {first_row + row} has no `{field.name}`", REMOVE)
        if pa.types.is_list(field.type) and pc.list_flatten(column).null_count:
            raise DamagedError(f"{path}: a list of `{field.name}` contains nulls", REMOVE)


def write_rows(
    path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]], receipt: Mapping[str, Any], group: int
) -> int:
    """Atomically write a stream of rows to a Parquet file, with `group` rows per row group; return the number of rows.

    Values of numeric list columns may be numpy arrays of the column's type and any shape; they are flattened.
    """
    full_schema = schema.with_metadata({RECEIPT_KEY: json.dumps(receipt, sort_keys=True).encode()})
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    count = 0
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(
            temporary, full_schema, compression="zstd", use_dictionary=strings, write_page_checksum=True
        ) as writer,
    ):
        batch: list[Mapping[str, Any]] = []
        for row in rows:
            batch.append(row)
            count += 1
            if len(batch) == group:
                writer.write_table(_make_table(full_schema, batch))
                batch = []
        if batch:
            writer.write_table(_make_table(full_schema, batch))
    return count


def _make_table(schema: pa.Schema, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = [_make_column(field, [row[field.name] for row in rows]) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _make_column(field: pa.Field, values: list[Any]) -> pa.Array:
    if not any(isinstance(value, np.ndarray) for value in values):
        return pa.array(values, field.type)
    if pa.types.is_fixed_size_list(field.type):
        return _make_fixed_lists(field.type, values)
    # Built from offsets and one flat buffer: `pa.array` would convert every value of a map to a Python object.
    flat = [None if value is None else np.ascontiguousarray(value).reshape(-1) for value in values]
    lengths = [0 if value is None else len(value) for value in flat]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    numbers = pa.array(np.concatenate([value for value in flat if value is not None]), field.type.value_type)
    missing = pa.array([value is None for value in flat])
    return pa.ListArray.from_arrays(offsets, numbers, type=field.type, mask=missing)


def _make_fixed_lists(kind: pa.DataType, values: list[Any]) -> pa.Array:
    flat = np.zeros((len(values), kind.list_size), kind.value_type.to_pandas_dtype())
    for place, value in zip(flat, values, strict=True):
        if value is not None:
            place[:] = value.reshape(-1)
    missing = pa.array([value is None for value in values])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), type=kind, mask=missing)


def stream_rows(
    path: Path, arrays: Sequence[str] = (), group: int = 4, schema: pa.Schema | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, `group` rows in memory at a time, and check its pages' checksums.

    Args:
        arrays: numeric list columns to return as flat numpy arrays (None for null) instead of lists.
        schema: the columns to read, with their required types; by default all columns, unchecked.

    Raises:
        DamagedError: the file is missing, truncated, corrupt or not Parquet, or does not match the schema.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            expected = file.schema_arrow if schema is None else schema
            check_schema(path, file.schema_arrow, expected)
            first = 0
            for batch in file.iter_batches(batch_size=group, columns=expected.names):
                check_nulls(path, batch, expected, first)
                first += batch.num_rows
                rows = batch.drop_columns(list(arrays)).to_pylist() if arrays else batch.to_pylist()
                for number, row in enumerate(rows):
                    scalars = {name: batch.column(name)[number] for name in arrays}
                    row |= {name: s.values.to_numpy() if s.is_valid else None for name, s in scalars.items()}
                    yield row
    except (OSError, pa.ArrowException) as error:
        raise explain_unreadable(path, error) from error
