"""What a run will cost, before it runs: clips, shards, jobs, gigabytes, hours and, with prices, money.

Rates are measured ones, named with their source; what was not measured says "assumed". The report sets the plan beside
what was used.
"""

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stm.config import (
    Blip2Captions,
    Config,
    FineTune,
    FolderDataset,
    LanguageModelCaptions,
    MovingShapesDataset,
    PretrainRun,
)
from stm.datasets.annotations import Clip
from stm.files import local_model_files, write_json
from stm.layout import Layout

# Measured on one core of an AMD EPYC (AVX-512): decode, resize and JPEG took 1.31 ms a frame at 340x256 and 5.18 ms
# at 1280x720; the line through both.
DECODE_SECONDS, DECODE_SECONDS_PER_PIXEL = 9.1e-4, 4.64e-9
# Same machine: `mestimate` 1103 and 255 frames/s, decoding included.
MOTION_SECONDS, MOTION_SECONDS_PER_PIXEL = 5.9e-4, 3.62e-9
# Same machine: torch float32, ViT-B/32 images at 11/s a core and a ViT-B training step: 90 GFLOP/s. Small models
# reach less.
CORE_FLOPS = 90e9
# Assumed: 40 % of the 790 TFLOP/s that bf16 matrix products reach on an H200.
GPU_FLOPS = 316e12
# JPEG of quality 90, bytes a pixel. Measured on generated clips; real pictures take 0.1 to 0.3.
JPEG_BYTES_PER_PIXEL = 0.25
# A Python process that imports torch and loads a model; measured.
JOB_SECONDS = 5.0
# BLIP-2 with OPT-2.7b, from its sizes: image tower 1.0e9 weights x 257 tokens, language model 2.7e9 x 62 tokens.
HUB_CAPTION_FLOPS = 2 * (1.0e9 * 257 + 2.7e9 * 62)


@dataclass
class Stage:
    """One line of the plan."""

    stage: str
    jobs: int
    cpu_hours: float  # core hours, when it runs without a GPU
    gpu_hours: float = 0.0  # with one, instead of the core hours; 0 for stages that use none
    gigabytes: float = 0.0  # written


@dataclass
class Plan:
    """What a run will cost."""

    name: str
    clips: dict[str, int]
    frames: float  # source frames a clip, mean
    stored_frames: float  # a clip, mean
    shards: int
    stages: list[Stage] = field(default_factory=list)
    basis: str = ""  # where the counts come from

    @property
    def jobs(self) -> int:
        return sum(stage.jobs for stage in self.stages)


@dataclass(frozen=True)
class Clips:
    """Counts that the plan starts from."""

    per_split: dict[str, int]
    frames: float
    width: float
    height: float
    basis: str

    @property
    def total(self) -> int:
        return sum(self.per_split.values())


def count_clips(config: Config) -> Clips:
    """Clips per split and their mean size: from the manifest if there is one, else from the config or a sample of files."""
    manifest = Layout.of(config).manifest
    if manifest.exists():
        return _from_manifest(manifest)
    if isinstance(config.dataset, MovingShapesDataset):
        data = config.dataset
        return Clips(dict(data.clips), data.frames, data.width, data.height, "the config")
    return _from_folder(config.dataset, config.seed)


def _from_manifest(path: Path) -> Clips:
    from stm.manifest import read_rows

    rows = read_rows(path)
    splits: dict[str, int] = {}
    for row in rows:
        splits[row["split"]] = splits.get(row["split"], 0) + 1
    frames = [_frames_of(row) for row in rows]
    return Clips(
        splits,
        _mean(frames, 250),
        _mean([r["width"] for r in rows], 340),
        _mean([r["height"] for r in rows], 256),
        "the manifest",
    )


def _frames_of(row: dict[str, Any]) -> float | None:
    if row["start"] is not None and row["end"] is not None and row["fps"]:
        return float((row["end"] - row["start"]) * row["fps"])
    return row["frames"] or (row["duration"] * row["fps"] if row["duration"] and row["fps"] else None)


def _mean(values: list[Any], default: float) -> float:
    known = [float(v) for v in values if v]
    return sum(known) / len(known) if known else default


def _from_folder(dataset: FolderDataset, seed: int, sample: int = 32) -> Clips:
    """The headers of a few files stand for all of them."""
    from stm.datasets.folder import list_clips
    from stm.preprocess.container import VideoError

    root, annotations = Path(dataset.root), None if dataset.annotations is None else Path(dataset.annotations)
    clips = [named.clip for named in list_clips(root, annotations, dataset.extensions, dataset.split)[0]]
    sizes = []
    for clip in random.Random(seed).sample(clips, min(sample, len(clips))):
        try:
            sizes.append(_read_header(root, clip))
        except (VideoError, OSError):
            continue  # the manifest will name it; the plan only needs an average
    frames, widths, heights = zip(*sizes, strict=True) if sizes else ((), (), ())
    basis = f"{len(clips)} clips, the headers of {len(sizes)} of their files"
    return Clips(
        dict(Counter(clip.split for clip in clips)),
        _mean(list(frames), 250),
        _mean(list(widths), 340),
        _mean(list(heights), 256),
        basis,
    )


def _read_header(root: Path, clip: Clip) -> tuple[float, int, int]:
    """A clip's frames, width and height, as its file's container states them."""
    from stm.preprocess.container import choose_stream, open_container

    with open_container(root / clip.path) as container:
        video = choose_stream(container)
        rate, seconds = float(video.average_rate or 25), (container.duration or 0) / 1e6
        frames = video.frames or seconds * rate
        if clip.start is not None or clip.end is not None:
            frames = max(0.0, (clip.end or seconds) - (clip.start or 0.0)) * rate
        return frames, video.codec_context.width, video.codec_context.height


def make_plan(config: Config) -> Plan:
    """Works out the plan of a config; reads no more than headers."""
    clips = count_clips(config)
    shards = _count_shards(clips.per_split, config.shard_size)
    window = config.frames.max_frames * config.frames.every
    frames = min(clips.frames, window)
    stored = max(1.0, frames / config.frames.every)
    plan = Plan(config.name, clips.per_split, round(frames, 1), round(stored, 1), shards, basis=clips.basis)
    short, long = sorted((clips.width, clips.height))
    cells = config.grid * max(config.grid, round(config.grid * long / short))
    plan.stages = [
        *_reading(config, clips, shards, frames, stored, long / short),
        *_scoring(config, clips, shards, stored, cells),
        *_training(config, clips),
    ]
    return plan


def _reading(config: Config, clips: Clips, shards: int, frames: float, stored: float, aspect: float) -> list[Stage]:
    """The stages that touch the videos, and packing."""
    pixels = clips.width * clips.height
    stored_pixels = config.frames.short_side**2 * aspect
    gigabytes = clips.total * stored * stored_pixels * JPEG_BYTES_PER_PIXEL / 1e9
    decode = clips.total * frames * (DECODE_SECONDS + DECODE_SECONDS_PER_PIXEL * pixels) / 3600
    motion = clips.total * frames * (MOTION_SECONDS + MOTION_SECONDS_PER_PIXEL * pixels) / 3600
    cells = config.grid**2 * aspect
    stages = [
        Stage("manifest", 1, clips.total * 0.02 / 3600),
        Stage("split", 1, 0.0),
        Stage("frames", shards, decode, gigabytes=gigabytes),
        Stage("shards", shards, clips.total * 0.01 / 3600, gigabytes=gigabytes),
    ]
    if isinstance(config.dataset, MovingShapesDataset):
        stages.insert(
            0, Stage("generate", 1, clips.total * frames * 4e-8 * pixels / 3600, gigabytes=clips.total * 5e-5)
        )
    if config.pack.motion or config.mask_quality is not None:
        stages.append(Stage("motion", shards, motion, gigabytes=clips.total * stored * cells * 7 / 1e9))
    return stages


def _scoring(config: Config, clips: Clips, shards: int, stored: float, cells: int) -> list[Stage]:
    """Captions and similarity."""
    stages = []
    patches = clips.total * stored * cells
    tower = patches * clip_image_flops(config.similarity.model)
    captions_of = {}
    for name, source in config.captions.items():
        flops = 0.0
        if isinstance(source, Blip2Captions):
            captions_of[name] = source.key_frames
            flops = clips.total * source.key_frames * _caption_flops(source.model)
        elif isinstance(source, LanguageModelCaptions):
            captions_of[name] = len(source.prompts)
            flops = clips.total * len(source.prompts) * 2 * _weights(source.model) * source.max_new_tokens
        else:
            captions_of[name] = len(getattr(source, "templates", [1]))
        stages.append(_computing(f"captions/{name}", shards, flops))
    scored = _scored_clips(config, clips)
    if scored and config.similarity.keep_embeddings:
        width = _clip_config(config.similarity.model).get("embed_dim", 512)
        stages.append(_computing("embeddings", shards, tower, gigabytes=patches * 2 * width / 1e9))
    for name, (count, jobs) in scored.items():
        flops = 0.0 if config.similarity.keep_embeddings else tower * count / clips.total
        size = count * captions_of[name] * stored * cells * 2 / 1e9
        stages.append(_computing(f"similarity/{name}", jobs, flops, gigabytes=size))
    return stages


def _scored_clips(config: Config, clips: Clips) -> dict[str, tuple[int, int]]:
    """Clips and jobs of each caption source's similarity: all for the packed one, else those that masks are measured on."""
    found = {}
    if config.mask_quality is not None:
        measured = {config.mask_quality.split: clips.per_split.get(config.mask_quality.split, 0)}
        found = dict.fromkeys(config.captions, (sum(measured.values()), _count_shards(measured, config.shard_size)))
    if config.pack.captions and config.pack.similarity:
        found[config.pack.captions] = (clips.total, _count_shards(clips.per_split, config.shard_size))
    return found


def _count_shards(per_split: dict[str, int], shard_size: int) -> int:
    return sum(-(-count // shard_size) for count in per_split.values())


def _computing(stage: str, jobs: int, flops: float, gigabytes: float = 0.0) -> Stage:
    """A stage that runs a network: on cores, or on a GPU instead."""
    start = jobs * JOB_SECONDS
    return Stage(
        stage,
        jobs,
        (flops / CORE_FLOPS + start) / 3600,
        (flops / GPU_FLOPS + start) / 3600 if flops else 0.0,
        gigabytes,
    )


def _training(config: Config, clips: Clips) -> list[Stage]:
    """Pretraining and evaluation, by the formulas of stm.models.cost."""
    from stm.models.cost import encoding_cost
    from stm.models.zoo import describe

    stages = []
    train = clips.per_split.get("train", clips.total)
    for name, run in config.pretrain.items():
        flops = _step_flops(run) * train * run.optimisation.epochs * run.repeats
        stages.append(_computing(f"pretrain/{name}", 1, flops))
    for name, task in config.evaluate.items():
        train, test = clips.per_split.get(task.train_split, 0), clips.per_split.get(task.test_split, 0) * task.views
        passes = 3 * task.optimisation.epochs if isinstance(task, FineTune) else 1
        for run_name, run in config.pretrain.items():
            flops = encoding_cost(describe(run)) * (train * passes + test)
            stages.append(_computing(f"evaluate/{run_name}/{name}", 1, flops))
    return stages


def _step_flops(run: PretrainRun) -> int:
    """FLOPs of a clip's forward and backward pass."""
    from stm.models.cost import pretraining_cost
    from stm.models.zoo import describe

    architecture = describe(run)
    slots = run.frames // run.tubelet
    per_slot = architecture.tokens // slots
    masked = slots * int(run.mask.ratio * per_slot)
    return pretraining_cost(architecture, architecture.tokens - masked, round(masked * run.decode_ratio)).step


def clip_image_flops(model: str) -> float:
    """FLOPs (multiply and add counted apart) of one image through a CLIP image tower: blocks and projections.

    Read from the architecture's config; a model that is not known counts as ViT-B/32, 8.8 GFLOP.
    """
    vision = _clip_config(model).get("vision_cfg", {})
    width, layers, patch = vision.get("width", 768), vision.get("layers", 12), vision.get("patch_size", 32)
    if not isinstance(layers, int):  # a ResNet tower; none of ours
        return 8.8e9
    tokens = (vision.get("image_size", 224) // patch) ** 2 + 1
    ratio = vision.get("mlp_ratio", 4.0)
    return float(
        layers * (2 * tokens * width**2 * (4 + 2 * ratio) + 4 * tokens**2 * width) + 2 * tokens * 3 * patch**2 * width
    )


def _clip_config(model: str) -> dict[str, Any]:
    """The architecture's config; empty when it is not known."""
    for path in local_model_files(model):
        if path.endswith("open_clip_config.json"):
            return dict(json.loads(Path(path).read_text())["model_cfg"])
    if model.startswith(("local-dir:", "hf-hub:")):
        return {}
    import open_clip

    return dict(open_clip.get_model_config(model.partition("@")[0]) or {})


def _weights(model: str) -> float:
    """Number of weights of a local model, from its file sizes at two bytes a weight; 7e9 for one on the hub (assumed)."""
    sizes = [Path(path).stat().st_size for path in local_model_files(model) if path.endswith(".safetensors")]
    return sum(sizes) / 2 if sizes else 7e9


def _caption_flops(model: str) -> float:
    return 2 * _weights(model) * 64 if local_model_files(model) else HUB_CAPTION_FLOPS


def write_plan(plan: Plan, path: Path) -> None:
    """Writes the plan as JSON; the report reads it."""
    write_json(path, {**asdict(plan), "jobs": plan.jobs})


def describe_plan(plan: Plan, config: Config | None = None) -> str:
    """The plan as a table for people."""
    splits = ", ".join(f"{n} {split}" for split, n in plan.clips.items())
    lines = [
        f"{plan.name}: {splits} clips ({plan.basis}), {plan.frames:g} frames each, {plan.stored_frames:g} stored; "
        f"{plan.shards} shards, {plan.jobs} jobs",
        f"{'stage':34} {'jobs':>6} {'core hours':>11} {'or GPU hours':>13} {'GB':>9}",
    ]
    for s in plan.stages:
        gpu = f"{s.gpu_hours:.3f}" if s.gpu_hours else "-"
        lines.append(f"{s.stage:34} {s.jobs:>6} {s.cpu_hours:>11.3f} {gpu:>13} {s.gigabytes:>9.3f}")
    without = sum(s.cpu_hours for s in plan.stages)
    cores = sum(s.cpu_hours for s in plan.stages if not s.gpu_hours)
    gpus = sum(s.gpu_hours for s in plan.stages)
    size = sum(s.gigabytes for s in plan.stages)
    lines.append(
        f"without a GPU: {without:.2f} core hours; with: {cores:.2f} core hours and {gpus:.2f} GPU hours; {size:.2f} GB"
    )
    if config is not None and (config.prices.cpu_core_hour or config.prices.gpu_hour):
        price = cores * config.prices.cpu_core_hour + gpus * config.prices.gpu_hour
        lines.append(f"with GPUs, at the config's prices: {price:.2f}")
    lines.append(
        f"assumed: {GPU_FLOPS / 1e12:.0f} TFLOP/s a GPU, {CORE_FLOPS / 1e9:.0f} GFLOP/s a core; small models reach less"
    )
    return "\n".join(lines)
