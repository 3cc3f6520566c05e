"""The wall-clock of a plan: jobs side by side on the GPUs and cores that they share, in the order that their files allow."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from stm.config import Config, ConfigError
from stm.plan.clips import Clips
from stm.plan.costs import Line
from stm.plan.hardware import Hardware
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages

_PRECISION = 1e-9  # hours


@dataclass
class _Task:
    """A line of the plan in the simulation."""

    line: Line
    after: set[str]  # names of the lines whose files it reads
    left: float = field(init=False)  # jobs
    running: int = 0  # jobs at the moment

    def __post_init__(self) -> None:
        self.left = float(self.line.jobs)


def estimate_hours(config: Config, lines: Iterable[Line], clips: Mapping[str, Clips], hardware: Hardware) -> float:
    """Estimate the hours from the first job to the last one.

    A line starts when all lines that it reads from have finished, and uses as many GPUs and cores as are free and its jobs need.
    Lines earlier in the plan go first. A workflow starts a shard as soon as its inputs are there, so that it waits less; but it
    fills GPUs less evenly.

    Args:
        clips: the clip counts of each dataset.
    """
    reads = _dependencies(config, clips)
    tasks = [_Task(line, reads.get(line.stage, set())) for line in lines]
    if not any(task.line.gpu_hours for task in tasks):
        hardware = Hardware(hardware.name, hardware.gpu, hardware.share, 0, hardware.cores)
    hours = 0.0
    while tasks:
        names = {task.line.stage for task in tasks}
        _share(tasks, names, hardware)
        active = [task for task in tasks if task.running and task.line.job_hours > _PRECISION]
        step = min((task.left * task.line.job_hours / task.running for task in active), default=0.0)
        done = [task for task in tasks if task.running and task.line.job_hours <= _PRECISION]
        if done:
            step = 0.0
        for task in active:
            task.left -= step * task.running / task.line.job_hours
        hours += step
        tasks = [task for task in tasks if task not in done and task.left > _PRECISION]
    return hours


def _share(tasks: list[_Task], waiting: set[str], hardware: Hardware) -> None:
    """Divide GPUs and cores among the lines that can run: those that are running first, then in the plan's order."""
    gpus, cores = float(hardware.gpus), float(hardware.cores)
    for task in sorted(tasks, key=lambda task: not task.running):
        task.running = 0
        if task.after & waiting:
            continue
        line = task.line
        possible = min(
            ceil(task.left - _PRECISION),
            int(gpus // line.gpus) if line.gpus else line.jobs,
            int((cores + _PRECISION) // line.cores),
        )
        task.running = max(0, possible)
        gpus -= task.running * line.gpus
        cores -= task.running * line.cores


def _dependencies(config: Config, clips: Mapping[str, Clips]) -> dict[str, set[str]]:
    """The lines whose outputs each line reads, by name: from the files that the stages declare, for one shard per split."""
    shards = {dataset: [f"{split}-00000" for split, n in one.per_split.items() if n] for dataset, one in clips.items()}
    jobs = Jobs(config, lambda dataset: shards[dataset])
    made: dict[Path, str] = {}
    read: dict[str, set[Path]] = {}
    for stage in all_stages().values():
        for dataset in config.dataset_names if "dataset" in stage.per else [""]:
            for job in stage.each(jobs, dataset):
                line = line_of(stage.name, job, config)
                made |= dict.fromkeys(_paths(stage.outputs(job)), line)
                with suppress(ConfigError):  # a split without clips, which `stm.plan.check` refuses
                    read.setdefault(line, set()).update(_paths(stage.inputs(job)))
    return {line: {made[path] for path in paths if path in made} - {line} for line, paths in read.items()}


def line_of(stage: str, job: Job, config: Config) -> str:
    """Return the name of the plan's line that a job belongs to; see `stm.plan.costs`."""
    if job.run:
        return "/".join(filter(None, (stage, job.run, job.task)))
    return "/".join(filter(None, (stage, job.dataset if config.datasets else "", job.source)))


def _paths(files: Mapping[str, Any]) -> list[Path]:
    return [path for value in files.values() for path in ([value] if isinstance(value, Path) else value)]
