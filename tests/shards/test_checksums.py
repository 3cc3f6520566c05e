"""What is read from a shard is what was packed: every read is checked, and a changed bit is named."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from packing_inputs import EVERYTHING, make_inputs, run

import stm
from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.shards.check import find_problems
from stm.shards.index import Clip, ClipIndex
from stm.shards.reader import ShardReader
from stm.shards.schema import ARRAYS
from stm.storage.tables import DamagedError, read_receipt, read_table, write_table

FRAMES = 21  # three groups of layers, the last one smaller


@pytest.fixture(params=["checksums", "hashes of whole members"])
def packed(request: pytest.FixtureRequest, tmp_path: Path, shard: Callable, clip: Callable) -> Path:
    """Two clips with every array; the second kind of shard was packed before parts had checksums."""
    rng = np.random.default_rng(0)
    content = {
        "frames": FRAMES,
        "flow": rng.normal(size=(2, FRAMES, 8, 10, 2)).astype(np.float16),
        "text": rng.normal(size=(3, 6)).astype(np.float16),
    }
    clips = [clip(number, **content) for number in range(2)]
    return shard(tmp_path / "train-00000.parquet", clips, checksums=request.param == "checksums")


def reads_of(clip: Clip) -> dict[str, tuple[tuple[int, int], Callable[[ShardReader], Any]]]:
    """Each member's place in the tar, and how its content is read, by the words that an error names it with."""

    def read_frame(frame: int, reader: ShardReader) -> Any:
        return list(reader.frames(clip, [frame]))

    def read_array(name: str, reader: ShardReader) -> Any:
        return reader.layers(clip, name, 0, clip.count_layers(name)[-1] - 1)

    places = zip(clip.offsets.tolist(), clip.sizes.tolist(), strict=True)
    frames = {f"frame {frame}": (place, partial(read_frame, frame)) for frame, place in enumerate(places)}
    return frames | {f"{name} array": (place, partial(read_array, name)) for name, place in clip.arrays.items()}


def test_every_flipped_bit_is_noticed_and_named_when_its_member_is_read(packed: Path) -> None:
    tar, rng = packed.with_suffix(".tar"), np.random.default_rng(1)
    sound = tar.read_bytes()
    clip = ClipIndex([packed])[1]
    reads = reads_of(clip)
    assert len(reads) == FRAMES + len(ARRAYS)
    flipped = 0
    for member, ((offset, size), read) in reads.items():
        read(ShardReader())
        # An array's header, which numpy pads with spaces, and a few bits anywhere in the member.
        bits = rng.integers(0, 8 * size, 3).tolist() + ([7, 8 * 100] if "array" in member else [])
        for bit in bits:
            damaged = bytearray(sound)
            damaged[offset + bit // 8] ^= 1 << bit % 8
            tar.write_bytes(damaged)
            with pytest.raises(
                DamagedError, match=re.escape(f"{tar}: {member} of clip 'clip-001' differs from its check")
            ):
                read(ShardReader())
            flipped += 1
    assert flipped >= 60
    with pytest.raises(DamagedError, match="Remove the tar and its index and run the stage `shards` again"):
        read(ShardReader())
    other = reads_of(ClipIndex([packed])[0])  # the clip beside it is intact
    for _, read in other.values():
        read(ShardReader())


def test_only_groups_around_the_layers_are_read(packed: Path) -> None:
    """A changed bit in frames 0 to 7 does not stop a sample of frames 8 to 15."""
    clip = ClipIndex([packed])[0]
    tar = packed.with_suffix(".tar")
    data = bytearray(tar.read_bytes())
    offset, _ = clip.arrays["motion"]
    data[offset + 128] ^= 1  # in the first layer
    tar.write_bytes(data)
    if clip.sha256:
        with pytest.raises(DamagedError, match="motion array"):
            ShardReader().layers(clip, "motion", 8, 15)
    else:
        ShardReader().layers(clip, "motion", 8, 15)
        with pytest.raises(DamagedError, match="motion array"):
            ShardReader().layers(clip, "motion", 7, 15)


def test_any_range_of_layers_is_that_of_the_whole_array(packed: Path) -> None:
    clip, reader = ClipIndex([packed])[1], ShardReader()
    flow, similarity = (reader.layers(clip, name, 0, FRAMES - 1) for name in ("flow", "similarity"))
    assert flow.shape == (2, FRAMES, 8, 10, 2) and similarity.shape == (3, FRAMES, 4, 5)
    for first in range(FRAMES):
        for last in range(first, FRAMES):
            np.testing.assert_array_equal(reader.layers(clip, "flow", first, last), flow[:, first : last + 1])
            row = reader.layers(clip, "similarity", first, last, outer=2)
            np.testing.assert_array_equal(row, similarity[2, first : last + 1])


def test_a_sample_of_damaged_data_is_an_error_and_others_are_not(packed: Path) -> None:
    tar = packed.with_suffix(".tar")
    clip = ClipIndex([packed])[0]
    data = bytearray(tar.read_bytes())
    data[clip.offsets[0] + clip.sizes[0] // 2] ^= 4  # decodes without an error
    tar.write_bytes(data)
    samples = ClipDataset([packed], Geometry(32, 8, 2, 4, 2), Augmentation(), 0, False, guides=(), views=3)
    with pytest.raises(DamagedError, match="frame 0 of clip 'clip-000'"):
        samples[0]
    assert len(samples[1]) == 3
    middle = ClipDataset([packed], Geometry(32, 8, 2, 4, 2), Augmentation(), 0, False, guides=())
    assert len(middle[0]) == 1  # it does not read the first frame


def test_the_frames_of_another_clip_are_noticed(packed: Path) -> None:
    """An intact image in the place of another one, as after an index of another shard."""
    table, receipt = read_table(packed), read_receipt(packed)
    rows = table.to_pylist()
    rows[1] |= {"offsets": rows[0]["offsets"], "sizes": rows[0]["sizes"]}
    write_table(packed, pa.Table.from_pylist(rows, table.schema), receipt)
    with pytest.raises(DamagedError, match="frame 3 of clip 'clip-001' differs from its checksum"):
        list(ShardReader().frames(ClipIndex([packed])[1], [3]))


def test_a_clip_that_could_not_be_checked_is_refused(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path), EVERYTHING)
    index = tar.with_suffix(".parquet")
    table, receipt = read_table(index), read_receipt(index)
    assert len(ClipIndex([index])) == 3

    def write(without: str | None = None, **change: Any) -> None:
        rows = table.to_pylist()
        rows[1] |= change
        changed = pa.Table.from_pylist(rows, pa.schema([field.with_nullable(True) for field in table.schema]))
        write_table(index, changed if without is None else changed.drop_columns([without]), receipt)

    for change, message in (
        ({"crc32": [1]}, "clip 'b' .*it has 1 checksums for 2 frames"),
        ({"crc32": None}, "clip 'b' .*it has 0 hashes for 7 members"),
        ({"motion_crc32": [1]}, "clip 'b' .*it has 1 motion checksums for 2 parts"),
        ({"flow_crc32": None}, "clip 'b' .*it has 0 flow checksums for 2 parts"),
    ):
        write(**change)
        with pytest.raises(DamagedError, match=message):
            ClipIndex([index])
    write(without="flow_crc32")
    with pytest.raises(DamagedError, match="it has 0 flow checksums for 2 parts"):
        ClipIndex([index])
    write(without="crc32")  # then the members' own hashes are used, of which none may be missing
    assert all(clip.sha256 and len(clip.checksums) == 0 for clip in map(ClipIndex([index]).__getitem__, range(3)))
    write(without="crc32", sha256=["x"])
    with pytest.raises(DamagedError, match=r"clip .b. .*it has 1 hashes for 7 members"):
        ClipIndex([index])


def test_verify_compares_checksums_too(tmp_path: Path) -> None:
    tar = run(make_inputs(tmp_path), EVERYTHING)
    index = tar.with_suffix(".parquet")
    table, receipt = read_table(index), read_receipt(index)
    assert find_problems(tar, index) == []
    for column, member in (("crc32", "b.0000.jpg"), ("text_crc32", "b.text.npy")):
        rows = table.to_pylist()
        rows[1][column] = [rows[1][column][0] ^ 1, *rows[1][column][1:]]
        write_table(index, pa.Table.from_pylist(rows, table.schema), receipt)
        assert find_problems(tar, index) == [f"{tar}: {member} has other checksums in its index"]
    columns = [name for name in table.schema.names if not name.endswith("crc32")]
    write_table(index, table.select(columns), receipt)
    assert find_problems(tar, index) == []


def test_nothing_reads_tars_without_checking() -> None:
    """The places that read from a tar by offset; each of them compares what it reads with a hash."""
    package = Path(stm.__file__).parent
    files = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    readers = {
        name for name, text in files.items() if re.search(r"read_member\(|\bpread\(|tarfile\.open\([^)]*\"r", text)
    }
    assert readers == {"storage/tars.py", "shards/reader.py", "shards/check.py", "preprocess/frames/table.py"}
