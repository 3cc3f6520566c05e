"""The format of packed shards is stable: the same inputs always give the same bytes."""

import hashlib
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
from packing_inputs import EVERYTHING, make_inputs, run

# Checksums of everything that depends on this repository alone: JPEGs vary with the version of the encoder, Parquet with
# that of pyarrow.
MEMBERS = "20047c1cacd8d1c6a8bb78b45d2447c4a57dde5a4c19b6d1c2837e5e0a98cdf5"
COLUMNS = "6256a54b946b61a33545fbcb8511a55488f142a90dcbc54c3d1866797535beb4"


def test_a_small_shard_keeps_its_bytes(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path), EVERYTHING)
    digest = hashlib.sha256()
    with tarfile.open(tar) as archive:
        for member in archive:
            digest.update(f"{member.name}\n".encode())
            if not member.name.endswith(".jpg"):
                digest.update(archive.extractfile(member).read())
    assert digest.hexdigest() == MEMBERS


def test_the_index_keeps_its_columns(tmp_path: Path) -> None:
    schema = pq.read_schema(run(make_inputs(tmp_path), EVERYTHING).with_suffix(".parquet"))
    columns = [f"{field.name} {field.type} {field.nullable}" for field in schema]
    assert hashlib.sha256("\n".join(columns).encode()).hexdigest() == COLUMNS
