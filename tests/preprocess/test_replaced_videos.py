"""A video that is replaced after the manifest was made stops the stages that open it, instead of mixing two videos."""

from pathlib import Path

import pytest
from synthetic_videos import X264, make_pan, make_row, make_video, write_slice

from stm.config import BadInput, Frames, Motion
from stm.manifest import hash_ends
from stm.preprocess.frames.extract import extract_frames
from stm.preprocess.motion.measure import extract_motion

NAMES = ("a.mp4", "b.mp4")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        make_video(tmp_path / name, make_pan(8, 2, 1, 96, 64), [*X264, "-g", "8"])
    rows = [make_row(n, bytes=(tmp_path / n).stat().st_size, ends_hash=hash_ends(tmp_path / n)) for n in NAMES]
    write_slice(tmp_path / "s.parquet", rows)
    return tmp_path


def frames(root: Path) -> bytes:
    settings = Frames(every=2, short_side=64, min_side=32)
    extract_frames(root / "s.parquet", root, root / "f.tar", root / "f.parquet", settings, BadInput(), 1)
    return (root / "f.tar").read_bytes()


def motion(root: Path) -> bytes:
    output, settings = root / "m.parquet", Motion(backend="codec")
    extract_motion(root / "s.parquet", root, root / "f.parquet", output, settings, 4, BadInput(), 1)
    return output.read_bytes()


def test_frames_and_motion_stop_and_name_the_video_and_the_remedy(root: Path) -> None:
    whole = frames(root), motion(root)
    original = (root / "b.mp4").read_bytes()
    # As long as before, and as decodable.
    (root / "b.mp4").write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    for stage in (frames, motion):
        with pytest.raises(OSError, match=r"b\.mp4 \(clip 'b\.mp4'\).*Make the manifest again.*`stm manifest`"):
            stage(root)
    # Put back, the jobs resume and end in the same bytes.
    (root / "b.mp4").write_bytes(original)
    assert (frames(root), motion(root)) == whole
