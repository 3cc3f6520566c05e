"""How fast and how right the motion backends are: `python benchmarks/motion.py [--clips 3] [--video FILE ...]`.

Right: clips are made whose motion is known at every pixel (a textured square that bounces over a textured
background, fixed or moving camera, noise), coded in several ways, and measured. The end-point error is the mean
distance between measured and true motion of a cell, in cells per step of 4 frames; beside it stands the error of
saying that nothing moves. Area: how well the magnitude tells the cells of the object from the others (area under the
ROC curve; 0.5 is chance), after the median has been taken off, so that a moving camera does not hide the object.

Fast: frames a second of CPU time of one core for each backend and for decoding alone, in the same run. Ratios are
what to compare; the machine may be shared.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from stm.config import Motion
from stm.preprocess.container import VideoError
from stm.preprocess.grid import map_shape
from stm.preprocess.motion import measure_motion
from stm.preprocess.video import Video

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


def make_clip(seed: int, moving_camera: bool) -> Clip:
    """A clip with known motion. Speeds are up to 8 pixels a frame each way for the object, 3 for the camera."""
    random = np.random.default_rng(seed)
    world, thing = _texture(random, HEIGHT + 400, WIDTH + 400), _texture(random, SIDE, SIDE)
    room = np.array([WIDTH - SIDE, HEIGHT - SIDE])
    places = _bounce(random.uniform(0, 1, 2) * room, random.uniform(-8, 8, 2), room)
    speed = random.uniform(-3, 3, 2) if moving_camera else np.zeros(2)
    camera = 200 + np.arange(FRAMES)[:, None] * speed
    clip = Clip(
        np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8),
        np.zeros((FRAMES, HEIGHT, WIDTH, 2), np.float32),
        np.zeros((FRAMES, HEIGHT, WIDTH), bool),
    )
    for number in range(FRAMES):
        mask = _shift(np.ones((SIDE, SIDE), np.float32), places[number])[..., None]
        picture = _shift(world, -camera[number]) * (1 - mask) + _shift(thing, places[number]) * mask
        clip.frames[number] = np.clip(picture + random.normal(0, 1.5, picture.shape), 0, 255)
        clip.object[number] = mask[..., 0] > 0.5
        if number:
            clip.flow[number] = camera[number - 1] - camera[number]
            clip.flow[number][clip.object[number]] = places[number] - places[number - 1]
    return clip


def _texture(random: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    picture = np.zeros((height, width, 3), np.float32)
    for size, share in ((3, 0.25), (10, 0.35), (40, 0.4)):
        coarse = random.integers(0, 256, (height // size + 2, width // size + 2, 3)).astype(np.float32)
        picture += share * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture, 0, 255)


def _bounce(place: NDArray, speed: NDArray, room: NDArray) -> NDArray[np.float64]:
    places = [place]
    for _ in range(FRAMES - 1):
        after = places[-1] + speed
        speed = np.where((after < 0) | (after > room), -speed, speed)
        places.append(places[-1] + speed)
    return np.array(places)


def _shift(picture: NDArray[np.float32], by: NDArray) -> NDArray[np.float32]:
    matrix = np.float32([[1, 0, by[0]], [0, 1, by[1]]])
    return cv2.warpAffine(picture, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)


def encode(clip: Clip, coding: Sequence[str], path: Path) -> None:
    program = imageio_ffmpeg.get_ffmpeg_exe()
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "25", "-i", "-"]
    command = [program, "-y", "-v", "error", *raw, *coding, "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=clip.frames.tobytes(), check=True)


def true_steps(clip: Clip, shape: tuple[int, int]) -> tuple[NDArray, NDArray]:
    """True motion in cells per step [T, rows, columns, 2], and the cells that the object mostly covers."""
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
    """Chance that a cell of the object has a higher score than another one."""
    order = np.argsort(np.argsort(score))
    inside = order[truth]
    return float((inside.mean() - (len(inside) - 1) / 2) / (~truth).sum())


def quality(clips: int, folder: Path) -> None:
    shape = map_shape(WIDTH, HEIGHT, GRID)
    stored = np.arange(0, FRAMES, STEP)
    print(f"{'coding':20} {'camera':7} {'still':>6} | " + " | ".join(f"{b:>9} error  area" for b in BACKENDS))
    for camera in ("fixed", "moving"):
        made = [make_clip(seed, camera == "moving") for seed in range(clips)]
        truths = [true_steps(clip, shape) for clip in made]
        still = np.mean([np.linalg.norm(steps, axis=-1).mean() for steps, _ in truths])
        for name, coding in CODINGS.items():
            paths = [folder / f"{seed}.mkv" for seed in range(clips)]
            for clip, path in zip(made, paths, strict=True):
                encode(clip, coding, path)
            cells = [_score(paths, truths, stored, shape, backend) for backend in BACKENDS]
            print(f"{name:20} {camera:7} {still:6.2f} | " + " | ".join(cells), flush=True)


def _score(paths: list[Path], truths: list, stored: NDArray, shape: tuple[int, int], backend: str) -> str:
    errors, areas = [], []
    for path, (steps, inside) in zip(paths, truths, strict=True):
        try:
            found = measure_motion(path, None, None, stored, shape, Motion(backend=backend)).vector[1:].astype(float)
        except VideoError as error:
            return f"{str(error.status)[:21]:>21}"
        errors.append(np.linalg.norm(found - steps, axis=-1).mean())
        rest = np.linalg.norm(found - np.median(found, axis=(1, 2), keepdims=True), axis=-1)
        areas.append(area_under_curve(rest.ravel(), inside.ravel()))
    return f"{'':9} {np.mean(errors):5.2f} {np.mean(areas):5.3f}"


def speed(videos: Sequence[Path]) -> None:
    print(
        f"\n{'video':28} {'frames':>6} {'decoding f/s':>12} "
        + " ".join(f"{b:>10}" for b in BACKENDS)
        + "   (share of decoding's speed)"
    )
    for path in videos:
        begin = time.process_time()
        with Video(path) as video:
            for frame in video.frames():
                shown = video.orientation.size(frame.picture.width, frame.picture.height)
            count = video.decoded
        alone = count / (time.process_time() - begin)
        stored, shape = np.arange(0, count, STEP), map_shape(*shown, GRID)
        rates = []
        for backend in BACKENDS:
            begin = time.process_time()
            try:
                measure_motion(path, None, None, stored, shape, Motion(backend=backend))
                rate = stored[-1] / (time.process_time() - begin)
                rates.append(f"{rate:5.0f} {rate / alone:4.2f}")
            except VideoError:
                rates.append(f"{'-':>10}")
        print(f"{path.name:28.28} {count:6d} {alone:12.0f} " + " ".join(rates), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=3, help="made clips for each line")
    parser.add_argument("--video", type=Path, nargs="*", default=[], help="videos whose speed is measured, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quality(arguments.clips, Path(folder))
        made = Path(folder) / "made 340x256 x264.mkv"
        encode(make_clip(0, True), CODINGS["x264 defaults"], made)
        speed([made, *arguments.video])


if __name__ == "__main__":
    main()
