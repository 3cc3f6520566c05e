"""Jobs of the stages: each combines a config with the dataset, shard, caption source, run or task to process."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf
from pathlib import Path
from typing import Any, TypeVar

from stm.config import Config, ConfigError, Section
from stm.config.study import STAGE_KEYS
from stm.layout import Layout
from stm.manifest import read_shards, split_of
from stm.pretrained.local_files import without_folders

T = TypeVar("T")

# Clips of each split that have guides in any case. The page shows up to 64 and chooses from eight times as many; what it shows
# must not decide what shards hold, because all that reads a shard is repeated when it changes.
SHOWN_CLIPS = 512


class Jobs:
    """Creates the jobs of one config, and caches the values that they share.

    Args:
        study: the whole config.
        list_shards: returns the names of all shards of a dataset; by default those written by its split stage.

    Attributes:
        configs: the config reduced to each dataset, by dataset name.
        layouts: the result paths of each dataset, by dataset name.
    """

    def __init__(self, study: Config, list_shards: Callable[[str], Sequence[str]] | None = None) -> None:
        self.study = study
        self.configs = {name: study.of(name) for name in study.dataset_names}
        self.layouts = {name: Layout.of(study, name) for name in study.dataset_names}
        self.list_shards = list_shards or self._read_shards
        self._cache: dict[Any, Any] = {}
        self._unread = {
            name: config.model_copy(update={"pack": config.pack.without_guides()})
            for name, config in self.configs.items()
        }
        self._guided = {name: _guided_splits(study, name) for name in study.dataset_names}

    def guided_shards(self, dataset: str, split: str) -> float:
        """Return how many of a split's first shards hold captions and guides; infinity: all. The others hold frames and labels.

        Of a split that nothing else reads, a few clips can be shown.
        """
        guided = self._guided[dataset]
        return inf if guided is None or split in guided else ceil(SHOWN_CLIPS / self.configs[dataset].shard_size)

    def config_of(self, dataset: str, guided: bool) -> Config:
        """Return the config reduced to a dataset, as it is for shards with or without guides."""
        return self.configs[dataset] if guided else self._unread[dataset]

    def datasets_behind(self, runs: Iterable[str]) -> list[str]:
        """Return the datasets that these runs, and those from which they are initialised, train on.

        Args:
            runs: names in `Config.runs`.
        """
        study, found = self.study, dict[str, None]()
        weights = {self.layouts[study.dataset_of(name)].weights(name): name for name in study.runs}
        waiting = list(runs)
        for name in waiting:
            run, own = study.runs[name], study.dataset_of(name)
            found |= {source or own: None for source, _ in (*run.video_sources, *run.image_sources)}
            before = weights.get(Path(run.init)) if run.init else None
            if before is not None and before not in waiting:
                waiting.append(before)
        return list(found)

    def make(self, **wildcards: str) -> "Job":
        """Return the job for these wildcards; a job without a dataset processes the whole config."""
        return Job(self, **wildcards)

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """Return the result of `compute()`, computed once for all jobs and cached under `key`."""
        if key not in self._cache:
            self._cache[key] = compute()
        value: T = self._cache[key]
        return value

    def _read_shards(self, dataset: str) -> list[str]:
        path = self.layouts[dataset].shard_index
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist yet; run `stm manifest` and `stm split` first, with the same --config"
            )
        return self.once(("shards", dataset), lambda: read_shards(path))


@dataclass(frozen=True)
class Job:
    """A stage's work on one shard, run, etc. Fields are named after the wildcards; unused ones are empty."""

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
    def guided(self) -> bool:
        """Whether the job's shard holds captions and guides; true for a job without a shard."""
        if not self.shard or self.dataset not in self.jobs.configs:
            return True
        split, _, number = self.shard.rpartition("-")
        return int(number) < self.jobs.guided_shards(self.dataset, split)

    @cached_property
    def config(self) -> Config:
        """The config reduced to the job's dataset; `pack` names none for a shard without guides."""
        known = self.dataset in self.jobs.configs
        return self.jobs.config_of(self.dataset, self.guided) if known else self.study

    @cached_property
    def layout(self) -> Layout:
        """Paths of the results of the job's dataset, or of the whole config."""
        return self.jobs.layouts.get(self.dataset) or Layout.of(self.study, self.dataset or None)

    def on(self, dataset: str | None) -> "Job":
        """Return the same job for a different dataset, or this job if `dataset` is None."""
        return replace(self, dataset=dataset) if dataset else self

    @property
    def slice(self) -> Path:
        """The table of clips in the job's shard."""
        # Only the split stage knows which shards exist, so it does not declare the slices as outputs. Listing the
        # shards makes a job wait for that stage.
        self.jobs.list_shards(self.dataset)
        return self.layout.slice(self.shard)

    def shards(self, split: str | None = None) -> list[str]:
        """Return the names of the dataset's shards in one split, or in all splits."""
        return [shard for shard in self.jobs.list_shards(self.dataset) if split in (None, split_of(shard))]

    def check_names(self) -> None:
        """Check that the config has the job's caption source, run and evaluation, and that the run trains on its dataset.

        Raises:
            ConfigError: it does not, as for a mistyped file name given to Snakemake.
        """
        study = self.study
        if self.source:
            _check_known("caption source", self.source, self.config.captions)
        if self.run:
            _check_known("run", self.run, study.runs)
            trained_on = study.dataset_of(self.run)
            if trained_on != self.dataset:
                place = self.jobs.layouts[trained_on].pretrain(self.run).parents[1]
                raise ConfigError(
                    f"the run {self.run} trains on {trained_on}, not {self.dataset}; its files are under {place}"
                )
        if self.task:
            _check_known("evaluation", self.task, study.evaluate)
            if (self.run, self.task) not in study.evaluations():
                raise ConfigError(f"the evaluation {self.task} does not apply to the run {self.run}")

    def packed(self, split: str | None = None) -> list[Path]:
        """Return the paths of packed shards' indexes, for one split or all splits; the tars are in the same folder.

        Raises:
            ConfigError: the dataset has no clips in that split.
        """
        shards = self.shards(split)
        if not shards:
            raise ConfigError(f"the dataset {self.dataset} has no clips of the split {split!r}")
        return [self.layout.shard(shard) for shard in shards]

    def settings(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the settings that a result depends on, selected from the config by dotted keys.

        Settings that do not affect the result (deadlines, number of loader processes) are omitted. Local models of the
        dataset's stages are reduced to their names, because their files are inputs and their folder does not affect
        the result.

        Args:
            keys: for example `frames` or `frames.min_side`; wildcards, as in `captions.{source}`, are replaced by the
                job's values; `*` selects the whole config.
        """
        return {key: self._setting(key) for key in keys}

    def value(self, key: str) -> Any:
        """Return a section or a value of the config by its dotted key, with the wildcards replaced; `*` is the config."""
        if key == "*":
            return self.study
        first, *rest = key.format_map(vars(self)).split(".")
        found: Any = getattr(self.config if _is_of_dataset(first) else self.study, first)
        for name in rest:
            found = found[name] if isinstance(found, Mapping) else getattr(found, name)
        return found

    def _setting(self, key: str) -> Any:
        value = self.value(key)
        if not isinstance(value, Section):
            return value
        return without_folders(value.fingerprint()) if _is_of_dataset(key.split(".")[0]) else value.fingerprint()


def _guided_splits(study: Config, dataset: str) -> frozenset[str] | None:
    """Return the splits of a dataset of which something reads captions or guides; None: any, for no run says more.

    Runs read the splits that they train on, some evaluations the captions of those that they test on, and measurements of
    masks theirs.
    """
    if not study.pretrain:
        return None
    corpus = study.of(dataset)
    readers = set(corpus.pack.more_splits)
    for run in study.pretrain.values():
        readers |= {split for name, split in (*run.video_sources, *run.image_sources) if name in (dataset, None)}
    for name, task in study.evaluate.items():
        used = {study.dataset_of(run, name) for run in study.runs_of(name)}
        if dataset in used and (task.needs == "language" or task.packed_vectors is not None):
            readers |= {*task.splits.values(), *task.splits_for(False).values()}
    return frozenset(
        readers | {part.split for part in (corpus.mask_quality, corpus.crop_comparison) if part is not None}
    )


def _is_of_dataset(key: str) -> bool:
    """Whether a top-level key of the config can differ between datasets."""
    return key in STAGE_KEYS or key == "dataset"


def _check_known(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ConfigError(f"the config has no {what} {name!r}; it has: {', '.join(known) or 'none'}")
