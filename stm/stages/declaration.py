"""The declaration of a stage: inputs, outputs, resources, the settings that affect its results, and its function.

The workflow's rules, `stm <stage>`, the plan and the report all read the declarations, so nothing is declared twice.
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
    """Runs a job. Heavy modules are imported inside it, because `stm --help` and dry runs load all declarations."""

    def __call__(self, job: Job, inputs: Files, outputs: Files, processes: int) -> str | None:
        """Read `inputs` and write `outputs`; return a human-readable result for the command line, or None."""


class Requests(Protocol):
    """Computes what jobs request on a cluster; None where the declaration holds. See `stm.plan.requests`."""

    def threads(self, stage: "Stage", job: Job) -> int | None:
        """Return the cores of a job on each of its nodes."""

    def memory(self, stage: "Stage", job: Job, threads: int) -> int | None:
        """Return the megabytes of a job's first attempt on each of its nodes."""

    def minutes(self, stage: "Stage", job: Job, threads: int) -> int | None:
        """Return the time of a job's first attempt."""


def _none(job: Job) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """The declaration of one stage."""

    name: str  # of the rule; the command replaces underscores with hyphens
    title: str  # one line, human-readable
    per: tuple[str, ...]  # the wildcards that identify a job, outermost first
    outputs: Callable[[Job], Files]
    run: Run
    inputs: Callable[[Job], Files] = _none
    # Model ids by input name. The input lists the files of local models, so that changed weights cause a rerun.
    models: Callable[[Job], Mapping[str, Sequence[str | None]]] = _none
    # The runs that a job trains or whose weights it reads, if it lists shards: it waits for their datasets' shards, too.
    runs: Callable[[Job], Sequence[str]] = lambda job: ()
    # What the results depend on: config keys (see `Job.settings`), and other facts, such as a folder's state.
    settings: tuple[str, ...] = ()
    facts: Callable[[Job], dict[str, Any]] = _none
    # By Snakemake's resource names. Memory is for the first attempt; retries request more, to avoid being killed again. On a
    # cluster, `Requests` replaces memory and time where it has numbers.
    resources: Mapping[str, Resource] = field(default_factory=dict)
    threads: int | Callable[[Job, int], int] = 1  # or computed from the job and this machine's core count
    processes: bool = False  # whether threads are worker processes, set by `--processes` on the command line
    shared: bool = False  # whether other projects may reuse the results from a cache
    receipt: str | None = None  # name of the output that contains the receipt
    # Where the receipt contains settings: the config key (see `Job.settings`), or `facts.` and the name of a fact, by
    # the receipt's dotted entry. `stm.stages.provenance` compares them before a job reads the file.
    records: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)  # values of settings that a receipt omits
    # Inputs whose hashes are in the receipt, by its entry: shard indexes, or one file.
    hashed: Callable[[Job], Files] = _none
    # Jobs whose receipts are in this stage's receipt, by entry of its `parts`: their files may be removed since.
    parts: Callable[[Job], "Mapping[str, tuple[Stage, Job]]"] = _none
    # Whether the stage can run with some inputs missing, in which case the command line does not require them all.
    partial: bool = False
    # Whether the stage applies to a dataset, and the message if it applies to no dataset.
    applies: Callable[[Config], bool] = lambda config: True
    otherwise: str = ""
    # The cost of all jobs of a dataset (and caption source); None if the config needs none of them.
    cost: Callable[[Job, Workload], Cost | None] | None = None
    check: Callable[[Job], None] | None = None  # raises, before any job runs, if the config or dataset is invalid

    @property
    def command(self) -> str:
        """The name of the `stm` subcommand."""
        return self.name.replace("_", "-")

    def each(self, jobs: Jobs, dataset: str = "") -> Iterator[Job]:
        """Yield all jobs of the stage, limited to `dataset` if the stage has separate jobs per dataset."""
        if "dataset" in self.per and not self.applies(jobs.configs[dataset]):
            return
        study = jobs.study
        values_of: dict[str, Callable[[], list[str]]] = {
            "source": lambda: list(jobs.configs[dataset].captions),
            "shard": lambda: list(jobs.list_shards(dataset)),
            "run": lambda: [run for run in study.runs if study.dataset_of(run) == dataset],
            "task": lambda: list(study.evaluate),
            "table": lambda: list(study.tables),
            "figure": lambda: list(study.figures),
        }
        names = [name for name in self.per if name in values_of]
        evaluated = set(study.evaluations()) if "task" in names else set()
        for values in product(*(values_of[name]() for name in names)):
            wildcards = dict(zip(names, values, strict=True))
            if "task" in names and (wildcards["run"], wildcards["task"]) not in evaluated:
                continue
            yield jobs.make(dataset=dataset if "dataset" in self.per else "", **wildcards)
