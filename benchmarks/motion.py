"""Speed and accuracy of the motion backends: `python -m benchmarks.motion [--clips 3] [--video FILE ...]`.

Accuracy: clips with known motion at every pixel (a textured square that bounces over a textured background, fixed or
moving camera, noise) are encoded in several ways and measured. The end-point error is the mean distance between measured
and true motion of a cell, in cells per step of 4 frames; `still` is the error of predicting no motion. `area` is the area
under the ROC curve when the magnitude separates the object's cells from the others (0.5 is chance), after subtracting the
median vector, so that a moving camera does not hide the object.

Speed: frames per CPU second on one core for each backend, compared with decoding alone in the same run: to the decoder's own
frames, which is the upper bound, and to RGB arrays, which users of PyAV and decord get. Compare ratios, because the machine
may be shared.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import cv2
import decord
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from benchmarks._table import Row, compare, cpu_seconds, report, take_turns
from stm.config import Motion
from stm.preprocess.motion.measure import measure_motion
from stm.preprocess.video.container import VideoError
from stm.preprocess.video.reader import Video
from stm.shards.grid import map_shape

WIDTH, HEIGHT, FRAMES, STEP, GRID, SIDE = 340, 256, 48, 4, 14, 96
BACKENDS = ("codec", "transcode", "mestimate")
CODINGS: dict[str, list[str]] = {
    "x264 defaults": ["-c:v", "libx264"],
    "x264 bf0 refs1 g12": ["-c:v", "libx264", "-bf", "0", "-refs", "1", "-g", "12"],
    "x264 crf35": ["-c:v", "libx264", "-crf", "35"],
    "mpeg4 g12": ["-c:v", "mpeg4", "-g", "12", "-q:v", "4"],
    "mpeg4 bf2": ["-c:v", "mpeg4", "-bf", "2", "-q:v", "4"],
    "mpeg2 bf2": ["-c:v", "mpeg2video", "-bf", "2", "-q:v", "4"],
    "x265": ["-c:v", "libx265", "-x265-params", "log-level=none"],
    "vp9": ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"],
}


class Clip(NamedTuple):
    frames: NDArray[np.uint8]  # [F, height, width, 3]
    flow: NDArray[np.float32]  # [F, height, width, 2] pixels since the frame before
    object: NDArray[np.bool_]  # [F, height, width]


def make_clip(seed: int, moving_camera: bool, frames: int = FRAMES) -> Clip:
    """A clip with known motion. Speeds are up to 8 pixels per frame and direction for the object, 3 for the camera."""
    random = np.random.default_rng(seed)
    world = _texture(random, HEIGHT + 400, WIDTH + 400)
    square = _texture(random, SIDE, SIDE)
    room = np.array([WIDTH - SIDE, HEIGHT - SIDE])
    places = _bounce(random.uniform(0, 1, 2) * room, random.uniform(-8, 8, 2), room, frames)
    speed = random.uniform(-3, 3, 2) if moving_camera else np.zeros(2)
    # The camera turns back where the background ends.
    camera = 200 + _bounce(np.zeros(2), speed, np.full(2, 199.0), frames, low=-199.0)
    clip = Clip(
        np.empty((frames, HEIGHT, WIDTH, 3), np.uint8),
        np.zeros((frames, HEIGHT, WIDTH, 2), np.float32),
        np.zeros((frames, HEIGHT, WIDTH), bool),
    )
    for number in range(frames):
        mask = _shift(np.ones((SIDE, SIDE), np.float32), places[number])[..., None]
        image = _shift(world, -camera[number]) * (1 - mask) + _shift(square, places[number]) * mask
        clip.frames[number] = np.clip(image + random.normal(0, 1.5, image.shape), 0, 255)
        clip.object[number] = mask[..., 0] > 0.5
        if number:
            clip.flow[number] = camera[number - 1] - camera[number]
            clip.flow[number][clip.object[number]] = places[number] - places[number - 1]
    return clip


def _texture(random: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    image = np.zeros((height, width, 3), np.float32)
    for size, share in ((3, 0.25), (10, 0.35), (40, 0.4)):
        coarse = random.integers(0, 256, (height // size + 2, width // size + 2, 3)).astype(np.float32)
        image += share * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255)


def _bounce(place: NDArray, speed: NDArray, room: NDArray, frames: int, low: float = 0.0) -> NDArray[np.float64]:
    places = [place]
    for _ in range(frames - 1):
        after = places[-1] + speed
        speed = np.where((after < low) | (after > room), -speed, speed)
        places.append(places[-1] + speed)
    return np.array(places)


def _shift(image: NDArray[np.float32], by: NDArray) -> NDArray[np.float32]:
    matrix = np.array([[1, 0, by[0]], [0, 1, by[1]]], np.float32)
    return cv2.warpAffine(image, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR).astype(np.float32, copy=False)


def encode(clip: Clip, coding: Sequence[str], path: Path) -> None:
    program = imageio_ffmpeg.get_ffmpeg_exe()
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "25", "-i", "-"]
    command = [program, "-y", "-v", "error", *raw, *coding, "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=clip.frames.tobytes(), check=True)


def true_steps(clip: Clip, shape: tuple[int, int]) -> tuple[NDArray, NDArray]:
    """True motion in cells per step, [T, rows, columns, 2], and the cells that the object mostly covers, [T, rows, columns]."""
    rows, columns = shape
    flow = np.stack([cv2.resize(f, (columns, rows), interpolation=cv2.INTER_AREA) for f in clip.flow])
    flow *= np.array([columns / WIDTH, rows / HEIGHT], np.float32)
    ends = np.arange(STEP, FRAMES, STEP)
    steps = np.stack([flow[end - STEP + 1 : end + 1].sum(axis=0) for end in ends])
    masks = [
        cv2.resize(clip.object[end].astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA) for end in ends
    ]
    return steps, np.stack(masks) > 0.5


def area_under_curve(score: NDArray, truth: NDArray) -> float:
    """Probability that a cell of the object has a higher score than another cell."""
    order = np.argsort(np.argsort(score))
    inside = order[truth]
    return float((inside.mean() - (len(inside) - 1) / 2) / (~truth).sum())


def quality(clips: int, folder: Path) -> None:
    shape = map_shape(WIDTH, HEIGHT, GRID)
    stored = np.arange(0, FRAMES, STEP)
    print(f"{'encoding':20} {'camera':7} {'still':>6} | " + " | ".join(f"{b:>9} error  area" for b in BACKENDS))
    for camera in ("fixed", "moving"):
        generated = [make_clip(seed, camera == "moving") for seed in range(clips)]
        truths = [true_steps(clip, shape) for clip in generated]
        still = np.mean([np.linalg.norm(steps, axis=-1).mean() for steps, _ in truths])
        for name, coding in CODINGS.items():
            paths = [folder / f"{seed}.mkv" for seed in range(clips)]
            for clip, path in zip(generated, paths, strict=True):
                encode(clip, coding, path)
            cells = [_score(paths, truths, stored, shape, backend) for backend in BACKENDS]
            print(f"{name:20} {camera:7} {still:6.2f} | " + " | ".join(cells), flush=True)


def _score(paths: list[Path], truths: list, stored: NDArray, shape: tuple[int, int], backend: str) -> str:
    errors, areas = [], []
    for path, (steps, inside) in zip(paths, truths, strict=True):
        try:
            vectors = (
                measure_motion(path, None, None, stored, shape, Motion.model_validate({"backend": backend}))
                .vector[1:]
                .astype(float)
            )
        except VideoError as error:
            return f"{str(error.status)[:21]:>21}"
        errors.append(np.linalg.norm(vectors - steps, axis=-1).mean())
        relative = np.linalg.norm(vectors - np.median(vectors, axis=(1, 2), keepdims=True), axis=-1)
        areas.append(area_under_curve(relative.ravel(), inside.ravel()))
    return f"{'':9} {np.mean(errors):5.2f} {np.mean(areas):5.3f}"


def speed(videos: Sequence[Path], rounds: int) -> list[Row]:
    """Frames per CPU second, in turns: decoding only, to RGB by PyAV and by decord, and with motion by each backend."""
    rows = []
    for path in videos:
        with Video(path) as video:
            for frame in video.frames():
                display_size = video.orientation.size(frame.image.width, frame.image.height)
            count = video.decoded
        stored, shape = np.arange(0, count, STEP), map_shape(*display_size, GRID)

        def measure(backend: str, path: Path = path, stored: NDArray = stored, shape: tuple = shape) -> float:
            return cpu_seconds(
                lambda: measure_motion(path, None, None, stored, shape, Motion.model_validate({"backend": backend}))
            )

        work = {
            "decoding": partial(cpu_seconds, partial(decode, path)),
            "RGB": partial(cpu_seconds, partial(decode, path, True)),
        }
        work["decord"] = partial(cpu_seconds, partial(decode_with_decord, path))
        work |= {backend: partial(measure, backend) for backend in BACKENDS if _supports(measure, backend)}
        seconds = take_turns(work, rounds)
        rates = {name: [count / value for value in values] for name, values in seconds.items()}
        print(
            f"{path.name}, {count} frames: " + ", ".join(f"{n} {median(r):.0f} frames/s" for n, r in rates.items()),
            flush=True,
        )
        for backend in BACKENDS:
            for peer, description in (
                ("decoding", "decoding to YUV"),
                ("RGB", "decoding to RGB, PyAV"),
                ("decord", "decoding to RGB, decord"),
            ):
                if backend in rates:
                    against, aim = (
                        f"{description}: {median(rates[peer]):.0f} frames/s",
                        "0.8" if backend == "codec" else "",
                    )
                    rate = f"{median(rates[backend]):.0f} frames/s per core"
                    rows.append(
                        compare(f"motion, {backend}, {path.name}", rate, rates[backend], rates[peer], against, aim)
                    )
    return rows


def _supports(measure: Callable[[str], float], backend: str) -> bool:
    try:
        measure(backend)
    except VideoError as error:
        print(f"{backend}: {error}")
        return False
    return True


def decode(path: Path, rgb: bool = False) -> None:
    """Decode all frames with PyAV; with `rgb`, also convert them to RGB arrays."""
    with Video(path) as video:
        for frame in video.frames():
            if rgb:
                frame.image.to_ndarray(format="rgb24")


def decode_with_decord(path: Path) -> None:
    """Decode all frames to RGB arrays with decord."""
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    for _ in range(len(reader)):
        reader.next().asnumpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=3, help="generated clips per line of the errors")
    parser.add_argument("--frames", type=int, default=250, help="frames of the generated video for the speed")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed measurement")
    parser.add_argument("--video", type=Path, nargs="*", default=[], help="further videos for the speed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quality(arguments.clips, Path(folder))
        names = {"x264 defaults": "340x256 x264.mkv", "x264 bf0 refs1 g12": "340x256 x264 no B.mkv"}
        clip = make_clip(0, True, arguments.frames)
        for coding, name in names.items():
            encode(clip, CODINGS[coding], Path(folder) / name)
        report(speed([*(Path(folder) / name for name in names.values()), *arguments.video], arguments.rounds))


if __name__ == "__main__":
    main()
