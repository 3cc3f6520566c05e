"""Parquet files larger than memory should hold: written and read a few clips at a time.

`stm.storage.files.write_table` takes a whole table. The embeddings of one shard are gigabytes, and more numbers than one Arrow
list column can address, so they are written in row groups of a few clips.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stm.storage.files import RECEIPT_KEY, atomic_path
from stm.storage.tables import check_nulls, check_schema, unreadable


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
