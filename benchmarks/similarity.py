"""Speed of the similarity stage: patches per second from a tar of JPEGs to embeddings, as a ratio to the image tower alone.

The tower alone encodes one prepared batch of the same shape repeatedly, in the same process and in turns with the stage, so
the ratio shows the cost of reading, decoding, cropping, resizing and copying. The upper bound is 1.

    python -m benchmarks.similarity                                  # CLIP's ViT-B/32 with random weights
    python -m benchmarks.similarity --small                          # a sixteenth of the arithmetic
    python -m benchmarks.similarity --method dense                   # whole frames instead of patches
    python -m benchmarks.similarity --precision bfloat16 --batch-size 1024 --clips 32 --compile     # on a GPU
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import simplejpeg
import torch
from safetensors.torch import save_file

from benchmarks._table import Row, compare, cpu_seconds, report, wall_seconds
from stm.preprocess.similarity.dense_scorer import DenseScorer
from stm.preprocess.similarity.patch_scorer import PatchScorer, Piece, embed_clips
from stm.pretrained.clip import load_clip
from stm.shards.grid import map_shape
from stm.storage.tars import TarWriter

TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 64,
    "heads": 2,
    "layers": 1,
}  # captions are not encoded here
# The image tower of ViT-B/32, and one with a sixteenth of its arithmetic for quick runs.
BASE_CLIP: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "patch_size": 32},
    "text_cfg": TEXT,
    "quick_gelu": True,
}
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 256, "head_width": 64, "patch_size": 32},
    "text_cfg": TEXT,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as similarity.model in a config; default: ViT-B/32 with random weights")
    parser.add_argument("--small", action="store_true", help="use a small model with random weights")
    parser.add_argument("--compile", action="store_true", help="compile the tower, in both measurements")
    parser.add_argument(
        "--method", default="patches", choices=["patches", "dense"], help="as similarity.method in a config"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=64, help="patches (of frames, with dense) per forward pass")
    parser.add_argument("--clips", type=int, default=1, help="clips of 4 stored frames, 340 x 256 pixels")
    parser.add_argument("--grid", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(measure(Path(folder), arguments))


def measure(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Patches per second of the stage and of the tower alone, measured in turns."""
    name = arguments.model or save_clip(folder / "clip", SMALL_CLIP if arguments.small else BASE_CLIP)
    clip = load_clip(name, arguments.precision, arguments.device)
    method = DenseScorer if arguments.method == "dense" else PatchScorer
    scorer = method(clip, arguments.grid, arguments.batch_size, arguments.compile)
    rows = write_frames(folder / "frames.tar", arguments.clips)
    shapes = [map_shape(row["width"], row["height"], arguments.grid) for row in rows for _ in range(row["frames"])]
    batches = len(scorer.cut(shapes))
    batch = prepare_batch(scorer)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(batches):
            scorer.encode(batch)

    def stage() -> None:
        for _ in embed_clips(scorer, folder / "frames.tar", rows, set()):
            pass

    with torch.inference_mode():
        filled = len(scorer.encode(batch))  # patches per forward pass; this also warms up
    encoded, needed = batches * filled, int(np.prod(shapes, axis=1).sum())
    rates: dict[str, list[tuple[float, float]]] = {"tower": [], "stage": []}
    for _ in range(arguments.rounds):
        for kind, work, count in (("tower", bare, encoded), ("stage", stage, needed)):
            wall, cpu = seconds(work)
            rates[kind].append((count / wall, count / cpu))
    where = "GPU" if clip.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    prefix = "" if arguments.method == "patches" else f"{arguments.method}, "
    geometry = f"{prefix}{arguments.precision}, batch {arguments.batch_size}{', compiled' if arguments.compile else ''}"
    print(f"{clip.identity['model']}, {geometry}, {needed} patches, {where}")
    table = []
    for number, clock in enumerate(("wall-clock", "CPU time")):
        tower, ours = ([pair[number] for pair in rates[kind]] for kind in ("tower", "stage"))
        against = f"image tower alone: {median(tower):.1f} patches/s"
        what = f"similarity, {geometry}, {clock}"
        table.append(compare(what, f"{median(ours):.1f} patches/s", ours, tower, against, "0.95"))
    # CPU time does not include the GPU's work; wall-clock time on a shared CPU depends on other load.
    return table[:1] if clip.device.type == "cuda" else table


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock seconds, and CPU seconds of all threads."""
    wall: list[float] = []
    cpu = cpu_seconds(lambda: wall.append(wall_seconds(work)))
    return wall[0], cpu


def prepare_batch(scorer: PatchScorer) -> torch.Tensor:
    """A batch of noise with the shape that the stage passes to the tower."""
    frame = np.random.default_rng(0).integers(0, 256, (256, 340, 3), dtype=np.uint8)
    rows, columns = map_shape(340, 256, scorer.grid)
    count = min(scorer.batch_size, rows * columns)
    with torch.inference_mode():
        return scorer.prepare([Piece(frame, 0, count)])


def write_frames(tar: Path, clips: int) -> list[dict[str, Any]]:
    """Write a tar of textured JPEGs; return the rows of its index."""
    rng = np.random.default_rng(0)
    rows = []
    with TarWriter(tar) as writer:
        for number in range(clips):
            members = []
            sums = []
            for frame in range(4):
                coarse = rng.integers(0, 256, (32, 34, 3), dtype=np.uint8).repeat(8, 0).repeat(10, 1)
                jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(coarse), quality=90)
                sums.append(hashlib.sha256(jpeg).hexdigest())
                members.append(writer.add(f"clip{number:05d}.{frame:04d}.jpg", jpeg))
            row = {
                "key": f"clip{number:05d}",
                "video_id": f"clip{number:05d}",
                "frames": 4,
                "width": 340,
                "height": 256,
            }
            rows.append(
                row | {"offsets": [m.offset for m in members], "sizes": [m.size for m in members], "sha256": sums}
            )
    return rows


def save_clip(folder: Path, config: dict[str, Any]) -> str:
    """Save a CLIP with random weights; return its name for a config."""
    torch.manual_seed(0)
    folder.mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


if __name__ == "__main__":
    main()
