"""The motion stage: correct vectors for known motion from each backend and codec, and unusual clips."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import ffmpeg as ffmpeg_python
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_videos import FFMPEG, X264, ffmpeg, make_pan, make_row, make_video, write_slice

from stm.config import BadInput, Frames, Motion
from stm.preprocess.frames.extract import extract_frames, read_kept
from stm.preprocess.motion.accumulate import MotionSum
from stm.preprocess.motion.block_matching import BLOCK, CellScaler
from stm.preprocess.motion.codec import Field, read_fields, sum_over_cells
from stm.preprocess.motion.measure import MotionMaps, extract_motion, measure_motion
from stm.preprocess.motion.transcode import GROUP, transcode_fields
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import Video
from stm.shards.grid import map_shape
from stm.storage.files import sha256_file
from stm.storage.tables import read_table

WIDTH, HEIGHT, FRAMES, GRID, EVERY = 224, 160, 24, 5, 4
SHAPE = map_shape(WIDTH, HEIGHT, GRID)
STORED = np.arange(0, FRAMES, EVERY)
BACKENDS = ("codec", "transcode", "mestimate")
CODINGS: dict[str, tuple[str, ...]] = {
    "no_b.mp4": (*X264, "-bf", "0", "-refs", "1", "-g", "12"),
    "defaults.mp4": ("-c:v", "libx264"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-g", "12", "-q:v", "3"),
    "mpeg4_b.avi": ("-c:v", "mpeg4", "-bf", "2", "-g", "12", "-q:v", "3"),
    "mpeg2_b.mpg": ("-c:v", "mpeg2video", "-bf", "2", "-q:v", "3"),
    "flash.flv": ("-c:v", "flv", "-q:v", "3"),
    "raw.h264": X264,
    "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none"),
}


@pytest.fixture(scope="module")
def pans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pan of (4, -3) pixels per frame in every codec."""
    folder, frames = tmp_path_factory.mktemp("pans"), make_pan(FRAMES, 4, -3, WIDTH, HEIGHT)
    for name, coding in CODINGS.items():
        make_video(folder / name, frames, coding)
    return folder


def measure(path: Path, backend: str, **more: Any) -> MotionMaps:
    return measure_motion(path, None, None, STORED, SHAPE, Motion.model_validate({"backend": backend, **more}))


def inside(maps: np.ndarray) -> np.ndarray:
    """The map without its border, where new content enters the frame."""
    return maps[:, 1:-1, 1:-1].astype(float)


# ----------------------------------------------------------------------------------------------- known motion


SILENT = ("vp9.webm", "hevc.mp4")
READABLE = [(b, name) for b in BACKENDS for name in CODINGS if b != "codec" or name not in SILENT]


@pytest.mark.parametrize(("backend", "name"), READABLE)
def test_a_pan_has_its_vector_everywhere(backend: str, name: str, pans: Path) -> None:
    maps = measure(pans / name, backend)
    cell = WIDTH / SHAPE[1], HEIGHT / SHAPE[0]
    truth = np.array([4 * EVERY / cell[0], -3 * EVERY / cell[1]])  # content to the right and up
    # The reference frames of x264's B-pyramid are not exported: up to a sixth of the motion is lost. Block matching finds
    # only whole pixels of the scaled frame. benchmarks/motion.py measures both.
    pyramid = backend == "codec" and name in ("defaults.mp4", "raw.h264")
    tolerance = 0.17 if pyramid else 0.12 if backend == "mestimate" else 0.05
    error = np.linalg.norm(inside(maps.vector) - truth, axis=-1) / np.linalg.norm(truth)
    assert np.median(error) < tolerance
    assert np.median(inside(maps.magnitude)) == pytest.approx(np.linalg.norm(truth), rel=tolerance)


@pytest.mark.parametrize("name", SILENT)
def test_codings_without_vectors_are_refused_and_the_other_backends_named(name: str, pans: Path) -> None:
    with pytest.raises(VideoError, match=r"unsupported_motion: .*`mestimate` or `transcode`"):
        measure(pans / name, "codec")


def test_a_stream_of_key_frames_has_no_vectors(tmp_path: Path) -> None:
    path = make_video(tmp_path / "intra.mp4", make_pan(FRAMES, 4, 0, 64, 64), [*X264, "-g", "1"])
    with pytest.raises(VideoError, match="unsupported_motion"):
        measure_motion(path, None, None, STORED, (4, 4), Motion(backend="codec"))


def test_a_still_picture_has_no_motion(tmp_path: Path) -> None:
    path = make_video(tmp_path / "still.mp4", np.repeat(make_pan(1, 0, 0, WIDTH, HEIGHT), FRAMES, axis=0))
    for backend in BACKENDS:
        assert np.abs(measure(path, backend).magnitude).max() < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_lie_on_the_part_of_the_frame_that_a_crop_leaves(backend: str, tmp_path: Path) -> None:
    still = np.repeat(make_pan(1, 0, 0, WIDTH, HEIGHT), FRAMES, axis=0)
    for n in range(FRAMES):
        still[n, 40:88, 84 + 4 * n : 132 + 4 * n] = still[0, 100:148, :48].copy()  # a block that moves to the right
    path, cropped = make_video(tmp_path / "a.mp4", still, CODINGS["no_b.mp4"]), tmp_path / "cropped.mp4"
    ffmpeg("-i", path, "-c", "copy", "-bsf:v", "h264_metadata=crop_left=64:crop_top=32", cropped)
    chosen = Motion.model_validate({"backend": backend, "subtract_camera": False})
    whole = measure_motion(path, None, None, STORED, (5, 7), chosen)
    part = measure_motion(cropped, None, None, STORED, (4, 5), chosen)
    expected = whole.magnitude[:, 1:, 2:].astype(float)
    # Cells are 32 pixels in both. Block matching and x264 search from other neighbours at the border.
    assert np.median(np.abs(part.magnitude - expected)) < 0.01
    assert np.corrcoef(part.magnitude.ravel(), expected.ravel())[0, 1] > (0.999 if backend == "codec" else 0.9)
    if backend == "codec":
        assert np.abs(part.vector - whole.vector[:, 1:, 2:]).max() < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_are_square_as_shown_although_pixels_are_not(backend: str, tmp_path: Path) -> None:
    options = [*CODINGS["no_b.mp4"], "-vf", "setsar=2"]
    path = make_video(tmp_path / "wide.mp4", make_pan(FRAMES, 4, -3, WIDTH, HEIGHT), options)
    write_slice(tmp_path / "slice.parquet", [make_row("wide.mp4")])
    frames = tmp_path / "f.parquet"
    chosen = Frames(every=EVERY, short_side=64)
    extract_frames(tmp_path / "slice.parquet", tmp_path, tmp_path / "f.tar", frames, chosen, BadInput(), 1)
    (stored,) = read_kept(frames)
    shape = map_shape(stored["width"], stored["height"], GRID)
    assert shape == (GRID, 2 * SHAPE[1])
    maps = measure_motion(path, None, None, STORED, shape, Motion.model_validate({"backend": backend}))
    truth = np.array([2 * 4, -3]) * EVERY / (HEIGHT / GRID)  # as shown, a pixel is twice as wide
    error = np.linalg.norm(inside(maps.vector) - truth, axis=-1) / np.linalg.norm(truth)
    assert np.median(error) < (0.12 if backend == "mestimate" else 0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("turn", ["90", "180", "-90"])
def test_vectors_turn_with_the_picture(turn: str, backend: str, pans: Path, tmp_path: Path) -> None:
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", turn, "-i", pans / "no_b.mp4", "-c", "copy", path)
    shape = SHAPE if turn == "180" else SHAPE[::-1]
    maps = measure_motion(path, None, None, STORED, shape, Motion.model_validate({"backend": backend}))
    upright = measure(pans / "no_b.mp4", backend)
    quarters = {"90": 1, "180": 2, "-90": 3}[turn]  # counterclockwise, as the display matrix counts
    x, y = np.moveaxis(upright.vector.astype(float), -1, 0)
    for _ in range(quarters):
        x, y = y, -x  # with y down, a quarter counterclockwise
    expected = np.rot90(np.stack([x, y], axis=-1), quarters, axes=(1, 2))
    assert np.abs(maps.vector - expected).max() < 0.01
    assert np.abs(maps.magnitude - np.rot90(upright.magnitude, quarters, axes=(1, 2))).max() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_subtracting_the_camera_leaves_nothing_of_a_pan(backend: str, pans: Path) -> None:
    still = inside(measure(pans / "no_b.mp4", backend, subtract_camera=True).magnitude)
    moving = inside(measure(pans / "no_b.mp4", backend).magnitude)
    assert np.median(still) < (0.25 if backend == "mestimate" else 0.05) * np.median(moving)


@pytest.mark.parametrize("backend", BACKENDS)
def test_motion_of_more_than_a_cell_a_frame_is_found(backend: str, tmp_path: Path) -> None:
    path = make_video(tmp_path / "fast.mp4", make_pan(9, 20, 0, WIDTH, HEIGHT), [*X264, "-bf", "0", "-refs", "1"])
    maps = measure_motion(path, None, None, np.array([0, 4, 8]), (10, 14), Motion.model_validate({"backend": backend}))
    assert np.median(inside(maps.vector)[..., 0]) == pytest.approx(20 * 4 / 16, rel=0.05)


def test_the_first_stored_frame_has_the_values_of_the_second(pans: Path) -> None:
    for part in measure(pans / "no_b.mp4", "mestimate"):
        assert np.array_equal(part[0], part[1])


# ------------------------------------------------------------------------------------------------ independent sums


def test_magnitudes_are_a_plain_sum_over_the_decoders_vectors(tmp_path: Path) -> None:
    """Loops over pixels: every pixel of a block gets the block's vector, every cell the mean of its pixels."""
    path = make_video(tmp_path / "p.mp4", make_pan(9, 3, 2, 96, 64), CODINGS["no_b.mp4"])
    rows, columns, height, width = 4, 6, 64, 96
    lengths, vectors = np.zeros((2, rows, columns)), np.zeros((2, rows, columns, 2))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"flags2": "+export_mvs"}
        for number, frame in enumerate(container.decode(stream)):
            if number == 0:
                continue
            field, count = np.zeros((height, width, 2)), np.zeros((height, width))
            for vector in frame.side_data["MOTION_VECTORS"]:  # type: ignore[attr-defined]
                for y in range(vector.dst_y - vector.h // 2, vector.dst_y - vector.h // 2 + vector.h):
                    for x in range(vector.dst_x - vector.w // 2, vector.dst_x - vector.w // 2 + vector.w):
                        if 0 <= x < width and 0 <= y < height:
                            field[y, x] -= np.array([vector.motion_x, vector.motion_y]) / vector.motion_scale
                            count[y, x] += 1
            for row in range(rows):
                for column in range(columns):
                    place = np.s_[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                    assert count[place].sum() > 0  # this pan has no cell that is all intra
                    mean = field[place].sum(axis=(0, 1)) / count[place].sum() / 16
                    vectors[(number - 1) // 4, row, column] += mean
                    lengths[(number - 1) // 4, row, column] += np.hypot(*mean)
    maps = measure_motion(path, None, None, np.array([0, 4, 8]), (rows, columns), Motion(backend="codec"))
    assert np.allclose(maps.magnitude[1:], lengths, atol=2e-3)
    assert np.allclose(maps.vector[1:], vectors, atol=2e-3)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), every=st.integers(1, 4), steps=st.integers(1, 4))
def test_unknown_cells_are_interpolated_in_time(data: st.DataObject, every: int, steps: int) -> None:
    frames, (rows, columns) = every * steps + 1, (2, 3)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vectors = random.normal(size=(frames, rows, columns, 2)).astype(np.float32)
    known = random.random((frames, rows, columns)) < data.draw(st.sampled_from([0.2, 0.6, 1.0]))
    known[random.integers(0, frames)] = True
    stored = np.arange(0, frames, every)
    total = MotionSum(stored, rows, columns)
    for index in range(frames):
        total.add(Field(index, vectors[index] * known[index][..., None], known[index].astype(np.float32)))
    assert total.complete and total.finish()
    for row, column in np.ndindex(rows, columns):
        seen = np.flatnonzero(known[:, row, column])
        filled = np.stack([np.interp(np.arange(frames), seen, vectors[seen, row, column, axis]) for axis in (0, 1)])
        for step in range(1, steps + 1):
            part = slice(every * (step - 1) + 1, every * step + 1)
            assert np.allclose(total.vector[step, row, column], filled[:, part].sum(axis=1), atol=1e-4)
            assert total.magnitude[step, row, column] == pytest.approx(np.hypot(*filled[:, part]).sum(), abs=1e-4)
            unknown = 255 * (~known[part, row, column]).sum() / every
            assert total.intra[step, row, column] == pytest.approx(unknown, abs=0.51)


def test_key_frames_are_flagged_with_their_share_of_the_step(tmp_path: Path) -> None:
    path = make_video(tmp_path / "short.avi", make_pan(13, 4, 0, 96, 64), ["-c:v", "mpeg4", "-g", "4", "-q:v", "3"])
    maps = measure_motion(path, None, None, np.arange(0, 13, 4), (4, 6), Motion(backend="codec"))
    assert np.median(maps.intra) == 64  # a quarter: frames 4, 8 and 12 are I-frames
    assert np.median(inside(maps.vector)[..., 0]) == pytest.approx(4 * 4 / 16, rel=0.05)


@given(
    x=st.integers(-10, 110), y=st.integers(-10, 90), w=st.sampled_from([4, 8, 16]), h=st.sampled_from([4, 8, 16]),
    rows=st.integers(1, 9), columns=st.integers(1, 9),
)  # fmt: skip
def test_a_blocks_area_is_dealt_to_the_cells_it_lies_on(
    x: int, y: int, w: int, h: int, rows: int, columns: int
) -> None:
    width, height = 7 * 9 * 8, 5 * 9 * 8  # divisible by every number of cells but 7 rows
    blocks = np.zeros(1, [("dst_x", "i2"), ("dst_y", "i2"), ("w", "u1"), ("h", "u1")])
    blocks["dst_x"], blocks["dst_y"], blocks["w"], blocks["h"] = x, y, w, h
    shares = sum_over_cells(blocks, [np.ones(1)], np.zeros(1, int), width, height, (1, rows, columns))[0, 0]
    cut_w = max(0, min(x - w // 2 + w, width) - max(x - w // 2, 0))
    cut_h = max(0, min(y - h // 2 + h, height) - max(y - h // 2, 0))
    assert shares.sum() * (width / columns) * (height / rows) == pytest.approx(cut_w * cut_h)
    fine = np.zeros((height, width))
    fine[max(y - h // 2, 0) : max(y - h // 2 + h, 0), max(x - w // 2, 0) : max(x - w // 2 + w, 0)] = 1
    if height % rows == 0 and width % columns == 0:
        cells = fine.reshape(rows, height // rows, columns, width // columns).mean(axis=(1, 3))
        assert np.allclose(shares, cells)


def test_the_transcode_has_the_vectors_of_one_by_the_ffmpeg_program(pans: Path, tmp_path: Path) -> None:
    """The same transcode, built with ffmpeg-python and run by the ffmpeg program, read back from its file."""
    rows, columns = SHAPE
    scale, raw = CellScaler(rows, columns), b""
    with Video(pans / "vp9.webm") as video:
        for frame in video.frames():
            raw += scale(frame.image, frame.index).to_ndarray().tobytes()
    size = f"{columns * BLOCK}x{rows * BLOCK}"
    path = tmp_path / "peer.h264"
    x264 = "rc-lookahead=0:mbtree=0:weightp=0:scenecut=0:ref=1"
    source = ffmpeg_python.input("pipe:", format="rawvideo", pix_fmt="yuv420p", s=size, r=25)
    coding = {"vcodec": "libx264", "preset": "veryfast", "crf": 20, "bf": 0, "g": GROUP, "x264-params": x264}
    source.output(str(path), **coding).run(cmd=FFMPEG, input=raw, quiet=True)
    with Video(path, vectors=True) as video:
        peer = list(read_fields(video.frames(), "h264", rows, columns))
    with Video(pans / "vp9.webm") as video:
        ours = list(transcode_fields(video.frames(), rows, columns))
    assert [field.index for field in ours] == [field.index for field in peer] == list(range(FRAMES))
    # Two builds of x264: their choices may differ in a few blocks.
    same = np.mean([np.abs(a.vector - b.vector).max(axis=-1) < 0.02 for a, b in zip(ours, peer, strict=True)])
    assert same > 0.9


# ------------------------------------------------------------------------------------------------ parts of a video


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["defaults.mp4", "mpeg2_b.mpg"])
def test_a_part_of_a_video_moves_like_that_part_of_the_whole(name: str, backend: str, pans: Path) -> None:
    part = measure_motion(
        pans / name, 0.2, 0.72, np.array([0, 4, 8, 12]), SHAPE, Motion.model_validate({"backend": backend})
    )
    whole = measure_motion(
        pans / name, None, None, np.array([0, 5, 9, 13, 17]), SHAPE, Motion.model_validate({"backend": backend})
    )
    difference = np.abs(inside(part.vector[1:]) - inside(whole.vector[2:]))
    # The codec's vectors are identical, including references of B-frames outside the part.
    assert difference.max() < 2e-3 if backend == "codec" else np.median(difference) < 0.03


def test_one_stored_frame_has_no_step(pans: Path) -> None:
    for backend in BACKENDS:
        maps = measure_motion(
            pans / "no_b.mp4", None, None, np.array([0]), SHAPE, Motion.model_validate({"backend": backend})
        )
        assert maps.magnitude.shape == (1, *SHAPE)
        assert not maps.magnitude.any() and (maps.intra == 255).all()


def test_a_video_that_has_become_shorter_is_told(pans: Path) -> None:
    with pytest.raises(VideoError, match="24 frames can be decoded, 41 when"):
        measure_motion(pans / "no_b.mp4", None, None, np.array([0, 40]), SHAPE, Motion())


# ------------------------------------------------------------------------------------------------------ the stage


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, pans: Path) -> Path:
    """A shard of good, odd and bad videos, with its frames extracted."""
    folder = tmp_path_factory.mktemp("shard")
    videos = folder / "videos"
    videos.mkdir()
    pan = make_pan(FRAMES, 2, 1, 96, 64)
    make_video(videos / "good.mp4", pan, [*X264, "-g", "8", "-movflags", "+faststart"])
    make_video(videos / "portrait.webm", make_pan(FRAMES, 1, 1, 63, 97), ["-c:v", "libvpx", "-deadline", "realtime"])
    make_video(videos / "variable.mp4", pan, [*X264, "-vf", "select=not(eq(mod(n\\,5)\\,3))", "-fps_mode", "vfr"])
    make_video(videos / "one.mp4", pan[:1])
    ffmpeg("-display_rotation", "90", "-i", videos / "good.mp4", "-c", "copy", videos / "turned.mp4")
    ffmpeg("-ss", "0.4", "-i", videos / "good.mp4", "-c", "copy", videos / "edited.mp4")
    whole = (videos / "good.mp4").read_bytes()
    (videos / "torn.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.3", videos / "sound.mp4")
    (videos / "page.txt").write_text("no video")
    names = ["good.mp4", "portrait.webm", "variable.mp4", "one.mp4", "turned.mp4", "edited.mp4", "torn.mp4"]
    rows = [make_row(name) for name in [*names, "sound.mp4", "page.txt"]]
    rows.append(make_row("good.mp4", video_id="part", start=0.2, end=0.72))
    chosen = Frames(every=EVERY, short_side=64)
    write_slice(folder / "slice.parquet", rows)
    extract_frames(
        folder / "slice.parquet",
        videos,
        folder / "f.tar",
        folder / "f.parquet",
        chosen,
        BadInput(max_failure_rate=1),
        1,
    )
    return folder


def run_stage(shard: Path, output: Path, processes: int = 1, **values: Any) -> dict[str, Mapping[str, Any]]:
    arguments = (shard / "slice.parquet", shard / "videos", shard / "f.parquet", output)
    extract_motion(*arguments, Motion(**values), 4, BadInput(max_failure_rate=1), processes)
    return {row["video_id"]: row for row in read_table(output).to_pylist()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kept_clip_has_one_row_that_fits_its_frames(backend: str, shard: Path, tmp_path: Path) -> None:
    rows = run_stage(shard, tmp_path / "m.parquet", backend=backend)
    kept = {row["video_id"]: row for row in read_kept(shard / "f.parquet")}
    assert list(rows) == [*kept] and len(kept) == 7  # without the single frame, the sound and the text
    for name, row in rows.items():
        assert row["frames"] == kept[name]["frames"]
        assert (row["rows"], row["columns"]) == map_shape(kept[name]["width"], kept[name]["height"], 4)
        cells = row["frames"] * row["rows"] * row["columns"]
        if backend == "codec" and name == "portrait.webm":
            assert (row["status"], row["policy"], row["magnitude"]) == ("unsupported_motion", "drop", None)
            assert "mestimate" in row["detail"] and "transcode" in row["detail"]
            continue
        assert (row["status"], row["policy"]) == ("ok", "keep")
        assert [len(row[part]) for part in ("magnitude", "vector", "intra")] == [cells, 2 * cells, cells]
        speed = np.median(np.array(row["magnitude"], float).reshape(-1, row["rows"], row["columns"])[1:])
        if name in ("good.mp4", "turned.mp4", "edited.mp4", "torn.mp4", "part"):
            assert speed == pytest.approx(np.hypot(2, 1) * EVERY / 16, rel=0.2)
        else:
            assert speed > 0


@pytest.mark.slow
def test_the_bytes_depend_neither_on_processes_nor_on_the_run(shard: Path, tmp_path: Path) -> None:
    for backend in BACKENDS:
        run_stage(shard, tmp_path / "a.parquet", 1, backend=backend)
        run_stage(shard, tmp_path / "b.parquet", 2, backend=backend)
        assert sha256_file(tmp_path / "a.parquet") == sha256_file(tmp_path / "b.parquet")


@pytest.mark.slow
def test_a_clip_that_takes_too_long_is_killed_and_marked(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    make_video(videos / "long.mp4", np.repeat(make_pan(2, 2, 1, 96, 64), 1500, axis=0))
    arguments = (write_slice(tmp_path / "slice.parquet", [make_row("long.mp4")]), videos)
    chosen = Frames(every=64, short_side=64)
    extract_frames(*arguments, tmp_path / "f.tar", tmp_path / "f.parquet", chosen, BadInput(), 1)
    late = run_stage(tmp_path, tmp_path / "m.parquet", timeout_seconds=1e-3)["long.mp4"]
    assert (late["status"], late["policy"], late["magnitude"]) == ("timeout", "drop", None)
    assert run_stage(tmp_path, tmp_path / "m.parquet")["long.mp4"]["status"] == "ok"
