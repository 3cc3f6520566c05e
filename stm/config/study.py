"""The whole config: one or more datasets, pretraining runs and evaluations on them, tables and figures."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeGuard, get_args

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from stm.config.base import Name, WorkflowPlace, field, merge
from stm.config.data import Dataset
from stm.config.evaluation import CropComparison
from stm.config.language import LanguageRun
from stm.config.language_tasks import EvaluationTask
from stm.config.report import ExpectedCoverage, ExpectedScore, FigureSpec, Prices, Report, TableSpec
from stm.config.stages import Stages
from stm.config.strategies import find_strategy
from stm.config.training import CaptionChoice, Mask, PretrainRun, Run

# The section for each value of `method`; errors.py recognises union tags by these section names.
_SECTIONS = {
    method: section.__name__
    for section in (PretrainRun, LanguageRun)
    for method in get_args(section.model_fields["method"].annotation)
}


def _kind_of(run: Any) -> str:
    """Return the section of a run: `method` defaults to `mae`; the section itself rejects an unknown method."""
    method = run.get("method", "mae") if isinstance(run, Mapping) else getattr(run, "method", "mae")
    return _SECTIONS.get(method, "PretrainRun") if isinstance(method, str) else "PretrainRun"


AnyRun = Annotated[
    Annotated[PretrainRun, Tag("PretrainRun")] | Annotated[LanguageRun, Tag("LanguageRun")], Discriminator(_kind_of)
]


class Corpus(Stages):
    """One dataset of a config with several, with its settings of the offline stages."""

    dataset: Dataset


STAGE_KEYS = tuple(Stages.model_fields)


class Config(Stages):
    """A whole config: one file of `config/`."""

    cache_neutral = frozenset({"trackers"})
    name: Name = field(..., "results are written to {results}/{name}")
    results: WorkflowPlace = field("results", "folder for all outputs")
    seed: int = field(0, "seed of all random numbers", ge=0, lt=2**31)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = field(
        (), "repeat each pretraining run and its evaluations with each of these seeds"
    )
    dataset: Dataset | None = field(None, "the dataset, if there is only one")
    datasets: dict[Name, Corpus] = field(
        {}, "several datasets by name; top-level keys of the offline stages are defaults for all of them"
    )
    pretrain: dict[Name, AnyRun] = field({}, "pretraining runs by name")
    evaluate: dict[Name, EvaluationTask] = field({}, "evaluations by name; each is done for all runs that it lists")
    tables: dict[Name, TableSpec] = field({}, "tables by name; each is a target of the workflow")
    figures: dict[Name, FigureSpec] = field({}, "figures by name; each is a target of the workflow")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = field(
        ("tensorboard",), "where losses are shown: `tensorboard`, `wandb`, `mlflow`; see docs/config.md"
    )
    report: Report = Report()
    prices: Prices = Prices()

    @model_validator(mode="before")
    @classmethod
    def _share_stages(cls, values: Any) -> Any:
        """Merge the keys of each dataset over the shared defaults, which are top-level keys next to `datasets`.

        A caption source of a different kind replaces the shared one, because different kinds have different keys; likewise, a
        dataset's `frames.count` replaces a shared `frames.every`, and the reverse.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("datasets"), Mapping) or not values["datasets"]:
            return values
        shared = {key: value for key, value in values.items() if key in STAGE_KEYS}
        datasets = {
            name: merge(_without_replaced(shared, own), own, kind="kind") if isinstance(own, Mapping) else own
            for name, own in values["datasets"].items()
        }
        return {**values, "datasets": datasets}

    @model_validator(mode="after")
    def _check_consistency(self) -> "Config":
        if (self.dataset is None) == (not self.datasets):
            raise ValueError("give either `dataset` or `datasets`")
        if self.name in self.datasets:
            raise ValueError(f"name {self.name!r} is also the name of a dataset; both would write to the same folder")
        for where, stages in self._corpora().items():
            if stages.mask_quality is not None and stages.dataset.source != "moving-shapes":
                raise ValueError(f"{where}mask_quality needs a dataset with true boxes, which only moving-shapes has")
            if stages.crop_agreement is not None and not stages.pack.sources:
                raise ValueError(
                    f"{where}crop_agreement compares the similarity maps of the first packed caption source, but pack.captions "
                    "names none"
                )
            self._check_shared_frames(where, stages)
        targets = {*self.tables, *self.figures}
        reserved = {
            "expectations",
            "results",
            "per_class",
            "mask_quality",
            "quarantine",
            "loss_curves",
            "masks",
        } & targets
        reserved |= {name for name in targets if name.startswith(("clip_", "masks_"))}  # per clip or dataset
        if reserved:
            raise ValueError(f"{min(reserved)!r} is one of the report's own names; rename the table or figure")
        if both := sorted({*self.tables} & {*self.figures}):
            raise ValueError(
                f"{both[0]!r} is the name of a table and of a figure; names of targets must be unique, rename one"
            )
        self._check_instances()
        for name, run in self.pretrain.items():
            self._check_run(f"pretrain.{name}", run)
        for name, task in self.evaluate.items():
            self._check_task(name, task)
        for what, specs in (("tables", self.tables), ("figures", self.figures)):
            for name, spec in specs.items():
                self._check_cells(f"{what}.{name}", spec)
        for name, figure in self.figures.items():
            others = [task for task in figure.tasks if self.evaluate[task].task != "mask_persistence"]
            if figure.kind == "persistence" and others:
                raise ValueError(f"figures.{name} shows how long objects stay kept, which {others[0]} does not measure")
        for number, expected in enumerate(self.report.expect):
            if isinstance(expected, ExpectedScore):
                self._check_expected_score(f"report.expect.{number}", expected)
            else:
                self._check_expected_coverage(f"report.expect.{number}", expected)
        return self

    def _check_shared_frames(self, where: str, corpus: Any) -> None:
        """Check that a dataset would store the same frames as the one from which it takes them."""
        name = corpus.frames.from_dataset
        if name is None:
            return
        key = f"{where}frames.from_dataset"
        if not self.datasets:
            raise ValueError(f"{key} is {name!r}, but there is only one dataset")
        self._check_dataset(f"{where}frames.from_dataset", name, needed=True)
        lender = self.datasets[name]
        if lender.frames.from_dataset is not None:
            raise ValueError(
                f"{key} is {name!r}, which takes its own frames from {lender.frames.from_dataset!r}: name that one"
            )
        roots = [getattr(one.dataset, "root", None) for one in (corpus, lender)]
        if roots[0] is None or roots[0] != roots[1]:
            raise ValueError(f"{key} is {name!r}, but their videos are not in the same folder (`dataset.root`)")
        own, other = corpus.frames.fingerprint(), lender.frames.fingerprint()
        own["bad_input.policy"], other["bad_input.policy"] = corpus.bad_input.policy, lender.bad_input.policy
        for setting in own | other:
            if own.get(setting) != other.get(setting):
                raise ValueError(
                    f"{key} is {name!r}, whose {setting.removeprefix('bad_input.')} of frames is {other.get(setting)}, not "
                    f"{own.get(setting)}: frames can be shared only if they are stored with the same settings"
                )

    def _corpora(self) -> dict[str, Any]:
        return {f"datasets.{name}.": corpus for name, corpus in self.datasets.items()} or {"": self}

    def _check_dataset(self, where: str, name: str | None, needed: bool) -> None:
        if self.datasets and (name is not None or needed) and name not in self.datasets:
            raise ValueError(f"{where}.dataset is {name!r}; datasets has: {', '.join(self.datasets)}")
        if not self.datasets and name not in (None, self.name):
            raise ValueError(f"{where}.dataset is {name!r}, but there is only one dataset")

    def _check_instances(self) -> None:
        """Check that no two runs, or seeds of a run, would write to the same folder."""
        owners: dict[str, str] = {}
        for name in self.pretrain:
            for instance in self.instances(name):
                other = owners.setdefault(instance, name)
                if other != name:
                    raise ValueError(
                        f"pretrain.{other} and pretrain.{name}, with their seeds, both result in the run {instance!r}"
                    )
            if len(set(self.instances(name))) < len(self.instances(name)):
                raise ValueError(f"pretrain.{name} lists a seed twice")

    def _check_run(self, where: str, run: Run) -> None:
        """Check that each dataset of a run, including image datasets, provides everything that the run reads."""
        self._check_dataset(where, run.dataset, needed=True)
        for key, names in run.further_datasets.items():
            if names and not self.datasets:
                raise ValueError(f"{where}.{key} names {names[0]!r}, but there is only one dataset")
            for other in names:
                self._check_dataset(f"{where}.{key}", other, needed=True)
        for medium in run.media:
            for name, _ in medium.sources:
                corpus, suffix = (self.datasets[name], f" of {name}") if self.datasets and name else (self, "")
                self._check_mask(where, medium.mask, corpus, run.computed_guides)
                if run.has_text and not corpus.pack.sources:
                    raise ValueError(f"{where} has `language`, but pack.captions{suffix} names no source")
                if run.text_vectors_for is not None and not corpus.pack.text:
                    raise ValueError(f"{where} {run.text_vectors_for}, but pack.text{suffix} is not set")
                self._check_captions(where, run.captions, corpus)
        for name, _ in run.video_sources:
            self._check_sampling(where, run.sampling, name)

    def _check_sampling(self, where: str, sampling: str, dataset: str | None) -> None:
        corpus, suffix = (self.datasets[dataset], f" of {dataset}") if self.datasets and dataset else (self, "")
        if corpus.frames.count is not None and sampling == "dense":
            raise ValueError(
                f"{where} samples frames `stride` apart (`sampling: dense`), and frames.count{suffix} stores "
                f"{corpus.frames.count} frames spread over the clip, at another distance in each: use `sampling: tsn`, "
                "`sparse` or `intervals`, or frames.every"
            )

    def _check_mask(self, where: str, mask: Mask, corpus: Stages, computed: frozenset[str]) -> None:
        available = corpus.packed_guides | computed
        missing = [guide for guide in find_strategy(mask.strategy).needs if guide not in available]
        if missing == ["attention"]:
            raise ValueError(f"{where} masks by a teacher's attention, but has no `teacher`")
        if missing == ["features"]:
            raise ValueError(
                f"{where} masks by a teacher's features, which only the methods umt, stm and clusterstm have"
            )
        if missing == ["spatiotemporal"]:
            raise ValueError(f"{where}: the mask spatiotemporal is learned by the method stm alone")
        if missing:
            raise ValueError(f"{where} masks by {missing[0]}, but `pack` does not include the {missing[0]} maps")

    def _check_captions(self, where: str, captions: CaptionChoice, corpus: Stages) -> None:
        unknown = [source for source in captions.sources or () if source not in corpus.pack.sources]
        if unknown:
            raise ValueError(
                f"{where}.captions.sources names {unknown[0]!r}; packed sources: {', '.join(corpus.pack.sources) or 'none'}"
            )

    def _check_task(self, name: str, task: EvaluationTask) -> None:
        self._check_dataset(f"evaluate.{name}", task.dataset, needed=False)
        unknown = [run for run in task.runs or () if run not in self.pretrain]
        if unknown:
            raise ValueError(f"evaluate.{name}.runs names {unknown[0]!r}; pretrain has: {', '.join(self.pretrain)}")
        if self.pretrain and not self.runs_of(name):
            raise ValueError(
                f"evaluate.{name} needs runs with `{task.needs}`, and no run of `pretrain` has it; remove the evaluation, or "
                "add such a run"
            )
        without = [run for run in task.runs or () if not task.suits(self.pretrain[run])]
        if without:
            raise ValueError(f"evaluate.{name} needs runs with `{task.needs}`; {without[0]} has none")
        unreleased = [run for run in self.runs_of(name) if self.pretrain[run].release is None]
        if task.fine_tunes and not task.trains and unreleased:
            raise ValueError(
                f"evaluate.{name}.optimisation.epochs is 0, which tests the fine-tuned weights of a `release`, and "
                f"pretrain.{unreleased[0]} has none: list only runs that have (`runs`), or leave out `optimisation` for zero-shot"
            )
        self._check_boxes(name, task)
        if task.packed_vectors is not None:
            self._check_queries(name, task, task.packed_vectors)
        for settings in (self.pretrain[run] for run in self.runs_of(name)):
            self._check_sampling(
                f"evaluate.{name}", task.sampling or settings.sampling, self._dataset_of(settings, task)
            )

    def _check_boxes(self, name: str, task: EvaluationTask) -> None:
        for run in (self.pretrain[run] for run in self.runs_of(name) if task.reads_boxes):
            dataset = self._dataset_of(run, task)
            if getattr(self.of(dataset).dataset, "source", None) != "moving-shapes":
                raise ValueError(
                    f"evaluate.{name} needs a dataset with true boxes, which only moving-shapes has; {dataset} is another: name "
                    "one as its `dataset`, or leave the runs out (`runs`)"
                )
            frames = getattr(task, "frames", None) or run.frames
            if frames % run.tubelet or frames < 2 * run.tubelet:
                raise ValueError(
                    f"evaluate.{name} compares slots of {run.tubelet} frames: frames {frames} must be a multiple of it, and at "
                    "least two of them"
                )

    def _check_queries(self, name: str, task: EvaluationTask, queries: CaptionChoice) -> None:
        """Check, before days of pretraining, that query vectors are packed for each dataset of a retrieval task."""
        for dataset in sorted({self._dataset_of(self.pretrain[run], task) for run in self.runs_of(name)}):
            corpus, where = (self.datasets[dataset], f" of {dataset}") if self.datasets else (self, "")
            if not corpus.pack.text:
                raise ValueError(f"evaluate.{name} uses captions{where} as queries, but pack.text{where} is not set")
            for source in queries.sources or ():
                if source not in corpus.pack.sources:
                    known = ", ".join(corpus.pack.sources)
                    raise ValueError(f"evaluate.{name}.source is {source!r}; packed{where} are: {known}")

    def _check_cells(self, where: str, spec: TableSpec | FigureSpec) -> None:
        runs = set(spec.runs.values()) if isinstance(spec, FigureSpec) else {run for run, _ in spec.cells()}
        if unknown := sorted(runs - set(self.pretrain)):
            raise ValueError(f"{where} names the run {unknown[0]!r}; pretrain has: {', '.join(self.pretrain)}")
        if unknown := sorted({task for _, task in spec.cells()} - set(self.evaluate)):
            raise ValueError(f"{where} names the evaluation {unknown[0]!r}; evaluate has: {', '.join(self.evaluate)}")
        if missing := sorted(cell for cell in spec.cells() if cell[0] not in self.runs_of(cell[1])):
            raise ValueError(
                f"{where} needs {missing[0][1]} of {missing[0][0]}, but evaluate.{missing[0][1]} does not include that run"
            )

    def _check_expected_score(self, where: str, expected: ExpectedScore) -> None:
        task = expected.evaluation
        if task not in self.evaluate:
            raise ValueError(
                f"{where} names the evaluation {task!r}; evaluate has: {', '.join(self.evaluate) or 'none'}"
            )
        bound = expected.above if expected.below is None else expected.below
        for run in (expected.run, bound):
            if isinstance(run, str) and run not in self.runs_of(task) and (run != "chance" or run == expected.run):
                raise ValueError(
                    f"{where} names the run {run!r}; evaluate.{task} includes: {', '.join(self.runs_of(task))}"
                    + (", and `chance` is its chance level" if run == bound else "")
                )

    def _check_expected_coverage(self, where: str, expected: ExpectedCoverage) -> None:
        measured = [name for name in self.dataset_names if self.of(name).mask_quality is not None]
        if not measured:
            raise ValueError(f"{where} is about masks, but there is no section mask_quality")
        if expected.dataset is None and len(measured) > 1:
            raise ValueError(f"{where} needs a `dataset`: {', '.join(measured)}")
        if expected.dataset not in (None, *measured):
            raise ValueError(
                f"{where}.dataset is {expected.dataset!r}; mask quality is measured on: {', '.join(measured)}"
            )
        corpus = self.of(expected.dataset or measured[0])
        if expected.source not in (None, *corpus.captions):
            raise ValueError(f"{where}.source is {expected.source!r}; captions has: {', '.join(corpus.captions)}")
        quality = corpus.mask_quality
        assert quality is not None
        if expected.ratio not in (None, quality.text_ratio, quality.motion_ratio):
            raise ValueError(
                f"{where}.ratio is {expected.ratio:g}; mask quality is measured at {quality.text_ratio:g} and "
                f"{quality.motion_ratio:g}"
            )

    # -------------------------------------------------------------------------------------- derived values

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The names of all datasets; the results of a dataset are stored in `{results}/{name}`."""
        return tuple(self.datasets) or (self.name,)

    def of(self, dataset: str) -> "Config":
        """Return a config with only the given dataset; the config itself if it has only one."""
        if not self.datasets:
            return self
        corpus = self.datasets[dataset]
        update: dict[str, Any] = {key: getattr(corpus, key) for key in (*STAGE_KEYS, "dataset")}
        runs = {name: run for name, run in self.pretrain.items() if run.dataset == dataset}
        update |= {"name": dataset, "datasets": {}, "pretrain": runs, "evaluate": {}, "tables": {}, "figures": {}}
        return self.model_copy(update=update)

    @property
    def crop_comparison(self) -> CropComparison | None:
        """How cached maps are compared with maps of the crop, in a config of one dataset; None if they are not.

        See `CropComparison` for the defaults.
        """
        quality, given = self.mask_quality, self.crop_agreement
        if not self.pack.sources:
            return None
        if given is None and quality is not None:
            shared = ("split", "crops", "image_size", "patch_size")
            given = CropComparison(ratio=quality.text_ratio, **{name: getattr(quality, name) for name in shared})
        for run in self.pretrain.values():
            if given is None and "similarity" in find_strategy(run.mask.strategy).needs:
                given = CropComparison(
                    split=run.split,
                    ratio=run.mask.ratio,
                    crop=run.augmentation.crop,
                    scale=run.augmentation.scale,
                    image_size=run.image_size,
                    patch_size=run.patch_size,
                )
        return given if given is not None and given.crops > 0 else None

    def dataset_of(self, run: str, task: str | None = None) -> str:
        """Return the dataset that a run trains on, or that an evaluation of the run uses.

        Args:
            run: a name in `pretrain` or in `runs`.
            task: a name in `evaluate`; None: the dataset of pretraining.
        """
        settings = (self.pretrain | self.runs)[run]
        return self._dataset_of(settings, None if task is None else self.evaluate[task])

    def _dataset_of(self, run: Run, task: EvaluationTask | None) -> str:
        return (task.dataset if task is not None else None) or run.dataset or self.name

    def _seeds_of(self, run: Run) -> tuple[int | None, ...]:
        """Return one seed per repetition of a run; None for a single run, with the run's `seed` or the config's."""
        # A run that sets `seed` is not repeated, even if the config sets `seeds`.
        return run.seeds or (() if run.seed is not None else self.seeds) or (None,)

    @property
    def runs(self) -> dict[str, AnyRun]:
        """The pretraining runs, one per seed: `tube`, or `tube-seed0` and `tube-seed1` if it is repeated."""
        runs: dict[str, AnyRun] = {}
        for name, run in self.pretrain.items():
            for seed in self._seeds_of(run):
                runs[instance_name(name, seed)] = (
                    run if seed is None else run.model_copy(update={"seed": seed, "seeds": ()})
                )
        return runs

    def instances(self, run: str) -> list[str]:
        """Return the names in `runs` that a run of `pretrain` expands to, one per seed."""
        return [instance_name(run, seed) for seed in self._seeds_of(self.pretrain[run])]

    def runs_of(self, task: str) -> list[str]:
        """Return the names, in `pretrain`, of the runs that a task evaluates."""
        settings = self.evaluate[task]
        if settings.runs is not None:
            return list(settings.runs)
        return [name for name, run in self.pretrain.items() if settings.suits(run)]

    def evaluations(self) -> list[tuple[str, str]]:
        """Return all (name in `runs`, evaluation) pairs, in config order."""
        return [
            (instance, task) for task in self.evaluate for run in self.runs_of(task) for instance in self.instances(run)
        ]


def parse_run(values: Mapping[str, Any]) -> AnyRun:
    """Return a run parsed from plain values, as produced by `model_dump` or stored in a `config.json`.

    Raises:
        ValueError: the values are invalid.
    """
    run: AnyRun = TypeAdapter(AnyRun).validate_python(values)
    return run


def is_language_run(run: Run) -> TypeGuard[LanguageRun]:
    """Whether the run has a text side; a type guard, because only a LanguageRun can have one."""
    return run.has_text


def instance_name(run: str, seed: int | None) -> str:
    """Return the name of a run with a seed: `tube`, 0 -> `tube-seed0`."""
    return run if seed is None else f"{run}-seed{seed}"


def _without_replaced(shared: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Remove `frames.every` from the defaults of a dataset that sets `frames.count`, and the reverse."""
    frames, mine = shared.get("frames"), own.get("frames")
    if not isinstance(frames, Mapping) or not isinstance(mine, Mapping):
        return shared
    replaced = {"every": "count", "count": "every"}
    kept = {key: value for key, value in frames.items() if key in mine or mine.get(replaced.get(key, "")) is None}
    return {**shared, "frames": kept}
