"""What is shown of a video: shape of pixels, crops, choice of stream, changes of size; as the ffmpeg program shows it."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from synthetic_videos import X264, decode_by_program, ffmpeg, make_pan, make_row, make_video

from stm.config import Frames
from stm.datasets.annotations import AnnotatedClip
from stm.datasets.display import PixelAspect, choose_stream, read_cropping
from stm.datasets.probe import probe_file
from stm.jobs.journal import Journal
from stm.jobs.status import Status
from stm.plan.clips import _read_header
from stm.preprocess.clip_outcomes import Record, unpack_record
from stm.preprocess.frames.extract import FrameTask, extract_clip
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.header_crop import read_origin
from stm.preprocess.video.random_access import read_clip
from stm.preprocess.video.reader import Video

WIDTH, HEIGHT, FRAMES = 192, 96, 12
SETTINGS = Frames(every=1, short_side=96, quality=95)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return make_pan(FRAMES, 2, 1, WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def plain(frames: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("plain") / "plain.mp4", frames)


def store(path: Path, settings: Frames = SETTINGS) -> Record:
    journal = Journal(path.parent / "frames.tar", {})
    task = FrameTask(make_row(path.name), path.parent, settings, journal)
    extract_clip(task)
    data = journal.get(task.item)
    journal.close()
    assert data is not None
    return unpack_record(data)


def sizes(path: Path, settings: Frames = SETTINGS) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The stored size, the source's size, and the size in the manifest."""
    header, facts = store(path, settings).header, probe_file(path, 16, 4096)
    return (
        (header["width"], header["height"]),
        (header["source_width"], header["source_height"]),
        (facts["width"], facts["height"]),
    )


# ------------------------------------------------------------------------------------------------ shape of pixels


ASPECTS = {  # name: how the shape is set, and width x height as shown
    "codec.mp4": ([*X264, "-vf", "setsar=2"], (384, 96)),
    "codec.ts": ([*X264, "-vf", "setsar=2"], (384, 96)),
    "tall.mkv": ([*X264, "-vf", "setsar=8/9"], (171, 96)),
    "mpeg4.avi": (["-c:v", "mpeg4", "-vf", "setsar=4/3"], (256, 96)),
    "mpeg2.mpg": (["-c:v", "mpeg2video", "-aspect", "16:9"], (171, 96)),
    "square.mp4": ([*X264, "-vf", "setsar=1"], (192, 96)),
}


@pytest.mark.parametrize("name", ASPECTS)
def test_pixels_that_are_not_square_are_stretched_as_the_ffmpeg_program_scales_them(
    name: str, frames: np.ndarray, tmp_path: Path
) -> None:
    options, shown = ASPECTS[name]
    path = make_video(tmp_path / name, frames, options)
    stored, source, probed = sizes(path)
    assert source == probed == shown
    assert stored[1] == 96 and abs(stored[0] - shown[0]) <= 1
    assert read_clip(path, [3]).shape == (1, shown[1], shown[0], 3)
    kind = "bicubic" if shown[0] >= WIDTH else "area"
    truth = decode_by_program(path, *shown, "-vf", f"scale={shown[0]}:{shown[1]}:flags={kind}")
    ours = read_clip(path, range(FRAMES))
    assert np.abs(ours.astype(int) - truth).mean() < 1


def test_the_container_overrides_the_codec_and_rotation_comes_last(frames: np.ndarray, tmp_path: Path) -> None:
    coded = make_video(tmp_path / "coded.mp4", frames, [*X264, "-vf", "setsar=2"])
    ffmpeg("-i", coded, "-c", "copy", "-aspect", "8:3", tmp_path / "container.mp4")
    assert sizes(tmp_path / "container.mp4")[1:] == ((256, 96), (256, 96))
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "container.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert sizes(tmp_path / "turned.mp4") == ((96, 256),) * 3
    ffmpeg("-display_hflip", "-i", tmp_path / "container.mp4", "-c", "copy", tmp_path / "mirrored.mp4")
    upright, mirrored = (read_clip(tmp_path / name, [0]) for name in ("container.mp4", "mirrored.mp4"))
    assert np.array_equal(upright[:, :, ::-1], mirrored)


def test_absurd_pixels_are_refused_and_the_reason_names_their_shape(frames: np.ndarray, tmp_path: Path) -> None:
    for aspect, status, name in (("1:8", Status.TOO_SMALL, "thin.mp4"), ("90:1", Status.OPEN_FAILED, "wide.mp4")):
        ratio = aspect.replace(":", "/")
        path = make_video(tmp_path / name, frames[:2], [*X264, "-vf", f"setsar={ratio}"])
        (note,) = store(path).notes
        facts = probe_file(path, 32, 4096)
        assert note.status is facts["status"] is status
        assert f"192 x 96 pixels of shape {aspect}" in note.detail and aspect in facts["detail"]


def test_the_resolution_of_an_image_file_does_not_stretch_it(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.jpg", dpi=(300, 100))
    settings = SETTINGS.model_copy(update={"min_frames": 1})
    assert sizes(tmp_path / "a.jpg", settings) == ((96, 96), (64, 64), (64, 64))


def test_the_plan_counts_shown_pixels(frames: np.ndarray, tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", frames, [*X264, "-vf", "setsar=2"])
    assert _read_header(tmp_path, AnnotatedClip("a.mp4", "train"))[1:] == (384, 96)


# --------------------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("crop", [(32, 32, 0, 0), (2, 0, 0, 0), (34, 2, 6, 4), (0, 0, 0, 8)])
@pytest.mark.parametrize("ending", ["mp4", "ts"])
def test_a_crop_in_the_header_is_exact(ending: str, crop: tuple[int, ...], plain: Path, tmp_path: Path) -> None:
    left, right, top, bottom = crop
    path = tmp_path / f"cropped.{ending}"
    sides = f"crop_left={left}:crop_right={right}:crop_top={top}:crop_bottom={bottom}"
    ffmpeg("-i", plain, "-c", "copy", "-bsf:v", f"h264_metadata={sides}", path)
    assert np.array_equal(read_clip(path, range(FRAMES)), show(plain, crop))
    shown = (WIDTH - left - right, HEIGHT - top - bottom)
    assert sizes(path)[1:] == (shown, shown)
    with Video(path) as video:
        assert video.origin == (left, top)


def show(path: Path, crop: tuple[int, ...]) -> np.ndarray:
    """The frames of the uncropped file as the ffmpeg program crops them."""
    left, right, top, bottom = crop
    size = WIDTH - left - right, HEIGHT - top - bottom
    return decode_by_program(path, *size, "-vf", f"crop={size[0]}:{size[1]}:{left}:{top}")


def crop_matroska(source: Path, path: Path, crop: tuple[int, ...]) -> Path:
    """Write the crop into a Matroska file, in place of its description of colours."""
    colours = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"
    ffmpeg("-i", source, "-vf", colours, *X264, "-write_crc32", "0", path)
    data = path.read_bytes()
    place = data.index(b"\x55\xb0\x98")  # Colour, 24 bytes
    elements = zip((b"\x54\xcc", b"\x54\xdd", b"\x54\xbb", b"\x54\xaa"), crop, strict=True)
    written = b"".join(name + bytes([0x81, value]) for name, value in elements) + b"\xec\x89" + bytes(9)  # Void
    path.write_bytes(data[:place] + written + data[place + 27 :])
    return path


@pytest.mark.parametrize("crop", [(32, 32, 0, 0), (7, 3, 10, 0), (0, 0, 0, 16)])
def test_a_crop_of_the_container_is_applied_as_the_program_applies_it(
    crop: tuple[int, ...], plain: Path, tmp_path: Path
) -> None:
    path = crop_matroska(plain, tmp_path / "cropped.mkv", crop)
    ours = read_clip(path, range(FRAMES))
    assert np.array_equal(ours, decode_by_program(path, ours.shape[2], ours.shape[1]))
    assert abs(ours.shape[2] - (WIDTH - sum(crop[:2]))) <= 1 and ours.shape[1] == HEIGHT - sum(crop[2:])
    assert sizes(path)[1:] == ((ours.shape[2], ours.shape[1]),) * 2
    with Video(path) as video:
        assert video.cropping == crop
        assert [frame.seconds for frame in video.frames()] == pytest.approx([n / 25 for n in range(FRAMES)], abs=2e-3)


def crop_mp4(source: Path, path: Path, size: tuple[int, int], offset: tuple[int, int]) -> Path:
    """Write a clean aperture into an mp4 file: its size, and the offset of its centre, in half pixels."""
    data = bytearray(source.read_bytes())
    aperture = struct.pack(">I4s8i", 40, b"clap", size[0], 1, size[1], 1, offset[0], 2, offset[1], 2)
    place, boxes = 0, []
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = data.index(name, place)
        boxes.append(place - 4)
    end = boxes[-1] + int.from_bytes(data[boxes[-1] : boxes[-1] + 4], "big")
    data[end:end] = aperture
    for box in boxes:
        data[box : box + 4] = (int.from_bytes(data[box : box + 4], "big") + len(aperture)).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("size", "offset"), [((128, 96), (0, 0)), ((180, 90), (4, -2)), ((176, 96), (16, 0))])
def test_the_clean_aperture_of_mp4_files_is_applied_as_the_program_applies_it(
    size: tuple[int, int], offset: tuple[int, int], plain: Path, tmp_path: Path
) -> None:
    path = crop_mp4(plain, tmp_path / "aperture.mp4", size, offset)
    assert np.array_equal(read_clip(path, range(FRAMES)), decode_by_program(path, *size))
    assert sizes(path)[1:] == (size, size)


def test_a_title_that_looks_like_a_crop_crops_nothing(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "titled.mkv"
    text = "Stream #0:0\n    Frame Cropping: 32/32/0/0"
    ffmpeg("-i", plain, "-c", "copy", "-metadata", f"title={text}", "-metadata:s:v", f"Frame Cropping={text}", path)
    with Video(path) as video:
        assert not any(video.cropping)


def test_a_crop_that_leaves_nothing_is_refused(plain: Path, tmp_path: Path) -> None:
    path = crop_matroska(plain, tmp_path / "cropped.mkv", (100, 92, 0, 0))
    (note,) = store(path).notes
    assert note.status is Status.OPEN_FAILED


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p", "gray"])
def test_the_crop_of_other_chroma_formats_is_read(pixels: str, frames: np.ndarray, tmp_path: Path) -> None:
    path, cropped = tmp_path / "a.mp4", tmp_path / "b.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=192x96:d=0.1", *X264, "-pix_fmt", pixels, path)
    ffmpeg("-i", path, "-c", "copy", "-bsf:v", "h264_metadata=crop_left=8:crop_top=4", cropped)
    with Video(cropped) as video:
        assert video.origin == (8, 4)


@pytest.mark.parametrize(
    "data", [None, b"", b"\1", b"\0\0\1", b"\0\0\1\x67", b"\0\0\1\x67" + bytes(50), bytes(range(60))]
)
def test_damaged_headers_crop_nothing(data: bytes | None) -> None:
    assert read_origin(data) == (0, 0)


# ------------------------------------------------------------------------------------------------ choice of stream


def test_the_default_stream_is_shown_and_among_equals_the_largest(
    plain: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    preview = make_video(tmp_path / "preview.mp4", frames[::-1, ::2, ::2])
    both = ("-i", preview, "-i", plain, "-map", "0", "-map", "1", "-c", "copy")
    expected = {"second.mkv": ("0", "default", 1), "none.mkv": ("0", "0", 1), "first.mkv": ("default", "0", 0)}
    for name, (first, second, index) in expected.items():
        path = tmp_path / name
        ffmpeg(*both, "-disposition:v:0", first, "-disposition:v:1", second, path)
        source = (preview, plain)[index]
        assert np.array_equal(read_clip(path, range(FRAMES)), read_clip(source, range(FRAMES))), name
        width = probe_file(path, 16, 4096)["width"]
        assert width == (WIDTH // 2, WIDTH)[index]
        program = ffmpeg("-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        assert len(program) == (WIDTH * HEIGHT * 3) // (4, 1)[index]


@pytest.mark.parametrize("name", ["cover.mp4", "cover.mkv"])
def test_a_thumbnail_is_not_the_video_although_it_is_larger_and_not_marked(
    name: str, plain: Path, tmp_path: Path
) -> None:
    thumbnail = tmp_path / "thumbnail.jpg"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=640x320", "-frames:v", "1", thumbnail)
    path = tmp_path / name
    marks = ("-disposition:v:0", "default", "-disposition:v:1", "default")
    ffmpeg("-i", thumbnail, "-i", plain, "-map", "0", "-map", "1", "-c", "copy", *marks, path)
    assert np.array_equal(read_clip(path, range(FRAMES)), read_clip(plain, range(FRAMES)))
    assert probe_file(path, 16, 4096)["codec"] == "h264"
    record = store(path)
    assert (len(record.blobs), record.notes) == (FRAMES, [])
    alone = tmp_path / f"alone_{name}"
    ffmpeg("-i", thumbnail, "-c", "copy", alone)
    assert len(read_clip(alone, [0])) == 1


def test_a_default_audio_stream_or_an_unknown_codec_does_not_matter(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.4", "-i", plain, "-map", "0", "-map", "1", "-c:v", "copy", path)
    with av.open(str(path)) as container:
        stream = choose_stream(container)
        assert stream is not None and stream.index == 1
        assert read_cropping(container, stream) == (0, 0, 0, 0)
        assert PixelAspect(stream).now() == Fraction(1)


def test_reading_a_crop_leaves_the_log_silent(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(plain.read_bytes())
    for place in range(len(data) // 2, len(data), 97):
        data[place] ^= 0xFF
    (tmp_path / "flipped.mp4").write_bytes(data)
    store(tmp_path / "flipped.mp4")
    probe_file(tmp_path / "flipped.mp4", 16, 4096)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ changes of size


def joined(path: Path, sizes: list[tuple[int, int]], *filters: str) -> Path:
    """A transport stream whose frame size changes, with times that continue."""
    parts = []
    for number, (width, height) in enumerate(sizes):
        part = path.with_name(f"part{number}.ts")
        chosen = filters[number] if filters else "null"
        offset = ("-output_ts_offset", str(number * 0.48))
        make_video(part, make_pan(FRAMES, 2, 1, width, height), [*X264, "-bf", "0", "-vf", chosen, *offset])
        parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def test_a_clip_whose_size_changes_says_so_and_keeps_what_came_before(tmp_path: Path) -> None:
    path = joined(tmp_path / "resize.ts", [(192, 96), (96, 192)])
    record = store(path)
    assert record.notes[0].status is Status.SIZE_CHANGES
    assert "from 192 x 96 pixels to 96 x 192 pixels" in record.notes[0].detail
    assert "0.480 s" in record.notes[0].detail
    assert len(record.blobs) == FRAMES and (record.header["width"], record.header["height"]) == (192, 96)
    assert Status.SIZE_CHANGES.default_policy == "drop"
    with pytest.raises(VideoError, match="size_changes"):
        read_clip(path, [0, 2 * FRAMES - 1])


def test_a_clip_with_too_few_frames_before_the_change_names_the_change(tmp_path: Path) -> None:
    record = store(
        joined(tmp_path / "resize.ts", [(192, 96), (96, 192)]), SETTINGS.model_copy(update={"min_frames": 20})
    )
    assert [note.status for note in record.notes] == [Status.SIZE_CHANGES, Status.TOO_SHORT]


def test_a_change_of_resolution_alone_is_none(tmp_path: Path) -> None:
    record = store(joined(tmp_path / "adaptive.ts", [(192, 96), (96, 48)]))
    assert record.notes == [] and len(record.blobs) == 2 * FRAMES


def test_a_change_of_the_shape_of_pixels_is_a_change_of_size(tmp_path: Path) -> None:
    record = store(joined(tmp_path / "wide.ts", [(192, 96), (192, 96)], "setsar=1", "setsar=4/3"))
    assert record.notes[0].status is Status.SIZE_CHANGES
    assert "from 192 x 96 pixels to 192 x 96 pixels of shape 4:3" in record.notes[0].detail


# ------------------------------------------------------------------------------------------------ animated images


def test_animated_images_are_videos_or_refused_as_such(tmp_path: Path) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in make_pan(6, 2, 1, 64, 48)]
    settings = SETTINGS.model_copy(update={"short_side": 48})
    for name in ("a.gif", "a.apng", "a.png", "a.webp"):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=100)
    for name in ("a.gif", "a.apng", "a.png"):
        record, facts = store(tmp_path / name, settings), probe_file(tmp_path / name, 16, 4096)
        assert (len(record.blobs), record.notes, facts["status"]) == (6, [], Status.OK), name
        assert facts["fps"] == pytest.approx(10)
    (note,) = store(tmp_path / "a.webp", settings).notes
    facts = probe_file(tmp_path / "a.webp", 16, 4096)
    assert note.status is facts["status"] is Status.OPEN_FAILED
    assert "animated WebP" in note.detail and "animated WebP" in facts["detail"]
    images[0].save(tmp_path / "still.png")
    images[0].save(tmp_path / "still.webp", exif=Image.Exif(), icc_profile=b"x" * 200)
    for name in ("still.png", "still.webp"):
        assert probe_file(tmp_path / name, 16, 4096)["frames"] == 1
