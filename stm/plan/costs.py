"""Costs of the stages: jobs, hours, gigabytes and memory, computed from counts and shapes.

Rates are either measured, with their source stated, or marked as assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import cast

from stm.config import (
    Augmentation,
    Config,
    EvaluationTask,
    FineTune,
    LanguageRun,
    LanguageTask,
    PretrainRun,
    Run,
    Teacher,
    is_language_run,
)
from stm.config.strategies import find_strategy
from stm.plan.clips import Clips
from stm.plan.hardware import CORE_FLOPS, Hardware
from stm.pretrained.sizes import clip_image_flops, clip_tower
from stm.stages.costs import Cost, Workload
from stm.stages.declaration import Stage
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages

# Core seconds of the loading processes per pixel of a stored frame, by what they do: read, decode and resize; leave resizing to
# the device; leave decoding to it, too, and hand over bytes. 0.65, 0.83 and (with the hand-over) 8.8 times the rate of decoding
# the JPEGs alone (benchmarks/results/2026-11-30-loader.txt), which is 125 clips of 16 frames of 340x256 per second and core on
# the machine of the other rates (2026-11-26-cpu.md). The device's time for decoding is not known.
LOAD_SECONDS_PER_PIXEL = {"resize": 8.9e-9, "decode": 6.9e-9, "read": 6.5e-10}
# Measured on the same machine: timm's rand-m7-n4-mstd0.5-inc1 takes 1.43 ms per 224x224 frame.
AUGMENT_SECONDS_PER_PIXEL = 2.9e-8
# Measured: starting a Python process, importing torch and loading a model.
JOB_SECONDS = 5.0


@dataclass
class Line:
    """One line of the plan: all jobs of a stage, or one run or evaluation."""

    stage: str
    jobs: int
    cpu_hours: float  # core hours without a GPU
    gpu_hours: float = 0.0  # of computation with GPUs, replacing the core hours; 0 for stages that do not use one
    gigabytes: float = 0.0  # written to disk
    removed: float = 0.0  # gigabytes of these that are removed during the run
    loading_hours: float = 0.0  # core hours of reading and augmenting clips while the GPU works
    gpus: int = 0  # that a job holds
    cores: float = 1.0  # that a job keeps busy on average
    job_hours: float = 0.0  # wall-clock of one job on the planned hardware
    memory: float = 0.0  # gigabytes on each GPU; 0 if it is not estimated

    @property
    def held_hours(self) -> float:
        """The GPU hours for which GPUs are held, including the time that they wait for the loader."""
        return self.jobs * self.gpus * self.job_hours


def dataset_lines(config: Config, dataset: str, load: Workload, hardware: Hardware) -> list[Line]:
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
                line = _offline_line("/".join(filter(None, parts)), cost, stage, hardware)
                lines.append(replace(line, removed=cost.removed))
    return lines


def _offline_line(name: str, cost: Cost, stage: Stage, hardware: Hardware) -> Line:
    if cost.flops is None:
        # Only a declared number of threads is that of worker processes.
        cores = min(stage.threads if stage.processes and isinstance(stage.threads, int) else 1, hardware.cores)
        hours = cost.core_seconds / 3600
        return Line(name, cost.jobs, hours, 0.0, cost.gigabytes, cores=cores, job_hours=_per(hours, cost.jobs * cores))
    line = _network_line(name, cost.jobs, cost.flops, cost.precision, hardware, cost.gigabytes)
    if not line.gpu_hours:
        return line
    gpu_hours = line.gpu_hours + cost.gpu_seconds / 3600
    return replace(line, gpu_hours=gpu_hours, gpus=1, job_hours=_per(gpu_hours, cost.jobs))


def _per(hours: float, parts: float) -> float:
    return hours / parts if parts else 0.0


def _network_line(
    stage: str, jobs: int, flops: float, precision: str, hardware: Hardware, gigabytes: float = 0.0
) -> Line:
    """The line of a stage that runs a network, on CPU cores or on a GPU."""
    start = jobs * JOB_SECONDS
    cpu_hours = (flops / CORE_FLOPS + start) / 3600
    gpu_hours = (flops / hardware.gpu_rate(precision) + start) / 3600 if flops else 0.0
    return Line(stage, jobs, cpu_hours, gpu_hours, gigabytes, job_hours=_per(cpu_hours, jobs))


def _run_line(line: Line, loading: float, gpus: int, workers: int, memory: float, hardware: Hardware) -> Line:
    """Complete the line of a run or an evaluation, whose GPUs wait if the loading processes are slower.

    Args:
        loading: core hours of all loading processes.
        workers: loading processes per GPU; 0: the training process loads the clips itself.
        memory: bytes on each GPU.
    """
    if not line.gpu_hours:
        return replace(line, loading_hours=loading)
    loaders = min(max(1, workers) * gpus, hardware.cores)
    computing, feeding = line.gpu_hours / gpus, loading / loaders
    hours = max(computing, feeding) if workers else computing + feeding
    busy = gpus + loading / hours  # cores: one per process, and those of the loading processes on average
    return replace(
        line,
        loading_hours=loading,
        gpus=gpus,
        cores=min(busy, hardware.cores),
        job_hours=hours,
        memory=memory / 1e9,
    )


def _loading_hours(config: Config, dataset: str, clips: Clips, frames: float, place: str = "resize") -> float:
    """Estimate the core hours needed to read `frames` frames of a dataset; for `place` see `LOAD_SECONDS_PER_PIXEL`."""
    short, long = sorted((clips.width, clips.height))
    pixels = config.of(dataset).frames.short_side ** 2 * long / short
    return frames * pixels * LOAD_SECONDS_PER_PIXEL[place] / 3600


def _loading_place(run: Run) -> str:
    """What a run's loading processes do, as a key of `LOAD_SECONDS_PER_PIXEL`."""
    return "read" if run.decode_on == "device" else "decode" if run.resize_on == "device" else "resize"


def _augmenting_hours(augmentation: Augmentation | None, run: Run, frames: float) -> float:
    """Estimate the core hours of RandAugment; repeats share the decoded frames, but each of them is augmented separately."""
    if augmentation is None or augmentation.auto_augment is None:
        return 0.0
    return frames * run.image_size**2 * AUGMENT_SECONDS_PER_PIXEL / 3600


def training_lines(config: Config, clips: Mapping[str, Clips], hardware: Hardware) -> list[Line]:
    """Return one line per pretraining run and per evaluation, using the formulas of `stm.models.cost`.

    Args:
        clips: the clip counts of each dataset.
    """
    lines = [_pretraining_line(config, name, run, clips, hardware) for name, run in config.runs.items()]
    return lines + [_evaluation_line(config, *names, clips, hardware) for names in config.evaluations()]


def _pretraining_line(config: Config, name: str, run: Run, clips: Mapping[str, Clips], hardware: Hardware) -> Line:
    from stm.plan.memory import pretraining_memory

    flops = loading = 0.0
    for image, sources, frames in ((False, run.video_sources, run.frames), (True, run.image_sources, 1)):
        for named, split in sources:
            dataset = named or config.dataset_of(name)
            per_split = clips[dataset].per_split
            visits = per_split.get(split, sum(per_split.values())) * run.optimisation.epochs
            flops += _step_flops(run, image=image) * visits * run.repeats
            loading += _loading_hours(config, dataset, clips[dataset], visits * frames, _loading_place(run))
            loading += _augmenting_hours(run.augmentation, run, visits * run.repeats * frames)
    line = _network_line(f"pretrain/{name}", 1, flops, run.precision, hardware)
    return _run_line(line, loading, run.world_size, run.workers, pretraining_memory(run).total, hardware)


def _evaluation_line(config: Config, name: str, task_name: str, clips: Mapping[str, Clips], hardware: Hardware) -> Line:
    from stm.plan.memory import evaluation_memory

    run, task, dataset = config.runs[name], config.evaluate[task_name], config.dataset_of(name, task_name)
    if task.needs == "language":
        assert is_language_run(run)  # checked when the config was parsed
        flops, loading = _language_work(config, cast(LanguageTask, task), run, dataset, clips[dataset])
    else:
        flops, loading = _video_work(config, task, run, dataset, clips[dataset])
    gpus = evaluation_gpus(Jobs(config).make(dataset=config.dataset_of(name), run=name, task=task_name))
    # Tasks that train have a precision of their own; the others encode clips in that of the run.
    precision = getattr(task, "precision", run.precision)
    line = _network_line(f"evaluate/{name}/{task_name}", 1, flops, precision, hardware)
    return _run_line(line, loading, gpus, run.workers, evaluation_memory(run, task, gpus).total, hardware)


def evaluation_gpus(job: Job) -> int:
    """Return the number of GPUs that an evaluation uses: one per process."""
    return job.study.evaluate[job.task].world_size


def _video_work(config: Config, task: EvaluationTask, run: Run, dataset: str, clips: Clips) -> tuple[float, float]:
    """The FLOPs, and the core hours of loading, of an evaluation without text."""
    from stm.models.architecture import describe
    from stm.models.cost import encoding_cost

    optimisation = getattr(task, "optimisation", None)
    epochs, repeats = (optimisation.epochs, getattr(task, "repeats", 1)) if optimisation else (1, 1)
    # A backward pass costs twice a forward pass; what is computed again costs another.
    again = isinstance(task, FineTune) and task.gradient_checkpointing != "none"
    passes = (3 + again) * repeats if optimisation else 1
    train = clips.per_split.get(task.splits.get("train", ""), 0) * epochs
    # All crops of a view come from the same decoded frames, so only the number of views multiplies the loading.
    test = clips.per_split.get(task.test_split, 0) * task.views
    flops = encoding_cost(describe(run)) * (train * passes + test * task.crops)
    loading = _loading_hours(config, dataset, clips, (train + test) * run.frames)
    return flops, loading + _augmenting_hours(getattr(task, "augmentation", None), run, train * repeats * run.frames)


def _language_work(
    config: Config, task: LanguageTask, run: LanguageRun, dataset: str, clips: Clips
) -> tuple[float, float]:
    """The same of an evaluation with text."""
    from stm.plan.language_costs import language_work

    work = language_work(task, run, clips)
    frames = task.frames or run.frames
    loading = _loading_hours(config, dataset, clips, work.clips * frames)
    return work.flops, loading + _augmenting_hours(task.augmentation, run, work.trained * frames)


@singledispatch
def _step_flops(run: Run, image: bool = False) -> float:
    """FLOPs of the forward and backward pass of one clip or image; dispatches on the type of run."""
    raise TypeError(f"no cost of a training step is defined for {type(run).__name__}")


@_step_flops.register
def _(run: LanguageRun, image: bool = False) -> float:
    from stm.models.architecture import describe
    from stm.plan.language_costs import language_step_flops

    return language_step_flops(run, _teacher_flops(run.teacher, describe(run).slot_tokens), image)


@_step_flops.register
def _(run: PretrainRun, image: bool = False) -> float:
    from stm.models.architecture import describe
    from stm.models.cost import pretraining_cost

    architecture = describe(run)
    slots = run.frames // run.tubelet
    per_slot = architecture.tokens // slots
    masked = slots * int(run.mask.ratio * per_slot)
    cost = pretraining_cost(architecture, architecture.tokens - masked, round(masked * run.decode_ratio))
    # Guides that are not packed come from the teacher, which sees every frame of the clip.
    guided = run.teacher is not None and run.computed_guides & set(find_strategy(run.mask.strategy).needs)
    teacher = run.frames * _teacher_flops(run.teacher, per_slot) if run.teacher and guided else 0.0
    if not run.trains_encoder:  # the head's own cost is negligible
        return teacher + cost.encoder
    again = run.gradient_checkpointing != "none"  # another forward pass
    if run.reconstruction.weight == 0:  # with only the contrastive loss, the decoder does not run
        return teacher + cost.step - 3 * cost.decoder + again * cost.encoder
    return teacher + cost.step + again * cost.forward


def _teacher_flops(teacher: Teacher, slot_tokens: int) -> float:
    """FLOPs of a teacher's pass over one frame: by default it has as many patches as a slot has tokens."""
    tower = clip_tower(teacher.model)
    if tower is None:
        return clip_image_flops(teacher.model)
    patches = slot_tokens if teacher.image_size is None else (teacher.image_size // tower.patch) ** 2
    return clip_image_flops(teacher.model, patches)
