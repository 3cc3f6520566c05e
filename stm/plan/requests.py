"""What jobs request on a cluster: CPUs, memory and time, from the config's own numbers and from the plan.

The plan assumes the hardware of `prices`. A request has a margin over it, and grows with each attempt.
"""

import logging
from math import ceil

from stm.config import AnyRun, EvaluationTask
from stm.plan.costs import Line
from stm.plan.make import make_plan
from stm.plan.schedule import line_of
from stm.pretrained.sizes import count_weights
from stm.stages.declaration import Stage
from stm.stages.jobs import Job, Jobs

_log = logging.getLogger(__name__)

TIME_MARGIN = 2.0
"""Requested hours per planned hour: rates are assumed, and other jobs share file systems and networks."""
START_MINUTES = 30
"""In addition: imports, model files over a network, compilation."""
HELD_BATCHES = 5
"""Batches in the memory of each loading process: those held ready by `stm.data.loader.ClipLoader`, and one in the making."""
JPEG_SHARE = 0.2
"""Bytes of a JPEG per byte of its pixels, at most."""

# Megabytes. Measured (maximum resident set size): 165 for a process that decodes 1080p, and 575 for a loading process without
# batches, most of it torch. The rest are margins for larger frames, CUDA, and the files that the system caches for a job.
_JOB = 16000
_WORKER = 500
_LOADING_PROCESS = 1000
_TRAINING_PROCESS = 8000
_CLIPS_WITHOUT_TRAINING = 32  # per batch of an evaluation


class Requests:
    """The requests of the jobs of a config; None where nothing is known, so that the stage's declaration holds.

    Args:
        jobs: of the whole config.
        planned: whether times are computed, which takes seconds: only the process that submits jobs needs them.
    """

    def __init__(self, jobs: Jobs, planned: bool = True) -> None:
        self._jobs = jobs
        self._planned = planned

    def threads(self, stage: Stage, job: Job) -> int | None:
        """Return the cores, per node, of a run or an evaluation: each process, and its loading processes, on one."""
        if stage.name not in ("pretrain", "evaluate"):
            return None
        return _work(stage, job).processes * (1 + _loaders(stage, job))

    def memory(self, stage: Stage, job: Job, threads: int) -> int | None:
        """Return the memory per node in megabytes: of worker processes, a captioner, or a run with its loaders and batches."""
        if stage.name in ("pretrain", "evaluate"):
            run = job.study.runs[job.run]
            loader = _LOADING_PROCESS + 1000 * run.kept_gigabytes + HELD_BATCHES * _batch_megabytes(stage, job)
            each = _TRAINING_PROCESS + _loaders(stage, job) * loader
            return _round_up(_JOB + _work(stage, job).processes * each, 1000)
        if stage.name == "captions":
            return _captioner_megabytes(job)
        if stage.processes and isinstance(stage.resources.get("mem_mb"), int):
            return 1000 + _WORKER * threads
        return None

    def minutes(self, stage: Stage, job: Job, threads: int) -> int | None:
        """Return the time of a job's first attempt: the plan's, by the cores that the job has, with its margin."""
        line = self._lines().get(line_of(stage.name, job, self._jobs.study))
        if line is None:
            return None
        minutes = START_MINUTES + 60 * TIME_MARGIN * _hours(line, stage, job, threads)
        return _round_up(minutes, 10)

    def further_attempts(self, stage: Stage, longest: int, cores: int | None = None) -> int:
        """Return how often the longest job of a stage that resumes must be started again, if no attempt is longer than `longest`.

        Args:
            longest: minutes.
            cores: the most per node; None: no limit.
        """
        found = 0
        for dataset in self._jobs.study.dataset_names:
            for job in stage.each(self._jobs, dataset):
                threads = self.threads(stage, job) or 1
                minutes = self.minutes(stage, job, min(threads, cores or threads))
                found = max(found, ceil((minutes or 0) / longest) - 1)
        return found

    def _lines(self) -> dict[str, Line]:
        return self._jobs.once("lines of the plan", self._make_lines) if self._planned else {}

    def _make_lines(self) -> dict[str, Line]:
        try:
            return {line.stage: line for line in make_plan(self._jobs.study).stages}
        except (ValueError, OSError) as error:  # the rule `plan` fails with it
            _log.warning(f"the plan cannot be made, so that jobs request the declared times: {error}")
            return {}


def _round_up(value: float, multiple: int) -> int:
    return ceil(value / multiple) * multiple


def _trains(run: AnyRun) -> bool:
    """Whether a run has steps; the weights of others are converted, or only initialised."""
    return run.release is None and run.optimisation.epochs > 0


def _loaders(stage: Stage, job: Job) -> int:
    """The loading processes per process; one that loads its clips itself counts as one more."""
    run = job.study.runs[job.run]
    return max(1, run.workers) if stage.name == "evaluate" or _trains(run) else 0


def _captioner_megabytes(job: Job) -> int | None:
    """The memory of a job that captions with a large model, which is loaded there before it is moved to a GPU."""
    source = job.config.captions[job.source]
    model = getattr(source, "model", None)
    if model is None:
        return None
    megabytes = count_weights(model) * (4 if getattr(source, "precision", "") == "float32" else 2) / 1e6
    return _round_up(_JOB + megabytes, 1000) if megabytes > _JOB / 2 else None


def _work(stage: Stage, job: Job) -> AnyRun | EvaluationTask:
    """The section of the config that says how a job's work is divided: into `processes` on each of `nodes`."""
    return job.study.runs[job.run] if stage.name == "pretrain" else job.study.evaluate[job.task]


def _batch_megabytes(stage: Stage, job: Job) -> float:
    """The largest batch that a loading process hands to its training process: pixels as bytes, or JPEGs."""
    run = job.study.runs[job.run]
    pixels = run.image_size**2  # of a frame
    share = 1.0
    if stage.name == "pretrain":
        if run.resize_on == "device":  # crops, which are no larger than the stored frames
            pixels = ceil(job.config.frames.short_side**2 * 4 / 3)
        if run.decode_on == "device":
            share = JPEG_SHARE
        parts = run.optimisation.accumulate * run.world_size
        frames = max(medium.batch_size // parts * medium.frames for medium in run.media)
    else:
        task = job.study.evaluate[job.task]
        optimisation = getattr(task, "optimisation", None)
        batch = optimisation.batch_size // (optimisation.accumulate * task.world_size) if optimisation else 0
        frames = max(batch, _CLIPS_WITHOUT_TRAINING) * (getattr(task, "frames", None) or run.frames)
    return share * frames * pixels * 3 / 1e6


def _hours(line: Line, stage: Stage, job: Job, threads: int) -> float:
    """The planned wall-clock of one job of a line with `threads` cores on each of its nodes."""
    jobs = max(1, line.jobs)
    if not line.gpus:
        return line.cpu_hours / jobs / (threads if stage.processes else 1)
    computing = line.gpu_hours / jobs / line.gpus
    if not line.loading_hours:
        return computing
    run = job.study.runs[job.run]
    nodes = _work(stage, job).nodes
    if not run.workers:
        return computing + line.loading_hours / line.gpus
    cores = max(1, threads - line.gpus // nodes) * nodes
    return max(computing, line.loading_hours / min(run.workers * line.gpus, cores))
