"""What a stage declares of itself: what it reads, writes and needs, what decides its bytes, and who does it.

The workflow's rules, `stm <stage>`, the plan and the report read the declarations; none of them repeats what stands there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from stm.config import Config
from stm.stages.costs import Cost, Workload
from stm.stages.jobs import Job, Jobs

Files = Mapping[str, Any]  # by name: a Path, or a list of Paths
Resource = int | Callable[[Job], Any]


class Run(Protocol):
    """Does a job. It imports what it needs when it is called: declarations are read by `stm --help` and by every dry run."""

    def __call__(self, job: Job, inputs: Files, outputs: Files, processes: int) -> str | None:
        """Reads `inputs` and writes `outputs`; returns what a person at the command line wants to read, if anything."""


def _nothing(job: Job) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One stage, declared once."""

    name: str  # of the rule; the command has hyphens
    title: str  # in one line, for people
    per: tuple[str, ...]  # the wildcards that tell its jobs apart, outermost first
    outputs: Callable[[Job], Files]
    run: Run
    inputs: Callable[[Job], Files] = _nothing
    # Model ids by the name of the input that the files of a local one are: other weights run the job again.
    models: Callable[[Job], Mapping[str, Sequence[str | None]]] = _nothing
    # What decides the bytes: keys of the config, see `Job.settings`, and what no key says, such as the state of a folder.
    settings: tuple[str, ...] = ()
    facts: Callable[[Job], dict[str, Any]] = _nothing
    # By Snakemake's names. Memory is that of a first attempt: what was killed for it would be killed again.
    resources: Mapping[str, Resource] = field(default_factory=dict)
    threads: int | Callable[[Job, int], int] = 1  # or of a job and the cores of this machine
    processes: bool = False  # whether the threads are worker processes, `--processes` by hand
    shared: bool = False  # whether other projects may take the results from a cache
    receipt: str | None = None  # the output that says what made it
    # Whether it makes do with the inputs that are there, and finds them itself: by hand it is not refused for want of others.
    partial: bool = False
    # For which datasets there is anything to do, and the message where there is for none.
    applies: Callable[[Config], bool] = lambda config: True
    otherwise: str = ""
    # What all jobs of a dataset, and source, cost; None where the config asks for none. Stages without a dataset are not priced.
    cost: Callable[[Job, Workload], Cost | None] | None = None
    check: Callable[[Job], None] | None = None  # refuses a wrong config or dataset before any job runs

    @property
    def command(self) -> str:
        return self.name.replace("_", "-")

    def each(self, jobs: Jobs, dataset: str = "") -> Iterator[Job]:
        """All jobs, one after another: those of a dataset where the stage has some of each."""
        if "dataset" in self.per and not self.applies(jobs.configs[dataset]):
            return
        study = jobs.study
        known: dict[str, Callable[[], list[str]]] = {
            "source": lambda: list(jobs.configs[dataset].captions),
            "shard": lambda: list(jobs.list_shards(dataset)),
            "run": lambda: [run for run in study.runs if study.dataset_of(run) == dataset],
            "task": lambda: list(study.evaluate),
            "table": lambda: list(study.tables),
            "figure": lambda: list(study.figures),
        }
        names = [name for name in self.per if name in known]
        evaluated = set(study.evaluations()) if "task" in names else set()
        for values in product(*(known[name]() for name in names)):
            chosen = dict(zip(names, values, strict=True))
            if "task" in names and (chosen["run"], chosen["task"]) not in evaluated:
                continue
            yield jobs.make(dataset=dataset if "dataset" in self.per else "", **chosen)
