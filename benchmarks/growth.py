"""Time and memory of each stage by the number of clips in a shard: 1, 4 and 16 times as many, each stage in its own process.

A stage scales well if its time is linear in the number of clips and its memory is constant. The fixed cost of a process
(imports, the model) is the same at all sizes, so the time at four times the clips is compared with the straight line through
the smallest and the largest run. A ratio above 1 means that time grows faster than the number of clips; quadratic growth
would give 3. Memory per clip is the difference between the largest and the smallest run, divided by the clips added. The
clips are generated, the models are the demo's.

    python -m benchmarks.growth
    python -m benchmarks.growth --clips 16 --stages frames similarity pretrain
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks._processes import Cost, run_measured
from benchmarks._table import Row, report

ROOT = Path(__file__).parents[1]
TIMES = (1, 4, 16)
STAGES = [
    "generate", "manifest", "split", "frames", "motion", "flow", "captions", "embeddings", "similarity", "text", "shards",
    "pretrain",
]  # fmt: skip
ASSETS = ROOT / "stm/assets"
CLIP = f"local-dir:{ASSETS / 'demo-clip'}"
RUN = {
    "model": "tiny",
    "image_size": 64,
    "frames": 8,
    "stride": 1,
    "mask": {"strategy": "text_top", "ratio": 0.6},
    "contrast": {"hidden": 64},
    "optimisation": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0},
    "augmentation": {"flip": False},
    "workers": 0,
}


def make_config(clips: int) -> dict[str, Any]:
    """A config with every stage and one shard of `clips` clips, with 16 stored frames each."""
    return {
        "name": "growth",
        "dataset": {"source": "moving-shapes", "clips": {"train": clips}, "frames": 32, "height": 96, "width": 96},
        "shard_size": 100_000,
        "grid": 6,
        "frames": {"every": 2, "short_side": 96},
        "captions": {"blip2": {"kind": "blip2", "model": str(ASSETS / "demo-blip2"), "max_new_tokens": 16}},
        "similarity": {"model": CLIP, "batch_size": 256, "keep_embeddings": True},
        "text": {"model": CLIP},
        "pack": {"captions": "blip2", "flow": True, "text": True},
        "pretrain": {"text": RUN},
    }


def measure(folder: Path, clips: int, stages: list[str]) -> dict[str, Cost]:
    """Run all stages up to the last requested one on `clips` clips; return their costs."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(make_config(clips)))
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    costs = {}
    for stage in STAGES[: 1 + max(map(STAGES.index, stages))]:
        command = [sys.executable, "-m", "stm.cli", stage, "--config", "config.yaml"]
        costs[stage] = run_measured(command, folder / "printed", folder, environment)
    return costs


def seconds_per_clip(clips: list[int], costs: list[Cost]) -> list[float]:
    """CPU time per additional clip between consecutive sizes."""
    steps = zip(costs, costs[1:], clips, clips[1:], strict=False)
    return [(after.cpu - before.cpu) / (many - few) for before, after, few, many in steps]


def make_rows(stage: str, clips: list[int], costs: list[Cost]) -> list[Row]:
    few, some, many = clips
    each = (costs[2].cpu - costs[0].cpu) / (many - few)
    line = costs[0].cpu + each * (some - few)
    time = f"measured at {some} clips: {costs[1].cpu:.1f} s; line from {few} to {many}: {line:.1f} s"
    least, most = costs[0].memory, costs[2].memory
    memory = f"{few} clips, {least:.0f} MB"
    return [
        Row(f"{stage}, CPU time", f"{1000 * each:.1f} ms per clip", line / costs[1].cpu, None, None, time, "1"),
        Row(f"{stage}, memory, {many} clips", f"{most:.0f} MB", most / least, None, None, memory, "1"),
    ]


def describe(stage: str, clips: list[int], costs: list[Cost]) -> str:
    """A line of the printed table."""
    slopes = seconds_per_clip(clips, costs)
    growth = (costs[-1].memory - costs[0].memory) / (clips[-1] - clips[0])
    ratio = costs[-1].memory / costs[0].memory
    return (
        f"{stage:11} | "
        + " ".join(f"{cost.wall:7.1f} {cost.cpu:7.1f} {cost.memory:6.0f} |" for cost in costs)
        + " ".join(f" {1000 * slope:7.1f}" for slope in slopes)
        + f" | {ratio:9.2f} {growth:9.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64, help="clips of the smallest run")
    parser.add_argument("--stages", nargs="*", default=STAGES, choices=STAGES, metavar="stage")
    arguments = parser.parse_args()
    clips = [arguments.clips * times for times in TIMES]
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(Path(folder) / str(count), count, arguments.stages) for count in clips]
    print(
        f"{'':11} | " + " ".join(f"{f'{count} clips':>22} |" for count in clips) + f" {'CPU ms per clip':>15} | memory"
    )
    head = " ".join(f"{'seconds':>7} {'CPU':>7} {'MB':>6} |" for _ in clips)
    between = " ".join(f"{f'to {times}x':>7}" for times in TIMES[1:])
    print(f"{'stage':11} | {head} {between} | {'16x to 1x':>9} {'MB/clip':>9}")
    rows = []
    for stage in arguments.stages:
        costs = [run[stage] for run in runs]
        print(describe(stage, clips, costs), flush=True)
        rows += make_rows(stage, clips, costs)
    report(rows)


if __name__ == "__main__":
    main()
