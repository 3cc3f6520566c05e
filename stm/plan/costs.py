"""Costs of the stages: jobs, hours and gigabytes, computed from counts and shapes.

Rates are either measured, with their source stated, or marked as assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import cast

from stm.config import Augmentation, Config, LanguageRun, LanguageTask, PretrainRun, Run, is_language_run
from stm.config.strategies import find_strategy
from stm.plan.clips import Clips
from stm.pretrained.sizes import clip_image_flops
from stm.stages.costs import Cost, Workload
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages

# Measured on an AMD EPYC (AVX-512) with torch in float32: 11 ViT-B/32 images per second per core, and a ViT-B training
# step, both correspond to 90 GFLOP/s. Small models achieve less.
CORE_FLOPS = 90e9
# Assumed: 40 % of the 790 TFLOP/s that bf16 matrix multiplication reaches on an H200.
GPU_FLOPS = 316e12
# Measured on the same machine: decoding 16 JPEGs of 340x256 takes 3.4 ms and cropping them 2.2 ms.
LOAD_SECONDS_PER_PIXEL = 4e-9
# Measured on the same machine: timm's rand-m7-n4-mstd0.5-inc1 takes 1.43 ms per 224x224 frame.
AUGMENT_SECONDS_PER_PIXEL = 2.9e-8
# Measured: starting a Python process, importing torch and loading a model.
JOB_SECONDS = 5.0


@dataclass
class Line:
    """One line of the plan."""

    stage: str
    jobs: int
    cpu_hours: float  # core hours without a GPU
    gpu_hours: float = 0.0  # with a GPU, replacing the core hours; 0 for stages that do not use one
    gigabytes: float = 0.0  # written to disk
    loading_hours: float = 0.0  # core hours of reading and augmenting clips while the GPU works


def dataset_lines(config: Config, dataset: str, load: Workload) -> list[Line]:
    """Return one line per offline stage (and caption source) of a dataset, in stage order, from the stage's cost."""
    jobs = Jobs(config)
    lines = []
    for stage in all_stages().values():
        if stage.cost is None:
            continue
        for source in jobs.configs[dataset].captions if "source" in stage.per else [""]:
            cost = stage.cost(jobs.make(dataset=dataset, source=source), load)
            if cost is not None:
                parts = [stage.name, dataset if config.datasets else "", source]
                lines.append(_offline_line("/".join(filter(None, parts)), cost))
    return lines


def _offline_line(name: str, cost: Cost) -> Line:
    if cost.flops is None:
        return Line(name, cost.jobs, cost.core_seconds / 3600, gigabytes=cost.gigabytes)
    line = _network_line(name, cost.jobs, cost.flops, cost.gigabytes)
    return replace(line, gpu_hours=line.gpu_hours + cost.gpu_seconds / 3600)


def _network_line(stage: str, jobs: int, flops: float, gigabytes: float = 0.0) -> Line:
    """The line of a stage that runs a network, on CPU cores or on a GPU."""
    start = jobs * JOB_SECONDS
    return Line(
        stage,
        jobs,
        (flops / CORE_FLOPS + start) / 3600,
        (flops / GPU_FLOPS + start) / 3600 if flops else 0.0,
        gigabytes,
    )


def _loading_hours(config: Config, dataset: str, clips: Clips, frames: float) -> float:
    """Estimate the core hours needed to read `frames` frames of a dataset."""
    short, long = sorted((clips.width, clips.height))
    return frames * config.of(dataset).frames.short_side ** 2 * long / short * LOAD_SECONDS_PER_PIXEL / 3600


def _augmenting_hours(augmentation: Augmentation | None, run: Run, frames: float) -> float:
    """Estimate the core hours of RandAugment; repeats share the decoded frames, but each of them is augmented separately."""
    if augmentation is None or augmentation.auto_augment is None:
        return 0.0
    return frames * run.image_size**2 * AUGMENT_SECONDS_PER_PIXEL / 3600


def training_stages(config: Config, clips: Mapping[str, Clips]) -> list[Line]:
    """Return one line per pretraining run and per evaluation, using the formulas of `stm.models.cost`.

    Args:
        clips: the clip counts of each dataset.
    """
    from stm.models.cost import encoding_cost
    from stm.models.weights.zoo import describe

    stages = []
    for name, run in config.runs.items():
        flops = loading = 0.0
        for image, sources, frames in ((False, run.video_sources, run.frames), (True, run.image_sources, 1)):
            for named, split in sources:
                dataset = named or config.dataset_of(name)
                per_split = clips[dataset].per_split
                visits = per_split.get(split, sum(per_split.values())) * run.optimisation.epochs
                flops += _step_flops(run, image=image) * visits * run.repeats
                loading += _loading_hours(config, dataset, clips[dataset], visits * frames)
                loading += _augmenting_hours(run.augmentation, run, visits * run.repeats * frames)
        stages.append(replace(_network_line(f"pretrain/{name}", 1, flops), loading_hours=loading))
    for name, task_name in config.evaluations():
        run, task, dataset = config.runs[name], config.evaluate[task_name], config.dataset_of(name, task_name)
        if task.needs == "language":
            assert is_language_run(run)  # checked when the config was parsed
            line, settings = f"evaluate/{name}/{task_name}", cast(LanguageTask, task)
            stages.append(_language_stage(config, line, settings, run, dataset, clips[dataset]))
            continue
        per_split = clips[dataset].per_split
        optimisation = getattr(task, "optimisation", None)
        epochs, repeats = (optimisation.epochs, getattr(task, "repeats", 1)) if optimisation else (1, 1)
        passes = 3 * repeats if optimisation else 1  # a backward pass costs twice a forward pass
        train = per_split.get(task.splits.get("train", ""), 0) * epochs
        # All crops of a view come from the same decoded frames, so only the number of views multiplies the loading.
        test = per_split.get(task.test_split, 0) * task.views
        flops = encoding_cost(describe(run)) * (train * passes + test * task.crops)
        stage = _network_line(f"evaluate/{name}/{task_name}", 1, flops)
        loading = _loading_hours(config, dataset, clips[dataset], (train + test) * run.frames)
        loading += _augmenting_hours(getattr(task, "augmentation", None), run, train * repeats * run.frames)
        stages.append(replace(stage, loading_hours=loading))
    return stages


def _language_stage(
    config: Config, stage: str, task: LanguageTask, run: LanguageRun, dataset: str, clips: Clips
) -> Line:
    from stm.plan.language_costs import language_work

    work = language_work(task, run, clips)
    frames = task.frames or run.frames
    loading = _loading_hours(config, dataset, clips, work.clips * frames)
    loading += _augmenting_hours(task.augmentation, run, work.trained * frames)
    return replace(_network_line(stage, 1, work.flops), loading_hours=loading)


@singledispatch
def _step_flops(run: Run, image: bool = False) -> float:
    """FLOPs of the forward and backward pass of one clip or image; dispatches on the type of run."""
    raise TypeError(f"no cost of a training step is defined for {type(run).__name__}")


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
    # Guides that are not packed come from the teacher, which sees every frame of the clip.
    guided = run.teacher is not None and run.computed_guides & set(find_strategy(run.mask.strategy).needs)
    teacher = run.frames * clip_image_flops(run.teacher.model) if run.teacher and guided else 0.0
    if not run.trains_encoder:  # the head's own cost is negligible
        return teacher + cost.encoder
    if run.reconstruction.weight == 0:  # with only the contrastive loss, the decoder does not run
        return teacher + cost.step - 3 * cost.decoder
    return teacher + cost.step
