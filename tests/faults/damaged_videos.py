"""Videos that are damaged or have unusual names, and files that are not videos."""

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
    """The same 16 frames as videos in several containers, and the first one as images, by file extension."""
    pan = make_pan(frames=16, width=64, height=48)
    videos = {kind: make_video(folder / f"video.{kind}", pan, options).read_bytes() for kind, options in KINDS.items()}
    images = {kind: cv2.imencode(f".{kind}", pan[0])[1].tobytes() for kind in ("jpg", "png", "webp")}
    return videos | images


def size_fields(data: bytes) -> Iterator[bytes]:
    """Copies with absurd dimensions: each replaces one number 64 or 48 of two or four bytes by the largest number."""
    for size in (64, 48):
        for width, order in ((2, "big"), (4, "big"), (2, "little"), (4, "little")):
            pattern = size.to_bytes(width, order)  # type: ignore[arg-type]
            at = -1
            while (at := data.find(pattern, at + 1)) >= 0:
                yield data[:at] + b"\x7f" + b"\xff" * (width - 1) + data[at + width :]


def place_all(root: Path, good: dict[str, bytes], count: int) -> dict[str, str]:
    """Write `count` files that are damaged or have unusual names below `root`; return the damage by relative path."""
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
        extension = list(good)[kind]
        changed = next(sizes[kind], None) if number % 4 == 3 else None
        damage = next(streams[kind]) if changed is None else Damage("absurd dimensions", changed)
        name = f"bad{number:04d}.{extension}"
        (root / name).write_bytes(damage.data)
        placed[name] = damage.kind
        number += 1
    return placed


def place_traps(root: Path, outside: Path) -> dict[str, str]:
    """Create entries that are not regular files, or links that lead elsewhere; return the kind by name."""
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "zeros.mp4").symlink_to("/dev/zero")
    (root / "outside.mp4").symlink_to(outside)
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket may have no more than about a hundred bytes, so it has to be relative.
        here = Path.cwd()
        os.chdir(root)
        server.bind("socket.mp4")
        os.chdir(here)
    return dict.fromkeys(("pipe.mp4", "loop.mp4", "zeros.mp4", "outside.mp4", "socket.mp4"), "not a file of the folder")
