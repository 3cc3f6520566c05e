"""What `stm verify` finds."""

import hashlib
import io
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from packing_inputs import EVERYTHING, index_of, make_inputs, run
from stage_outputs import Clip

from stm.preprocess.packing.pack import ShardError, verify_shard
from stm.shards.check import find_problems
from stm.shards.schema import list_members
from stm.storage.tables import read_receipt, read_table, write_table


def test_verify_finds_a_single_flipped_bit_anywhere(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path), EVERYTHING)
    index, sound = tar.with_suffix(".parquet"), tar.read_bytes()
    assert find_problems(tar, index) == []
    assert verify_shard(tar, index) == sum(len(row["sha256"]) for row in index_of(tar))
    for name, offset, size in [place for row in index_of(tar) for place in list_members(row)]:
        for position in (offset, offset + size - 1):
            damaged = bytearray(sound)
            damaged[position] ^= 1
            tar.write_bytes(damaged)
            assert any(f"{name} has been changed" in problem for problem in find_problems(tar, index))
    with pytest.raises(ShardError, match="has been changed"):
        verify_shard(tar, index)
    tar.write_bytes(sound[:1000])
    assert any("truncated" in problem for problem in find_problems(tar, index))
    tar.unlink()
    assert find_problems(tar, index) == [f"{tar}: does not exist"]


def test_verify_checks_what_the_index_lets_a_reader_expect(tmp_path: Path) -> None:
    """Hashes agree, because the index is changed together with the tar; what is in it does not fit."""
    tar = run(make_inputs(tmp_path), EVERYTHING)
    index = tar.with_suffix(".parquet")
    table, receipt = read_table(index), read_receipt(index)

    def problems_with(**change: Any) -> list[str]:
        rows = table.to_pylist()
        rows[1] |= change
        write_table(index, pa.Table.from_pylist(rows, table.schema), receipt)
        return find_problems(tar, index)

    assert problems_with() == []
    for change, message in (
        ({"flow_cells": 1}, r"b\.flow\.npy is float16 .* where the index says float16 \[2, 2, 4, 5, 2\]"),
        ({"text_width": None}, r"b\.text\.npy is float16 \[4, 5\] where .* \[4, 0\]"),
        ({"captions": ["one"]}, r"b\.similarity\.npy is float16 \[4, "),
        ({"flow_offset": 2**62}, r"b\.flow\.npy lies outside the tar: is it truncated"),
        ({"json_offset": -1}, r"b\.json lies outside the tar"),
        ({"motion_size": None}, r"b\.motion\.npy lies outside the tar"),
        ({"sizes": [3]}, "clip 'b' has 2 offsets and 1 sizes"),
        ({"text_offset": None}, "clip 'b' has 6 members and 7 hashes"),
    ):
        assert any(re.search(message, problem) for problem in problems_with(**change)), message
    write_table(index, table.drop_columns(["flow_cells"]), receipt)
    assert any("flow_cells" in problem for problem in find_problems(tar, index))  # packed by an older version


def test_verify_finds_values_that_are_not_finite(tmp_path: Path) -> None:
    made = make_inputs(tmp_path, [Clip("b", frames=2, captions=["one"])])
    tar = run(made, EVERYTHING)
    with tarfile.open(tar) as file:
        member = file.getmember("b.flow.npy")
        packed = file.extractfile(member)
        assert packed is not None
        flow = np.load(io.BytesIO(packed.read()))
    flow.flat[0] = np.nan
    other = io.BytesIO()
    np.save(other, flow)
    data = bytearray(tar.read_bytes())
    data[member.offset_data : member.offset_data + member.size] = other.getvalue()
    tar.write_bytes(data)
    index = tar.with_suffix(".parquet")
    row = index_of(tar)[0]
    names = [name for name, _, _ in list_members(row)]
    row["sha256"][names.index("b.flow.npy")] = hashlib.sha256(other.getvalue()).hexdigest()
    write_table(index, pa.Table.from_pylist([row], read_table(index).schema), {})
    assert any(
        "b.flow.npy has values that are not finite" in p for p in find_problems(tar, tar.with_suffix(".parquet"))
    )
