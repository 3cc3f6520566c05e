"""Jobs of the stages: a config with the dataset, shard, caption source, run or task to work on."""

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
    """Makes the jobs of one config, and caches values that they share.

    Args:
        study: the whole config.
        list_shards: returns the names of all shards of a dataset; by default those written by its split stage.

    Attributes:
        configs: per dataset, the config reduced to that dataset.
        layouts: per dataset, the paths of its results.
    """

    def __init__(self, study: Config, list_shards: Callable[[str], Sequence[str]] | None = None) -> None:
        self.study = study
        self.configs = {name: study.of(name) for name in study.dataset_names}
        self.layouts = {name: Layout.of(study, name) for name in study.dataset_names}
        self.list_shards = list_shards or self._read_shards
        self._cache: dict[Any, Any] = {}

    def make(self, **wildcards: str) -> "Job":
        """The job of these wildcards; a job without a dataset works on the whole config."""
        return Job(self, **wildcards)

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """The result of `compute()`, computed once for all jobs and cached under `key`."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value

    def _read_shards(self, dataset: str) -> list[str]:
        path = self.layouts[dataset].shard_index
        if not path.exists():
            raise ConfigError(f"{path} does not exist yet; run `stm manifest` and `stm split` first")
        return self.once(("shards", dataset), lambda: read_shards(path))


@dataclass(frozen=True)
class Job:
    """A stage's work on one shard, run, ...; fields are named like the wildcards, and empty if the stage lacks one."""

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
        """The whole config."""
        return self.jobs.study

    @cached_property
    def config(self) -> Config:
        """The config reduced to the job's dataset."""
        return self.jobs.configs.get(self.dataset, self.study)

    @cached_property
    def layout(self) -> Layout:
        """Paths of the results of the job's dataset, or of the whole config."""
        return self.jobs.layouts.get(self.dataset) or Layout.of(self.study, self.dataset or None)

    def on(self, dataset: str | None) -> "Job":
        """The same job on another dataset; itself for None."""
        return replace(self, dataset=dataset) if dataset else self

    @property
    def slice(self) -> Path:
        """The table of the clips of the job's shard."""
        # Only the split stage knows which shards exist, so slices are not among its declared outputs: listing the
        # shards is what makes a job wait for it.
        self.jobs.list_shards(self.dataset)
        return self.layout.slice(self.shard)

    def shards(self, split: str | None = None) -> list[str]:
        """Names of the dataset's shards of one split, or of all splits."""
        return [shard for shard in self.jobs.list_shards(self.dataset) if split in (None, split_of(shard))]

    def packed(self, split: str | None = None) -> list[Path]:
        """Paths of the indexes of packed shards, of one split or of all; the tars are in the same folder.

        Raises:
            ConfigError: the dataset has no clips of that split.
        """
        shards = self.shards(split)
        if not shards:
            raise ConfigError(f"the dataset {self.dataset} has no clips of the split {split!r}")
        return [self.layout.shard(shard) for shard in shards]

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """The settings that a result depends on, from sections of the config given by dotted keys.

        Settings that change no byte of a result (deadlines, numbers of loading processes) are left out. Local models of
        the dataset's stages are reduced to their own names: their files are inputs, and their folder does not affect
        the result.

        Args:
            keys: `frames`, `frames.min_side`, ...; wildcards as in `captions.{source}` are those of the job; `*` is
                everything.
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
