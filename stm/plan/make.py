"""The plan of a run: clips, shards, jobs, gigabytes, hours and, if the config specifies prices, the cost in money.

The report compares the plan with the run's actual usage.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from stm.config import Config
from stm.plan.clips import Clips, count_clips
from stm.plan.costs import CORE_FLOPS, GPU_FLOPS, Line, dataset_lines, training_stages
from stm.stages.costs import Workload
from stm.storage.files import write_json


@dataclass
class DatasetPlan:
    """The clips and shards of one dataset."""

    clips: dict[str, int]
    frames: float  # mean number of source frames per clip
    stored_frames: float  # mean per clip
    shards: int
    basis: str  # source of the counts


@dataclass
class Plan:
    """The estimated cost of a run."""

    name: str
    datasets: dict[str, DatasetPlan] = field(default_factory=dict)
    stages: list[Line] = field(default_factory=list)

    @property
    def jobs(self) -> int:
        return sum(stage.jobs for stage in self.stages)


def make_plan(config: Config) -> Plan:
    """Create the plan of a config; only the headers of videos are read."""
    plan = Plan(config.name)
    clips = {}
    for name in config.dataset_names:
        corpus = config.of(name)
        clips[name] = count_clips(corpus)
        load = _workload(corpus, clips[name])
        plan.datasets[name] = DatasetPlan(
            clips[name].per_split, round(load.frames, 1), round(load.stored_frames, 1), load.shards, clips[name].basis
        )
        plan.stages += dataset_lines(config, name, load)
    plan.stages += training_stages(config, clips)
    return plan


def _workload(config: Config, clips: Clips) -> Workload:
    # The frames stage stops decoding a clip after its last stored frame.
    frames = min(clips.frames, config.frames.max_frames * config.frames.every)
    short, long = sorted((clips.width, clips.height))
    return Workload(
        per_split=clips.per_split,
        shard_size=config.shard_size,
        frames=frames,
        stored_frames=max(1.0, frames / config.frames.every),
        pixels=clips.width * clips.height,
        stored_pixels=config.frames.short_side**2 * long / short,
        cells=config.grid * max(config.grid, round(config.grid * long / short)),
    )


def write_plan(plan: Plan, path: Path) -> None:
    """Write the plan as JSON, for the report to read."""
    write_json(path, {**asdict(plan), "jobs": plan.jobs})


def describe_plan(plan: Plan, config: Config | None = None) -> str:
    """Format the plan as a human-readable table, with the price if `config` specifies prices."""
    lines = []
    for name, dataset in plan.datasets.items():
        splits = ", ".join(f"{n} {split}" for split, n in dataset.clips.items())
        lines.append(
            f"{name}: {splits} clips ({dataset.basis}), {dataset.frames:g} frames each, {dataset.stored_frames:g} stored; "
            f"{dataset.shards} shards"
        )
    lines.append(f"{plan.jobs} jobs")
    lines.append(f"{'stage':44} {'jobs':>6} {'core hours':>11} {'or GPU hours':>13} {'+ loading':>10} {'GB':>9}")
    for s in plan.stages:
        gpu = f"{s.gpu_hours:.3f}" if s.gpu_hours else "-"
        loading = f"{s.loading_hours:.2f}" if s.loading_hours else "-"
        lines.append(f"{s.stage:44} {s.jobs:>6} {s.cpu_hours:>11.3f} {gpu:>13} {loading:>10} {s.gigabytes:>9.3f}")
    cores_alone = sum(s.cpu_hours for s in plan.stages)
    # If a GPU is used, the CPU cores only run the remaining stages and load clips for the GPU.
    cores = sum(s.cpu_hours for s in plan.stages if not s.gpu_hours) + sum(s.loading_hours for s in plan.stages)
    gpus = sum(s.gpu_hours for s in plan.stages)
    size = sum(s.gigabytes for s in plan.stages)
    lines.append(
        f"without a GPU: {cores_alone:.2f} core hours; with a GPU: {cores:.2f} core hours and {gpus:.2f} GPU hours; "
        f"{size:.2f} GB"
    )
    if config is not None and (config.prices.cpu_core_hour or config.prices.gpu_hour):
        price = cores * config.prices.cpu_core_hour + gpus * config.prices.gpu_hour
        lines.append(f"with GPUs, at the config's prices: {price:.2f}")
    lines.append(
        f"assumed: {GPU_FLOPS / 1e12:.0f} TFLOP/s per GPU, {CORE_FLOPS / 1e9:.0f} GFLOP/s per core; small models reach less"
    )
    return "\n".join(lines)
