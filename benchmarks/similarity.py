"""Speed of the similarity stage: patches a second from a tar of JPEGs to embeddings, as a ratio to the bare image tower.

The bare tower encodes one prepared batch of the same shape over and over, in the same process and in turns with the
stage, so the ratio says what reading, decoding, cutting, resizing and fetching cost. 1 is the most there can be.

    python benchmarks/similarity.py                                  # a small random CLIP, on the CPU
    python benchmarks/similarity.py --model ViT-B-32-quickgelu@openai --precision bfloat16 --batch-size 1024 --clips 32
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import simplejpeg
import torch
from safetensors.torch import save_file

from stm.files import TarWriter
from stm.preprocess.clip_model import load_clip
from stm.preprocess.embed_clips import embed_clips
from stm.preprocess.grid import map_shape
from stm.preprocess.patch_scorer import PatchScorer, Piece

# A sixteenth of ViT-B/32's arithmetic: small enough for two cores, large enough that the tower is most of the work.
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 256, "head_width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as similarity.model of a config; by default a small random one is made")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=64, help="patches a forward pass")
    parser.add_argument("--clips", type=int, default=2, help="clips of 4 stored frames, 340 x 256 pixels")
    parser.add_argument("--grid", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments), indent=2))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Patches a second of both, the median of the rounds, and the ratio of each round."""
    name = arguments.model or save_small_clip(folder / "clip")
    clip = load_clip(name, arguments.precision, arguments.device)
    scorer = PatchScorer(clip, arguments.grid, arguments.batch_size)
    rows = write_frames(folder / "frames.tar", arguments.clips)
    cells = sum(row["frames"] * np.prod(map_shape(row["width"], row["height"], arguments.grid)) for row in rows)
    batches = -(-int(cells) // arguments.batch_size)
    batch = prepare_batch(scorer)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(batches):
            scorer.encode(batch)
        if clip.device.type == "cuda":
            torch.cuda.synchronize()

    def stage() -> None:
        for _ in embed_clips(scorer, folder / "frames.tar", rows, set()):
            pass

    bare()  # warms up both
    times = [(*seconds(bare), *seconds(stage)) for _ in range(arguments.rounds)]
    done, needed = batches * arguments.batch_size, int(cells)
    return {
        "model": clip.identity["model"],
        "device": torch.cuda.get_device_name() if clip.device.type == "cuda" else "cpu",
        "precision": arguments.precision,
        "batch_size": arguments.batch_size,
        "patches": needed,
        "tower_patches_per_second": round(done / median(wall for wall, *_ in times), 1),
        "stage_patches_per_second": round(needed / median(wall for *_, wall, _ in times), 1),
        "stage_over_tower": [round((needed / stage) / (done / tower), 3) for tower, _, stage, _ in times],
        # The one to read on a shared machine without a GPU, where wall-clock time is anybody's.
        "stage_over_tower_by_cpu_time": [round((needed / stage) / (done / tower), 3) for _, tower, _, stage in times],
    }


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and CPU seconds, the latter over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def prepare_batch(scorer: PatchScorer) -> torch.Tensor:
    """One batch of noise, of the shape that the stage gives the tower."""
    frame = np.random.default_rng(0).integers(0, 256, (256, 340, 3), dtype=np.uint8)
    rows, columns = map_shape(340, 256, scorer.grid)
    count = min(scorer.batch_size, rows * columns)
    with torch.inference_mode():
        return scorer.prepare([Piece(frame, 0, count)])


def write_frames(tar: Path, clips: int) -> list[dict[str, Any]]:
    """A tar of JPEGs with some texture; returns what the index would say."""
    rng = np.random.default_rng(0)
    rows = []
    with TarWriter(tar) as writer:
        for number in range(clips):
            members = []
            for frame in range(4):
                coarse = rng.integers(0, 256, (32, 34, 3), dtype=np.uint8).repeat(8, 0).repeat(10, 1)
                jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(coarse), quality=90)
                members.append(writer.add(f"clip{number:05d}.{frame:04d}.jpg", jpeg))
            row = {
                "key": f"clip{number:05d}",
                "video_id": f"clip{number:05d}",
                "frames": 4,
                "width": 340,
                "height": 256,
            }
            rows.append(row | {"offsets": [m.offset for m in members], "sizes": [m.size for m in members]})
    return rows


def save_small_clip(folder: Path) -> str:
    torch.manual_seed(0)
    folder.mkdir()
    save_file(open_clip.CLIP(**SMALL_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


if __name__ == "__main__":
    main()
