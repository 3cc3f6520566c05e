"""Images are clips of one frame: what is stored of them, and the rows of damaged ones."""

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from synthetic_videos import make_row, write_slice

from stm.config import BadInput, Frames, Pack
from stm.datasets.folder import list_clips, row_of
from stm.datasets.probe import probe_file
from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.manifest import Question
from stm.preprocess.frames.extract import FrameTask, extract_clip, read_frames
from stm.preprocess.frames.table import write_frames
from stm.preprocess.packing.pack import pack_shard, verify_shard
from stm.shards.index import ClipIndex
from stm.storage.tables import read_table

SETTINGS = Frames(every=1, short_side=64, min_side=32, min_frames=1, quality=95)
LIMITS = {"min_side": 32, "max_side": 4096}


def picture(width: int = 120, height: int = 90) -> Image.Image:
    """A smooth image with a different colour in each corner, so that wrong turns and colours show."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def make_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    shown = picture()
    shown.save(folder / "plain.jpg", quality=95)
    shown.save(folder / "progressive.JPEG", progressive=True, quality=95)
    shown.save(folder / "plain.png")
    shown.save(folder / "lossy.webp", quality=95)
    shown.convert("L").save(folder / "grey.jpg", quality=95)
    shown.convert("CMYK").save(folder / "ink.jpg", quality=95)
    shown.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.png")
    shown.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    for mark in range(1, 9):
        exif[0x0112] = mark
        shown.save(folder / f"turned{mark}.jpg", exif=exif, quality=95)
    shown.save(folder / "turned.png", exif=exif)
    (folder / "another.jpg").write_bytes(
        (folder / "plain.png").read_bytes()
    )  # crawled files may have the wrong extension
    (folder / "series-%03d.jpg").write_bytes((folder / "plain.jpg").read_bytes())


def extract(
    root: Path, folder: Path, rows: Sequence[dict[str, Any]] | None = None, **settings: Any
) -> dict[str, dict[str, Any]]:
    """Run the frames stage on every file of a folder, in this process: starting workers takes longer than the work."""
    folder.mkdir(exist_ok=True)
    tar, index, chosen = folder / "frames.tar", folder / "frames.parquet", SETTINGS.model_copy(update=settings)
    rows = sorted(rows or map(make_row, (path.name for path in root.iterdir())), key=lambda row: row["key"])
    journal = Journal(tar, {})
    for row in rows:
        extract_clip(FrameTask(row, root, chosen, journal))
    write_frames(rows, journal, {}, tar, index, {}, BadInput(max_failure_rate=1))
    return {row["video_id"]: row for row in read_table(index).to_pylist()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder / "root")
    return folder / "root", folder / "frames", extract(folder / "root", folder / "frames")


def test_every_kind_of_picture_is_one_frame_as_others_show_it(made) -> None:
    root, folder, rows = made
    assert len(rows) == 19
    for name, row in rows.items():
        assert (row["status"], row["frames"], row["pts"], row["decode_index"]) == ("ok", 1, [0.0], [0]), name
        shown = ImageOps.exif_transpose(Image.open(root / name)).convert("RGB")
        assert (row["source_width"], row["source_height"]) == shown.size
        (stored,) = read_frames(folder / "frames.tar", row)
        expected = cv2.resize(np.asarray(shown), (row["width"], row["height"]), interpolation=cv2.INTER_AREA)
        difference = np.abs(stored.astype(int) - expected)
        # Programs convert CMYK to RGB by different formulas.
        assert difference.mean() < (12 if name == "ink.jpg" else 3), (name, difference.mean())
    assert (rows["plain.jpg"]["width"], rows["plain.jpg"]["height"]) == (86, 64)
    assert (rows["turned6.jpg"]["width"], rows["turned6.jpg"]["height"]) == (64, 86)


def test_the_probe_says_one_frame_and_no_rate(made) -> None:
    root, _, rows = made
    for name in rows:
        facts = probe_file(root / name, **LIMITS)
        assert (facts["status"], facts["frames"], facts["fps"], facts["duration"]) == ("ok", 1, None, None), facts
        shown = ImageOps.exif_transpose(Image.open(root / name))
        assert (facts["width"], facts["height"]) == shown.size
    assert probe_file(root / "plain.jpg", **LIMITS)["codec"] == "mjpeg"
    assert probe_file(root / "plain.png", **LIMITS)["codec"] == "png"


def test_a_series_of_numbered_pictures_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(root / f"p{number:03d}.jpg")
    Image.new("RGB", (64, 64), "white").save(root / "p%03d.jpg")
    rows = extract(root, tmp_path / "out")
    assert [row["frames"] for row in rows.values()] == [1] * 4
    assert read_frames(tmp_path / "out/frames.tar", rows["p%03d.jpg"]).min() > 250


def test_the_usual_two_frames_are_too_many_for_a_picture(made, tmp_path: Path) -> None:
    rows = extract(made[0], tmp_path / "out", min_frames=2)
    assert {(row["status"], row["kept"]) for row in rows.values()} == {("too_short", False)}


def test_small_torn_and_false_pictures_are_rows_with_a_status(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    picture(120, 20).save(root / "flat.jpg")
    for name in ("torn.jpg", "torn.png"):
        picture().save(root / name)
        (root / name).write_bytes((root / name).read_bytes()[: (root / name).stat().st_size // 2])
    (root / "page.jpg").write_text("<html>gone</html>")
    (root / "start.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (root / "empty.png").touch()
    rows = extract(root, tmp_path / "out")
    # Half an image is not stored: the missing part would be grey.
    expected = dict.fromkeys(("torn.jpg", "torn.png", "start.jpg"), "too_short")
    expected |= {"flat.jpg": "too_small", "page.jpg": "open_failed", "empty.png": "empty_file"}
    assert {name: row["status"] for name, row in rows.items()} == expected
    assert not any(row["kept"] for row in rows.values())
    probed = {name: str(probe_file(root / name, **LIMITS)["status"]) for name in rows}
    assert probed["flat.jpg"] == "too_small" and probed["empty.png"] == "empty_file"
    assert probed["torn.png"] == probed["page.jpg"] == probed["start.jpg"] == "open_failed"


def test_an_enormous_picture_in_a_small_file_is_not_decoded(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = 3000  # 27 MB
    rows = zlib.compress(bytes(side * (1 + 3 * side)), 1)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    root = tmp_path / "root"
    root.mkdir()
    (root / "bomb.png").write_bytes(data)
    assert probe_file(root / "bomb.png", 32, 1000)["status"] is Status.OPEN_FAILED
    (row,) = extract(root, tmp_path / "out", max_side=1000).values()
    assert not row["kept"] and row["frames"] == 0


def test_a_picture_becomes_a_shard_that_training_reads_with_its_questions(made, tmp_path: Path) -> None:
    root, _, _ = made
    asked = [{"question": "", "answer": "b", "choices": ["a", "b"]}, {"question": "what?", "answer": "that"}]
    lines = [
        {"path": "plain.jpg", "video_id": "q", "captions": ["a slope"], "questions": asked},
        {"path": "plain.png", "video_id": "p"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    listing = list_clips(root, tmp_path / "list.jsonl", (), "train")
    named, refused = listing.clips, listing.refused
    assert refused == []
    rows = [row_of(clip, probe_file(root / clip.clip.path, **LIMITS)) for clip in named]
    slice_path = write_slice(tmp_path / "slice.parquet", rows)
    frames, index = tmp_path / "frames.tar", tmp_path / "frames.parquet"
    extract(root, tmp_path, read_table(slice_path).to_pylist())
    tar, packed = tmp_path / "train-00000.tar", tmp_path / "train-00000.parquet"
    pack = Pack(similarity=False, motion=False)
    pack_shard(slice_path, frames, index, {}, {}, tar, packed, pack, 4, BadInput())
    assert verify_shard(tar, packed) == 4
    clips = {clip.key: clip for clip in map(ClipIndex([packed]).__getitem__, range(2))}
    assert clips["q"].questions == (Question("", "b", ("a", "b")), Question("what?", "that"))
    assert clips["p"].questions == () and clips["q"].frames == 1
    data = tar.read_bytes()
    said = b'"questions": [{"answer": "b", "choices": ["a", "b"], "question": ""}, {"answer": "that", "question": "what?"}]'
    assert said in data
