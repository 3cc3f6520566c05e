"""A stage's declaration in the form that Snakemake's rules need: file patterns, and functions of the wildcards."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from stm.config import Config, ConfigError
from stm.pretrained.local_files import local_model_files
from stm.stages.declaration import Requests, Resource, Stage
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages
from stm.stages.provenance import check_finished
from stm.storage.receipts import library_versions

# Libraries whose versions affect the bytes of shared results.
SHARED_LIBRARIES = (
    *("av", "numpy", "opencv-python-headless", "open_clip_torch", "pyarrow", "simplejpeg"),
    *("timm", "tokenizers", "torch", "torchvision", "transformers"),
)


class DeclaredRule:
    """The sections of a stage's rule.

    Args:
        refuse: converts an error in the config or dataset into one that the workflow shows without a traceback.
        cores: number of cores of this machine; None on a cluster, where the profile sets the threads.
        sharing: whether results are shared with other projects (`--cache`).
        unrecorded: whether the workflow's own records lack a finished file, so that they cannot say whether it is up to date.
        gpus: number of GPUs that the jobs of this machine share; 0 without any, and on a cluster.
        requests: computes what jobs request on a cluster; None on one machine.
        limits: the most that a job may request of `mem_mb` and `runtime`.

    Attributes:
        inputs, settings, made_with, threads: functions of the wildcards, or plain values.
        output: the path patterns of the outputs by name, for example `results/{dataset}/frames/{shard}.tar`.
        resource: the resources by name.
    """

    def __init__(
        self,
        stage: Stage,
        jobs: Jobs,
        refuse: Callable[[Exception], Exception] = lambda error: error,
        cores: int | None = None,
        sharing: bool = False,
        unrecorded: Callable[[Path], bool] = lambda path: False,
        gpus: int = 0,
        requests: Requests | None = None,
        limits: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.stage = stage
        self._gpus = gpus
        self._requests = requests
        self._limits = limits
        self._jobs = jobs
        self._refuse = refuse
        self._unrecorded = unrecorded
        pattern = jobs.make(**{name: f"{{{name}}}" for name in stage.per})
        self.output = SimpleNamespace(**_as_text(stage.outputs(pattern)))
        names = [name for name in stage.per if name != "dataset"]
        wildcards = "/".join(f"{{{name}}}" for name in names)
        self.log = (pattern.layout.logs / stage.name / f"{wildcards}.log").as_posix()
        self.benchmark = (pattern.layout.benchmarks / stage.name / f"{wildcards or 'all'}.tsv").as_posix()
        if not names:
            self.log = (pattern.layout.logs / f"{stage.name}.log").as_posix()
        self.shared = stage.shared and sharing
        self.inputs = cache_signature(lambda wildcards: self._inputs(wildcards))
        self.settings = cache_signature(lambda wildcards: self._settings(wildcards))
        # Cache keys of shared results include neither the rule nor library versions, so `made_with` takes the place of
        # an environment. The unused parameter `input` prevents reruns of finished jobs when a version changes.
        versions = jobs.once("versions", partial(library_versions, SHARED_LIBRARIES))
        made_with = {"stage": stage.name, **versions}
        self.made_with = cache_signature(lambda wildcards, input: made_with)
        self.threads = self._threads(cores or 1)
        self.resource = SimpleNamespace(**{name: self._resource(name, r) for name, r in stage.resources.items()})

    def _job(self, wildcards: Any) -> Job:
        return self._jobs.make(**{name: getattr(wildcards, name) for name in self.stage.per})

    def _inputs(self, wildcards: Any) -> dict[str, str | list[str]]:
        """Return the input files of a job, including those of the local models that it loads."""
        job, stage = self._job(wildcards), self.stage
        try:
            job.check_names()
            if stage.check is not None:
                self._jobs.once(("check", stage.name, job.dataset), partial(stage.check, job))
            self._check_finished(job)
            models = {name: self._files(models) for name, models in stage.models(job).items()}
            inputs = stage.inputs(job)
            # Snakemake updates the jobs that wait for a finished checkpoint, but not those that join the DAG by such an update:
            # if they wait for another finished one, they are run without inputs. So the first job waits for all of them.
            for dataset in self._jobs.datasets_behind(stage.runs(job)):
                self._jobs.list_shards(dataset)
            return models | _as_text(inputs)
        except ValueError as error:
            # Errors of this package's own types are human-readable; others are bugs, and keep their traceback.
            if not type(error).__module__.startswith("stm."):
                raise
            raise self._refuse(error) from None

    def _check_finished(self, job: Job) -> None:
        """Check the receipt of results that were copied without the workflow's records, as from another folder."""
        if self.stage.receipt is not None:
            path: Path = self.stage.outputs(job)[self.stage.receipt]
            if path.exists() and self._unrecorded(path):
                check_finished(self.stage, job, all_stages())

    def _files(self, models: Sequence[str | None]) -> list[str]:
        """Return the files of local models. Every job needs them, so each folder is listed only once."""
        return [
            path for model in models for path in self._jobs.once(("model", model), partial(local_model_files, model))
        ]

    def _settings(self, wildcards: Any) -> dict[str, Any]:
        """Return the settings that affect a job's results."""
        job = self._job(wildcards)
        # The key omits the shard, because all shards with guides of a dataset and source have the same settings, and all without.
        key = (self.stage.name, job.dataset, job.source, job.guided, job.run, job.task, job.table, job.figure)
        return self._jobs.once(("settings", key), lambda: job.settings(self.stage.settings) | self.stage.facts(job))

    def _threads(self, cores: int) -> int | Callable[..., int]:
        threads, requests = self.stage.threads, self._requests
        if isinstance(threads, int):
            return threads
        if requests is None:
            return cache_signature(lambda wildcards: threads(self._job(wildcards), cores))

        def requested(wildcards: Any) -> int:
            job = self._job(wildcards)
            return requests.threads(self.stage, job) or threads(job, cores)

        return cache_signature(requested)

    def _resource(self, name: str, resource: Resource) -> Any:
        # A job that ran out of memory or time is retried with more; the signature must contain `attempt` and `threads`.
        if name == "mem_mb" or (name == "runtime" and self._requests is not None):
            return cache_signature(
                lambda wildcards, attempt, threads=1: self._growing(name, resource, wildcards, attempt, threads)
            )
        if name == "gpu" and self._gpus:
            return cache_signature(lambda wildcards: self._gpus_of(wildcards, resource))
        if isinstance(resource, int):
            return resource
        return cache_signature(lambda wildcards: self._amount(wildcards, resource))

    def _growing(self, name: str, resource: Resource, wildcards: Any, attempt: int, threads: int) -> int:
        """Return what an attempt of a job on a cluster requests: the first attempt's amount once more with each."""
        amount = None
        if self._requests is not None:
            compute = self._requests.memory if name == "mem_mb" else self._requests.minutes
            amount = compute(self.stage, self._job(wildcards), threads)
        first: int = self._amount(wildcards, resource) if amount is None else amount
        return min(first * attempt, self._limits.get(name, first * attempt))

    def _gpus_of(self, wildcards: Any, resource: Resource) -> int | None:
        """Return the GPUs of a job. Snakemake would lower a number that is too large, and the job fail when it runs."""
        count: int | None = self._amount(wildcards, resource)
        if (count or 0) > self._gpus:
            job = "/".join(getattr(wildcards, name) for name in self.stage.per)
            raise self._refuse(
                ConfigError(
                    f"{self.stage.name} {job} uses {count} GPUs, one per process, and the workflow may use {self._gpus} of this "
                    "machine's: lower `processes`, or offer more (CUDA_VISIBLE_DEVICES, --resources gpu=N)"
                )
            )
        return count

    def _amount(self, wildcards: Any, resource: Resource) -> Any:
        return resource if isinstance(resource, int) else resource(self._job(wildcards))


def check_targets(config: Config) -> None:
    """Check that no table or figure, each of which is a target of the workflow, is named like a rule.

    Raises:
        ConfigError: one is.
    """
    for section in ("tables", "figures"):
        for name in getattr(config, section):
            if name in {*all_stages(), "all"}:
                raise ConfigError(f"{section}.{name}: the workflow has a rule {name!r}; rename this entry of {section}")


def describe_shared_cores(config: Config) -> str:
    """Say what happens where work that is divided among processes runs on a machine without GPUs; empty if none is."""
    work = {f"pretrain.{name}": run.processes for name, run in config.pretrain.items()}
    work |= {f"evaluate.{name}": task.processes for name, task in config.evaluate.items()}
    divided = [f"{name} ({processes})" for name, processes in work.items() if processes > 1]
    if not divided:
        return ""
    more = f" and {len(divided) - 3} more" if len(divided) > 3 else ""
    return (
        f"no GPU is offered here, and `processes` is above 1: {', '.join(divided[:3])}{more}. On a CPU they share its cores, "
        "each holds the whole model and waits for the others: one process that uses all cores needs less memory and is usually "
        "as fast. Set `processes: 1`, or run where there are GPUs; numbers change by rounding and random numbers only"
    )


def cache_signature(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache a function's signature on it. Inspecting the signature for every job took 10 % of a large dry run."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


def _as_text(files: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.as_posix() if isinstance(value, Path) else [path.as_posix() for path in value]
        for name, value in files.items()
    }
