"""What a table of ours must be before anything is read from it: its columns, their types, no nulls where none belong."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

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
