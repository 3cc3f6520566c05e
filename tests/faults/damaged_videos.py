"""Videos that are damaged, oddly named, or no videos at all."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from damage import Damage, damage_bytes
from synthetic_videos import X264, make_pan, make_video

KINDS = {
    "mp4": X264,
    "faststart.mp4": (*X264, "-movflags", "+faststart"),
    "mkv": X264,
    "avi": ("-c:v", "mpeg4"),
    "ts": X264,
    "webm": ("-c:v", "libvpx", "-deadline", "realtime"),
    "gif": (),
}
NAMES = (
    "new\nline.mp4", "-rf.mp4", "$(touch pwned).mp4", "; touch pwned;.mp4", "%s%n%x.mp4", "\x1b[2Jscreen.mp4", "a:b.mp4",
    "concat:a.mp4|b.mp4", "pipe:0.mp4", "\u202etxt.mp4", "'\"`.mp4", "a...mp4", " .mp4", "x" * 240 + ".mp4", "%03d.mp4",
    "<script>alert(1)</script>.mp4".replace("/", "\u2215"), "back\\slash.mp4", "*?[a].mp4", "NUL.mp4", "a&b=c#d.mp4",
)  # fmt: skip


def make_good(folder: Path) -> dict[str, bytes]:
    """The same 16 pictures in several containers, and as single pictures, by ending."""
    pan = make_pan(frames=16, width=64, height=48)
    videos = {kind: make_video(folder / f"video.{kind}", pan, options).read_bytes() for kind, options in KINDS.items()}
    pictures = {kind: cv2.imencode(f".{kind}", pan[0])[1].tobytes() for kind in ("jpg", "png", "webp")}
    return videos | pictures


def size_fields(data: bytes) -> Iterator[bytes]:
    """Absurd dimensions: wherever 64 or 48 stands as a number of two or four bytes, the largest number instead."""
    for size in (64, 48):
        for width, order in ((2, "big"), (4, "big"), (2, "little"), (4, "little")):
            mark, at = size.to_bytes(width, order), -1  # type: ignore[arg-type]
            while (at := data.find(mark, at + 1)) >= 0:
                yield data[:at] + b"\x7f" + b"\xff" * (width - 1) + data[at + width :]


def place_all(root: Path, good: dict[str, bytes], count: int) -> dict[str, str]:
    """Puts `count` damaged or oddly named files under `root`; what was done, by the path relative to it."""
    placed: dict[str, str] = {}
    root.mkdir()
    for name in NAMES[: count // 3]:
        (root / name).write_bytes(good["mp4"])
        placed[name] = "hostile name"
    streams = [damage_bytes(data, np.random.default_rng([number])) for number, data in enumerate(good.values())]
    sizes = [size_fields(data) for data in good.values()]
    number = 0
    while len(placed) < count:
        kind = number % len(good)
        ending = list(good)[kind]
        changed = next(sizes[kind], None) if number % 4 == 3 else None
        damage = next(streams[kind]) if changed is None else Damage("absurd dimensions", changed)
        name = f"bad{number:04d}.{ending}"
        (root / name).write_bytes(damage.data)
        placed[name], number = damage.kind, number + 1
    return placed


def place_traps(root: Path, outside: Path) -> dict[str, str]:
    """What is no file at all, or leads elsewhere."""
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "zeros.mp4").symlink_to("/dev/zero")
    (root / "outside.mp4").symlink_to(outside)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root)
        server.bind("socket.mp4")
        os.chdir(here)
    return dict.fromkeys(("pipe.mp4", "loop.mp4", "zeros.mp4", "outside.mp4", "socket.mp4"), "no file of the folder")
