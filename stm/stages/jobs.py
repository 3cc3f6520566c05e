"""One piece of a stage's work: a config, and the dataset, shard, caption source, run or task that it is about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from stm.config import Config, ConfigError, Section
from stm.config.study import STAGE_KEYS
from stm.layout import Layout
from stm.manifest import read_shards, split_of
from stm.pretrained.local_files import without_folders

T = TypeVar("T")


class Jobs:
    """Makes the jobs of one config, and remembers what all of them ask for.

    Args:
        study: the whole config.
        list_shards: names of all shards of a dataset; by default those that its split stage has written.

    Attributes:
        configs: of each dataset, as if the config spoke of no other.
        layouts: where each dataset's results lie.
    """

    def __init__(self, study: Config, list_shards: Callable[[str], Sequence[str]] | None = None) -> None:
        self.study = study
        self.configs = {name: study.of(name) for name in study.dataset_names}
        self.layouts = {name: Layout.of(study, name) for name in study.dataset_names}
        self.list_shards = list_shards or self._read_shards
        self._found: dict[Any, Any] = {}

    def make(self, **wildcards: str) -> "Job":
        """The job of these wildcards; a job that has no dataset is about the whole config."""
        return Job(self, **wildcards)

    def once(self, what: Any, find: Callable[[], T]) -> T:
        """`find()`, asked for once by all jobs: `what` tells it from everything else."""
        if what not in self._found:
            self._found[what] = find()
        found: T = self._found[what]
        return found

    def _read_shards(self, dataset: str) -> list[str]:
        path = self.layouts[dataset].shard_index
        if not path.exists():
            raise ConfigError(f"{path} does not exist yet; run `stm manifest` and `stm split` first")
        return self.once(("shards", dataset), lambda: read_shards(path))


@dataclass(frozen=True)
class Job:
    """A stage's work on one shard, run, ...; the names are those of the wildcards, empty where the stage has none."""

    jobs: Jobs
    dataset: str = ""
    source: str = ""
    split: str = ""
    shard: str = ""
    run: str = ""
    task: str = ""
    table: str = ""
    figure: str = ""

    @property
    def study(self) -> Config:
        return self.jobs.study

    @cached_property
    def config(self) -> Config:
        """The config of the job's dataset alone."""
        return self.jobs.configs.get(self.dataset, self.study)

    @cached_property
    def layout(self) -> Layout:
        """The folder of the job's dataset, or what is shown of all of them."""
        return self.jobs.layouts.get(self.dataset) or Layout.of(self.study, self.dataset or None)

    def on(self, dataset: str | None) -> "Job":
        """The same on another dataset; itself for None."""
        return replace(self, dataset=dataset) if dataset else self

    @property
    def slice(self) -> Path:
        """The clips of the job's shard.

        No output of the split stage by name, since only that stage knows which there are: asking for the shards waits for it.
        """
        self.jobs.list_shards(self.dataset)
        return self.layout.slice(self.shard)

    def shards(self, split: str | None = None) -> list[str]:
        """The dataset's shards of a split, or of all splits."""
        return [shard for shard in self.jobs.list_shards(self.dataset) if split in (None, split_of(shard))]

    def packed(self, split: str | None = None) -> list[Path]:
        """Indexes of a split's packed shards; the tars lie beside them.

        Raises:
            ConfigError: the dataset has no clips of that split.
        """
        shards = self.shards(split)
        if not shards:
            raise ConfigError(f"the dataset {self.dataset} has no clips of the split {split!r}")
        return [self.layout.shard(shard) for shard in shards]

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """What decides in sections of the config, by their dotted keys; `captions.{source}` is that of the job, `*` is all.

        Keys that change no byte of a result (deadlines, loading processes) are left out. Local models of the dataset's stages
        go by their own names: their files are inputs, and where they lie makes no other result.
        """
        return {key: self._setting(key.format_map(vars(self))) for key in keys}

    def _setting(self, key: str) -> Any:
        if key == "*":
            return self.study.fingerprint()
        first, *rest = key.split(".")
        of_dataset = first in STAGE_KEYS or first == "dataset"
        section: Any = getattr(self.config if of_dataset else self.study, first)
        for name in rest:
            section = section[name] if isinstance(section, Mapping) else getattr(section, name)
        if not isinstance(section, Section):
            return section
        return without_folders(section.fingerprint()) if of_dataset else section.fingerprint()
