"""`frames.count`: frames in the middle of equal segments of a clip, whatever the manifest says of its length."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_videos import X264, decode_by_program, ffmpeg, make_pan, make_row, make_video, times_by_program
from test_frames import extract

from stm.config import Frames
from stm.data.sampling import sample_window, view_windows
from stm.preprocess.clip_outcomes import unpack_record
from stm.preprocess.frames import extract as stage
from stm.preprocess.frames.extract import read_frames
from stm.preprocess.frames.spread import choose_candidates, spread_frames

FRAMES = 50
SETTINGS = Frames(count=8, short_side=64)
CUT = {"start": 0.5, "end": 1.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spread")
    pan = make_pan(FRAMES, 2, 1, 96, 64)
    good = make_video(folder / "good.mp4", pan, [*X264, "-g", "12", "-bf", "3"])
    make_video(folder / "stream.ts", pan, [*X264, "-g", "12", "-bf", "3"])
    make_video(folder / "short.mp4", pan[:5])
    ffmpeg("-i", good, "-vf", "select='not(mod(n,3))+lt(n,20)'", "-fps_mode", "vfr", *X264, folder / "variable.mp4")
    return folder


def middles(frames: int, count: int) -> list[int]:
    """The frame that is shown at the middle of each of `count` equal parts of [0, `frames`)."""
    ends = [Fraction(part * frames, count) for part in range(count + 1)]
    return sorted({int((first + last) / 2) for first, last in pairwise(ends)})


@given(frames=st.integers(1, 400), count=st.integers(1, 64))
def test_the_frames_are_those_at_the_middles_of_equal_segments(frames: int, count: int) -> None:
    chosen = spread_frames(frames, count)
    assert chosen == middles(frames, count)
    assert len(chosen) == min(frames, count), "each frame of a short clip once"
    assert spread_frames(0, count) == []


@given(frames=st.integers(1, 400), count=st.integers(1, 64), error=st.integers(-1, 1))
def test_a_manifest_that_is_off_by_one_still_yields_the_right_frames(frames: int, count: int, error: int) -> None:
    settings = SETTINGS.model_copy(update={"count": count})
    candidates = choose_candidates(settings, make_row("a", frames=max(1, frames + error)))
    assert candidates is not None and set(middles(frames, count)) <= candidates


def test_the_stored_frames_are_those_of_the_ffmpeg_program(root: Path, tmp_path: Path) -> None:
    rows = extract(root, tmp_path, [make_row("good.mp4", frames=FRAMES), make_row("variable.mp4")], settings=SETTINGS)
    for name in ("good.mp4", "variable.mp4"):
        scale = "scale=96:64:flags=area+accurate_rnd+bitexact"
        truth, times = decode_by_program(root / name, 96, 64, "-vf", scale), times_by_program(root / name)
        chosen = middles(len(truth), 8)
        assert rows[name]["decode_index"] == chosen and rows[name]["kept"]
        assert rows[name]["pts"] == pytest.approx([times[index] for index in chosen])
        stored = read_frames(tmp_path / "frames.tar", rows[name]).astype(int)
        assert np.abs(stored - truth[chosen]).mean() < 4  # JPEG; a neighbouring frame differs by more than 8
        assert np.abs(stored - truth[[index + 1 for index in chosen]]).mean() > 8


class Records(dict[str, bytes]):
    """A journal in memory."""

    def put(self, item: str, data: bytes) -> None:
        self[item] = data

    def headers(self) -> list[dict[str, Any]]:
        return [unpack_record(record).header for record in self.values()]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened, in order."""
    opened: list[str] = []
    whole = stage.Video

    def note(path: Path, *bounds: Any, **more: Any) -> Any:
        opened.append(path.name)
        return whole(path, *bounds, **more)

    monkeypatch.setattr(stage, "Video", note)
    return opened


@pytest.mark.parametrize(
    ("facts", "passes"),
    [
        ({"frames": FRAMES}, 1),
        ({"frames": FRAMES - 1}, 1),
        ({"frames": 3 * FRAMES}, 2),
        ({"duration": 2.0, "fps": 25.0}, 1),
        ({}, 2),
        ({**CUT, "fps": 25.0, "frames": FRAMES}, 1),
        ({**CUT, "fps": 50.0}, 2),
    ],
)
def test_a_clip_is_read_again_only_if_its_manifest_is_wrong(
    facts: dict[str, Any], passes: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, records = counted(monkeypatch), Records()
    stage.extract_clip(stage.FrameTask(make_row("good.mp4", **facts), root, SETTINGS, records))  # type: ignore[arg-type]
    assert len(opened) == passes
    (header,) = records.headers()
    assert header["decode_index"] == middles(25 if "start" in facts else FRAMES, 8)


def test_parts_of_a_stream_that_cannot_be_sought_have_the_same_frames(root: Path) -> None:
    parts = [{"start": n * 0.4, "end": n * 0.4 + 0.4, "fps": fps} for n, fps in enumerate([25.0, 25.0, 80.0, None])]
    for name, at_once in (("stream.ts", 2), ("good.mp4", 0)):
        records = Records()
        rows = [make_row(name, video_id=f"{number}", **part) for number, part in enumerate(parts)]
        tasks = [stage.FrameTask(row, root, SETTINGS, records) for row in rows]  # type: ignore[arg-type]
        stage.extract_sequence(tasks)
        assert len(records) == at_once, "those of which the manifest gives the right number of frames"
        for task in tasks:
            if task.item not in records:
                stage.extract_clip(task)
        assert [header["decode_index"] for header in records.headers()] == [middles(10, 8)] * 4
        assert [header["pts"][0] for header in records.headers()] == pytest.approx([0.0, 0.4, 0.8, 1.2])


def test_a_clip_with_fewer_frames_has_each_once_and_too_few_are_said(root: Path) -> None:
    records = Records()
    for number, settings in enumerate((SETTINGS, SETTINGS.model_copy(update={"min_frames": 6}))):
        task = stage.FrameTask(make_row("short.mp4", video_id=f"{number}"), root, settings, records)  # type: ignore[arg-type]
        stage.extract_clip(task)
    assert [header["decode_index"] for header in records.headers()] == [[0, 1, 2, 3, 4]] * 2
    notes = [[note.status for note in unpack_record(record).notes] for record in records.values()]
    assert notes == [[], ["too_short"]]


def test_the_samplers_take_one_stored_frame_of_each_segment() -> None:
    decoded, count, frames = 450, 36, 12
    stored = np.array(spread_frames(decoded, count))
    generator = np.random.default_rng(0)
    for _ in range(20):
        taken = stored[sample_window(generator, frames, 1, count, "tsn")]
        assert list(taken * frames // decoded) == list(range(frames))
    # With an odd number of stored frames per segment, the tests' frames are those of all frames.
    for test_frames in (4, 12):
        (window,) = view_windows(1, test_frames, 1, count, "tsn")
        assert list(stored[window]) == middles(decoded, test_frames)
    assert list(sample_window(generator, 8, 1, 5, "tsn") < 5) == [True] * 8  # a clip of five stored frames
