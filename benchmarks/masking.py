"""Cost of each masking strategy, including the complement, as a share of the ViT-B training step in which it is used.

    python -m benchmarks.masking                       # CPU: a step of 2 clips, times 16; some minutes on two cores
    python -m benchmarks.masking --step-batch 32 --precision bf16 --json FILE

Geometry: 16 frames of 224 x 224, 8 slots of 196 tokens, 90 % hidden, 32 clips; flow with 2 x 2 values per token, as packed
by default. The step is VideoMAE's: forward, backward, AdamW. If it is measured with fewer clips, it is scaled by their
number, which overestimates the step, because its fixed cost, the optimiser, is counted several times; by a few per cent at
most. Everything is measured in turns, and shares are medians over rounds. The teacher's forward pass is not part of the mask
of `attention` and has a row of its own; it is measured with as many clips as the step.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks._table import Row, compare, report
from benchmarks.training_step import make_batch, make_ours, measure
from stm.config import Mask, PretrainRun
from stm.masking import complement, get_strategy, strategy_names
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.teachers.open_clip import make_tower

SLOTS, SIDE, TUBELET, RATIO, TARGET = 8, 14, 2, 0.9, 0.02
WIDTH = 768
TEACHER: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "width": WIDTH,
    "layers": 12,
    "heads": 12,
    "mlp_ratio": 4.0,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="clips per mask")
    parser.add_argument("--step-batch", type=int, default=2, help="clips per measured step and teacher pass")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"], help="of step and teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    return parser.parse_args()


def make_guides(batch: int, device: str) -> dict[str, Tensor]:
    """Random guides. The flow has moderate speed, because speed determines how scattered a warp's memory accesses are."""
    generator, tokens = torch.Generator().manual_seed(0), SIDE * SIDE
    names = ("noise", "similarity", "motion", "motion_compensated", "attention", "spatiotemporal")
    guides = {name: torch.rand(batch, SLOTS, tokens, generator=generator) for name in names}
    guides["features"] = normalize(torch.randn(batch, SLOTS, tokens, WIDTH, generator=generator), dim=-1)
    guides["flow"] = 0.3 * torch.randn(batch, 2, SLOTS * TUBELET, 2 * SIDE, 2 * SIDE, 2, generator=generator)
    return {name: guide.to(device) for name, guide in guides.items()}


def make_mask(name: str, guides: dict[str, Tensor]) -> Callable[[], Tensor]:
    strategy = get_strategy(name)
    return lambda: complement(strategy(guides, RATIO), SLOTS * SIDE * SIDE)


def make_teacher(batch: dict[str, Any], device: str, precision: str) -> Callable[[], Tensor]:
    """The forward pass of UMT's teacher for ViT-B: CLIP's ViT-B/16, here with random weights."""
    teacher = FrameTeacher(make_tower(VisionTransformer(**TEACHER)), SIDE, layers=0).to(device)

    def attend() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return teacher.attend(batch["video"], TUBELET)

    return attend


def measure_all(a: argparse.Namespace, device: str) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of the step, and of each mask and the teacher, for `a.batch` clips, by round."""
    run = PretrainRun(model="base", mask=Mask(strategy="tube", ratio=RATIO), precision=a.precision)
    batch = make_batch(run, a.step_batch, device)
    guides = make_guides(a.batch, device)
    scale = a.batch / a.step_batch
    step = make_ours(run, batch, device)[1]
    attend = make_teacher(batch, device, a.precision)
    masks = {name: make_mask(name, guides) for name in strategy_names()}
    steps: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in [*masks, "teacher"]}
    for turn in range(a.rounds + 1):
        times = {name: measure(mask) for name, mask in masks.items()}
        times["teacher"] = measure(attend) * scale
        step_time = measure(step) * scale
        if turn > 0:  # the first round warms up
            steps.append(step_time)
            for name, time in times.items():
                seconds[name].append(time)
    return steps, seconds


def make_row(name: str, seconds: list[float], steps: list[float], batch: int) -> Row:
    """The row of a mask; its ratio is the share of a step."""
    what = f"the teacher of `attention`, {batch} clips" if name == "teacher" else f"mask {name}, {batch} clips"
    aim = "" if name == "teacher" else f"under {TARGET:g}"
    against = f"ViT-B step, {statistics.median(steps):.1f} s"
    return compare(what, f"{1000 * statistics.median(seconds):.1f} ms", seconds, steps, against, aim)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = parse_arguments()
    steps, seconds = measure_all(a, device)
    step = statistics.median(steps)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"base, 16x224^2, ratio {RATIO:g}, batch {a.batch}, {a.precision}, {where}, {a.rounds} rounds")
    scaled = "" if a.step_batch == a.batch else f", measured with {a.step_batch} clips and scaled"
    print(f"training step: {step:.2f} s{scaled}\n\n{'':24}{'ms':>10}{'of a step':>12}{'min':>9}{'max':>9}")
    rows = {name: make_row(name, times, steps, a.batch) for name, times in seconds.items()}
    for name, row in rows.items():
        label = "(teacher, ViT-B/16)" if name == "teacher" else name
        milliseconds = 1000 * statistics.median(seconds[name])
        print(f"{label:24}{milliseconds:10.1f}{row.ratio:12.3%}{row.low:9.3%}{row.high:9.3%}")
    worst = max(row.ratio for name, row in rows.items() if name != "teacher" and row.ratio is not None)
    print(f"\nthe most expensive mask: {worst:.2%} of a step; target: under {TARGET:.0%}")
    report(list(rows.values()))
    if a.json:
        measurements = {"device": where, "batch": a.batch, "step_batch": a.step_batch, "precision": a.precision}
        measurements |= {"step_seconds": steps, "mask_seconds": seconds, "worst_share": worst}
        a.json.write_text(json.dumps(measurements, indent=1) + "\n")


if __name__ == "__main__":
    main()
