"""Costs of the stages: from counts and shapes to jobs, hours and gigabytes.

Rates are measured ones, named with their source; what was not measured says "assumed".
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import Any, cast

from stm.config import (
    Blip2Captions,
    Config,
    LanguageModelCaptions,
    LanguageRun,
    LanguageTask,
    MovingShapesDataset,
    PretrainRun,
    Run,
    is_language_run,
)
from stm.plan.clips import Clips
from stm.pretrained.local_files import local_model_files

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
# Measured, same machine: 16 JPEGs of 340x256 are decoded in 3.4 ms and cut in 2.2 ms.
LOAD_SECONDS_PER_PIXEL = 4e-9
# Measured, same machine: timm's rand-m7-n4-mstd0.5-inc1 on pictures of 224 pixels, 1.43 ms each.
AUGMENT_SECONDS_PER_PIXEL = 2.9e-8
# Assumed: a language model writes a token for a whole batch in so long on a GPU, however small the batch; reading the
# weights and starting the kernels, not arithmetic, is what takes the time.
TOKEN_SECONDS = 0.025
# A Python process that imports torch and loads a model; measured.
JOB_SECONDS = 5.0
# BLIP-2 with OPT-2.7b, from its sizes: image tower 1.0e9 weights x 257 tokens, language model 2.7e9 x 62 tokens.
HUB_CAPTION_FLOPS = 2 * (1.0e9 * 257 + 2.7e9 * 62)
# CLIP ViT-B/32's text tower: 12 blocks of width 512 on 77 tokens, 38 million weights.
TEXT_FLOPS = 5.9e9
# Measured, same machine: both directions of OpenCV's DIS, preset medium, at 340x256 in 11.3 ms.
FLOW_SECONDS_PER_PIXEL = 1.3e-7


@dataclass
class Stage:
    """One line of the plan."""

    stage: str
    jobs: int
    cpu_hours: float  # core hours, when it runs without a GPU
    gpu_hours: float = 0.0  # with one, instead of the core hours; 0 for stages that use none
    gigabytes: float = 0.0  # written
    loading_hours: float = 0.0  # core hours spent on reading and augmenting clips beside the GPU


def reading_stages(
    config: Config, clips: Clips, shards: int, frames: float, stored: float, aspect: float
) -> list[Stage]:
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
    if config.pack.flow:
        flow = clips.total * stored * FLOW_SECONDS_PER_PIXEL * stored_pixels / 3600
        size = clips.total * stored * cells * config.flow.cells**2 * 8 / 1e9
        stages.append(Stage("flow", shards, flow, gigabytes=size))
    return stages


def scoring_stages(config: Config, clips: Clips, shards: int, stored: float, cells: int) -> list[Stage]:
    """Captions, similarity and the captions' vectors."""
    stages = []
    patches = clips.total * stored * cells
    tower = patches * clip_image_flops(config.similarity.model)
    captions_of = {}
    needed = config.mask_quality is not None or bool(config.pack.sources)
    for name, source in config.captions.items() if needed else ():
        flops, tokens = 0.0, 0.0
        if isinstance(source, Blip2Captions):
            captions_of[name] = source.key_frames
            flops = clips.total * source.key_frames * _caption_flops(source.model)
            tokens = clips.total * source.key_frames / source.batch_size * source.max_new_tokens
        elif isinstance(source, LanguageModelCaptions):
            captions_of[name] = len(source.prompts)
            # As if no two clips of a shard had the same label; it is asked about once.
            flops = clips.total * len(source.prompts) * 2 * _weights(source.model) * source.max_new_tokens
            tokens = clips.total * len(source.prompts) / source.batch_size * source.max_new_tokens
        else:
            captions_of[name] = len(getattr(source, "templates", [1]))
        stage = _computing(f"captions/{name}", shards, flops)
        stages.append(replace(stage, gpu_hours=stage.gpu_hours + tokens * TOKEN_SECONDS / 3600))
    scored = _scored_clips(config, clips)
    if scored and config.similarity.keep_embeddings:
        width = _clip_config(config.similarity.model).get("embed_dim", 512)
        stages.append(_computing("embeddings", shards, tower, gigabytes=patches * 2 * width / 1e9))
    for name, (count, jobs) in scored.items():
        flops = 0.0 if config.similarity.keep_embeddings else tower * count / max(1, clips.total)
        size = count * captions_of[name] * stored * cells * 2 / 1e9
        stages.append(_computing(f"similarity/{name}", jobs, flops, gigabytes=size))
    if config.pack.text:
        for name in config.pack.sources:
            flops = clips.total * captions_of[name] * TEXT_FLOPS
            stages.append(_computing(f"text/{name}", shards, flops, gigabytes=clips.total * captions_of[name] * 1e-6))
    return stages


def _scored_clips(config: Config, clips: Clips) -> dict[str, tuple[int, int]]:
    """Clips and jobs of each caption source's similarity: all for packed ones, else those that masks are measured on."""
    found = {}
    if config.mask_quality is not None:
        measured = {config.mask_quality.split: clips.per_split.get(config.mask_quality.split, 0)}
        found = dict.fromkeys(config.captions, (sum(measured.values()), count_shards(measured, config.shard_size)))
    if config.pack.similarity:
        found |= dict.fromkeys(config.pack.sources, (clips.total, count_shards(clips.per_split, config.shard_size)))
    return found


def count_shards(per_split: dict[str, int], shard_size: int) -> int:
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


def _loading_hours(config: Config, dataset: str, clips: Clips, frames: float) -> float:
    """Core hours to read `frames` frames of a dataset."""
    short, long = sorted((clips.width, clips.height))
    return frames * config.of(dataset).frames.short_side ** 2 * long / short * LOAD_SECONDS_PER_PIXEL / 3600


def training_stages(config: Config, clips: Mapping[str, Clips]) -> list[Stage]:
    """Pretraining and evaluation, by the formulas of stm.models.cost.

    Args:
        clips: of each dataset.
    """
    from stm.models.cost import encoding_cost
    from stm.models.weights.zoo import describe

    stages = []
    for name, run in config.runs.items():
        flops = loading = 0.0
        for sources, frames in ((run.video_sources, run.frames), (run.image_sources, 1)):
            for own, split in sources:
                dataset = own or config.dataset_of(name)
                per_split = clips[dataset].per_split
                visits = per_split.get(split, sum(per_split.values())) * run.optimisation.epochs
                flops += _step_flops(run, image=frames == 1 < run.frames) * visits * run.repeats
                loading += _loading_hours(config, dataset, clips[dataset], visits * frames)
        stages.append(replace(_computing(f"pretrain/{name}", 1, flops), loading_hours=loading))
    for name, task_name in config.evaluations():
        run, task, dataset = config.runs[name], config.evaluate[task_name], config.dataset_of(name, task_name)
        if task.needs == "language":
            assert is_language_run(run)  # which the config has checked
            line, settings = f"evaluate/{name}/{task_name}", cast(LanguageTask, task)
            stages.append(_language_stage(config, line, settings, run, dataset, clips[dataset]))
            continue
        per_split = clips[dataset].per_split
        optimisation = getattr(task, "optimisation", None)
        epochs, repeats = (optimisation.epochs, getattr(task, "repeats", 1)) if optimisation else (1, 1)
        passes = 3 * repeats if optimisation else 1  # forward, and twice that backward
        train = per_split.get(getattr(task, "train_split", ""), 0) * epochs
        test = per_split.get(task.test_split, 0) * task.views
        flops = encoding_cost(describe(run)) * (train * passes + test * task.crops)
        stage = _computing(f"evaluate/{name}/{task_name}", 1, flops)
        loading = _loading_hours(config, dataset, clips[dataset], (train + test) * run.frames)
        augmentation = getattr(task, "augmentation", None)
        if augmentation is not None and augmentation.auto_augment is not None:
            loading += train * repeats * run.frames * run.image_size**2 * AUGMENT_SECONDS_PER_PIXEL / 3600
        stages.append(replace(stage, loading_hours=loading))
    return stages


def _language_stage(
    config: Config, stage: str, task: LanguageTask, run: LanguageRun, dataset: str, clips: Clips
) -> Stage:
    from stm.plan.language_costs import language_work

    work = language_work(task, run, clips)
    loading = _loading_hours(config, dataset, clips, work.clips * (task.frames or run.frames))
    return replace(_computing(stage, 1, work.flops), loading_hours=loading)


@singledispatch
def _step_flops(run: Run, image: bool = False) -> float:
    """FLOPs of a clip's, or an image's, forward and backward pass; a function for each section of runs."""
    raise TypeError(f"what a step of {type(run).__name__} costs is not known")


@_step_flops.register
def _(run: LanguageRun, image: bool = False) -> float:
    from stm.plan.language_costs import language_step_flops

    return language_step_flops(run, clip_image_flops(run.teacher.model), image)


@_step_flops.register
def _(run: PretrainRun, image: bool = False) -> float:
    from stm.models.cost import pretraining_cost
    from stm.models.weights.zoo import describe

    architecture = describe(run)
    slots = run.frames // run.tubelet
    per_slot = architecture.tokens // slots
    masked = slots * int(run.mask.ratio * per_slot)
    cost = pretraining_cost(architecture, architecture.tokens - masked, round(masked * run.decode_ratio))
    if run.reconstruction.weight == 0:  # contrast only: no decoder runs
        return cost.step - 3 * cost.decoder
    return cost.step


def clip_image_flops(model: str) -> float:
    """FLOPs (multiply and add counted apart) of one image through a CLIP image tower: blocks and projections.

    Read from the architecture's config; a model that is not known counts as ViT-B/32, 8.8 GFLOP.
    """
    vision = _clip_config(model).get("vision_cfg", {})
    width, layers, patch = vision.get("width", 768), vision.get("layers", 12), vision.get("patch_size", 32)
    if found := re.search(r"patch(\d+)", str(vision.get("timm_model_name", ""))):  # such as SigLIP's towers
        patch = int(found[1])
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
