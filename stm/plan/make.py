"""The plan of a run: clips, shards, jobs, gigabytes, hours and, if the config specifies prices, the cost in money.

The report compares the plan with the run's actual usage.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stm.config import Config, VisionLanguageCaptions
from stm.plan.clips import Clips, count_clips
from stm.plan.costs import Line, dataset_lines, training_lines
from stm.plan.hardware import CORE_FLOPS, Hardware
from stm.plan.schedule import estimate_hours
from stm.pretrained.sizes import frame_tokens, weights_and_basis
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
    hardware: Hardware
    datasets: dict[str, DatasetPlan] = field(default_factory=dict)
    stages: list[Line] = field(default_factory=list)
    hours: float = 0.0  # wall-clock on the hardware

    @property
    def jobs(self) -> int:
        return sum(stage.jobs for stage in self.stages)


def make_plan(config: Config) -> Plan:
    """Create the plan of a config; only the headers of videos are read."""
    hardware = Hardware.of(config)
    plan, clips = Plan(config.name, hardware), {}
    for name in config.dataset_names:
        corpus = config.of(name)
        clips[name] = count_clips(corpus)
        load = _workload(corpus, clips[name])
        plan.datasets[name] = DatasetPlan(
            clips[name].per_split, round(load.frames, 1), round(load.stored_frames, 1), load.shards, clips[name].basis
        )
        plan.stages += dataset_lines(config, name, load, hardware)
    plan.stages += training_lines(config, clips, hardware)
    plan.hours = estimate_hours(config, plan.stages, clips, hardware)
    return plan


def _workload(config: Config, clips: Clips) -> Workload:
    frames = config.frames.decoded_frames(clips.frames)
    short, long = sorted((clips.width, clips.height))
    return Workload(
        per_split=clips.per_split,
        shard_size=config.shard_size,
        frames=frames,
        stored_frames=config.frames.stored_frames(clips.frames),
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
    lines.append(_COLUMNS)
    lines += [_format_line(line) for line in plan.stages]
    lines += _sums(plan, config)
    return "\n".join(lines)


_COLUMNS = (
    f"{'stage':44} {'jobs':>6} {'core hours':>11} {'or GPU hours':>13} {'+ loading':>10} {'GB':>9} "
    f"{'GPUs':>5} {'wall-clock':>10} {'GB/GPU':>7}"
)


def _format_line(line: Line) -> str:
    gpu = f"{line.gpu_hours:.3f}" if line.gpu_hours else "-"
    loading = f"{line.loading_hours:.2f}" if line.loading_hours else "-"
    memory = f"{line.memory:.1f}" if line.memory else "-"
    return (
        f"{line.stage:44} {line.jobs:>6} {line.cpu_hours:>11.3f} {gpu:>13} {loading:>10} {line.gigabytes:>9.3f} "
        f"{line.gpus or '-':>5} {line.job_hours:>10.3f} {memory:>7}"
    )


def _assumed(config: Config | None) -> str:
    """Note which of the hardware is assumed because the config does not name it."""
    if config is None:
        return ""
    silent = [key for key in ("gpu", "gpus", "cores") if key not in config.prices.model_fields_set]
    return f" (assumed: the config does not name {', '.join(silent)})" if silent else ""


def _captioners(plan: Plan, config: Config | None) -> Iterator[str]:
    """Note from what the costs of vision-language models are estimated, which depends on models that may not be here yet."""
    sources: dict[str, tuple[VisionLanguageCaptions, float]] = {}
    captioned = {line.stage.rpartition("/")[2] for line in plan.stages if line.stage.startswith("captions/")}
    for corpus in [] if config is None else [config.of(name) for name in config.dataset_names]:
        for name, source in corpus.captions.items():
            if isinstance(source, VisionLanguageCaptions) and name in captioned:
                sources[name] = (source, corpus.frames.short_side**2 * 4 / 3)
    for name, (source, pixels) in sources.items():
        weights, basis = weights_and_basis(source.model)
        tokens = frame_tokens(source.model, pixels, source.input == "video")
        yield (
            f"captions of {name}: {weights / 1e9:.1f} billion weights ({basis}), about {tokens:.0f} tokens per 4:3 frame (by the "
            f"family of models, not measured), and up to {source.max_new_tokens} new tokens per caption"
        )


def _sums(plan: Plan, config: Config | None) -> list[str]:
    stages, hardware = plan.stages, plan.hardware
    cores_alone = sum(s.cpu_hours for s in stages)
    # If a GPU is used, the CPU cores only run the remaining stages and load clips for the GPU.
    cores = sum(s.cpu_hours for s in stages if not s.gpu_hours) + sum(s.loading_hours for s in stages)
    gpus, held = sum(s.gpu_hours for s in stages), sum(s.held_hours for s in stages)
    size = sum(s.gigabytes for s in stages)
    lines = [
        f"without a GPU: {cores_alone:.2f} core hours; with a GPU: {cores:.2f} core hours and {gpus:.2f} GPU hours; "
        f"{size:.2f} GB"
    ]
    if removed := sum(s.removed for s in stages):
        lines.append(
            f"disk: {size - removed:.2f} GB at the end, and little more before: the frames of each shard, together "
            f"{removed:.2f} GB, are removed once it is packed"
        )
    if gpus:
        number = "1 GPU" if hardware.gpus == 1 else f"{hardware.gpus} GPUs"
        lines.append(
            f"wall-clock: {plan.hours:.2f} hours ({plan.hours / 24:.1f} days) on {number} "
            f"({hardware.name}) and {hardware.cores} cores{_assumed(config)}; GPUs are held for {held:.2f} GPU hours: beside "
            "computing, they wait for the loader"
        )
    if config is not None and (config.prices.cpu_core_hour or config.prices.gpu_hour):
        price = cores * config.prices.cpu_core_hour + held * config.prices.gpu_hour
        lines.append(f"with GPUs, at the config's prices: {price:.2f}")
    lines.append(
        f"assumed: {hardware.share:.0%} of the {hardware.name}'s published peak, which is "
        f"{hardware.gpu_rate('bf16') / 1e12:.0f} TFLOP/s per GPU in 16 bits and {hardware.gpu_rate('float32') / 1e12:.0f} in "
        f"float32; {CORE_FLOPS / 1e9:.0f} GFLOP/s per core; small models reach less"
    )
    lines += _captioners(plan, config)
    lines.append(
        "wall-clock of a line: one of its jobs, in hours; GB/GPU: weights, optimiser and activations of a step"
    )
    return lines
