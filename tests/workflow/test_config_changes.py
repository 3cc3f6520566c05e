"""Every key of the config, changed one at a time: the jobs whose bytes it affects are rerun, and no others.

`RERUN` is written by hand and lists the affected jobs per key. It is independent of the rules' `params` and of the keys that
the sections of the config declare as cache-neutral, which are tested against it. A key that `RERUN` lacks fails its test.
"""

import json
import os
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import ValidationError
from recorded_runs import find_jobs, finish, touch
from small_workflow import snakemake

from stm.cli.common import load
from stm.config import Config, Corpus, EvaluationTask, Section, merge, parse_config
from stm.datasets.actions import BENCHMARKS

CLIP = "local-dir:models/one/clip"
OPTIMISATION = {"epochs": 2, "warmup_epochs": 1, "batch_size": 8}
RUN: dict[str, Any] = {"model": "tiny", "image_size": 32, "patch_size": 8, "frames": 4, "optimisation": OPTIMISATION}
SHAPES: dict[str, Any] = {"source": "moving-shapes", "clips": {"train": 16, "test": 16}}

# Every offline stage, on one dataset. Of this config the keys of `Corpus` and `dataset` are tested.
OFFLINE: dict[str, Any] = {
    "name": "small",
    "dataset": SHAPES,
    "captions": {
        "manual": {"kind": "human"},
        "label": {"kind": "label"},
        "blip2": {"kind": "blip2", "model": "models/one/blip2"},
        "llm": {"kind": "llm", "model": "models/one/llm"},
        "vlm": {"kind": "vlm", "model": "models/one/vlm"},
    },
    "similarity": {"model": CLIP, "keep_embeddings": True},
    "text": {"model": CLIP},
    "flow": {"backend": "raft", "weights": "models/one/raft.pth"},
    # Not in alphabetical order: captions, maps and text embeddings are packed in the order given here.
    "pack": {"captions": ["manual", "label"], "text": True, "flow": True},
    "mask_quality": {},
    "crop_agreement": {},  # otherwise derived; see tests/evaluation/masks/test_masks_stage.py
    "pretrain": {"tube": RUN},
    "evaluate": {"linear": {"task": "linear"}},
}
# Runs and evaluations without a text encoder, and tables and figures.
PACKED: dict[str, Any] = {
    "captions": {"manual": {"kind": "human"}},
    "similarity": {"model": CLIP},
    "text": {"model": "local-dir:models/one/text"},
    "pack": {"captions": "manual", "text": True, "motion": False},
}
TEACHER = {"model": "local-dir:models/one/teacher"}
TGM: dict[str, Any] = {**RUN, "contrast": {}, "teacher": TEACHER, "init": "models/one/start.pth"}
MASKING: dict[str, Any] = {
    **PACKED,
    "name": "paper",
    "datasets": {"clips": {"dataset": SHAPES, "mask_quality": {}}, "others": {"dataset": {**SHAPES, "label": "color"}}},
    "pretrain": {
        "tgm": {**TGM, "dataset": "clips"},
        "tube": {**RUN, "dataset": "clips", "resize_on": "device"},
        "published": {**RUN, "dataset": "clips", "release": "models/one/start.pth"},
    },
    "evaluate": {
        "linear": {"task": "linear"},
        "finetune": {"task": "finetune", "optimisation": OPTIMISATION},
        "released": {"task": "finetune", "runs": ["published"], "optimisation": {"epochs": 0}},
        "zero": {"task": "zero_shot"},
        "retrieval": {"task": "retrieval"},
        "neighbours": {"task": "video_retrieval", "views": 2},
        "kept": {"task": "mask_persistence"},
    },
    "tables": {
        "numbers": {
            "title": "Numbers",
            "columns": [{"title": "Linear", "task": "linear"}, {"title": "Tuned", "task": "finetune"}],
            "rows": [{"label": "TGM", "runs": ["tgm", "tgm"]}],
        }
    },
    "figures": {
        "bars": {"title": "Bars", "kind": "bars", "runs": {"TGM": "tgm"}, "tasks": ["linear"]},
        "clips": {"title": "Clips", "kind": "clips", "runs": {"TGM": "tgm"}},
        "losses": {"title": "Losses", "kind": "losses", "runs": {"TGM": "tgm"}},
    },
    "report": {
        "expect": [
            {"says": "It learns.", "run": "tgm", "evaluation": "linear", "above": "chance"},
            {"says": "It fails.", "run": "tgm", "evaluation": "linear", "below": 0.9},
            {
                "says": "It hides.",
                "guide": "text_top",
                "camera": "fixed",
                "source": "manual",
                "ratio": 0.6,
                "above": 0.9,
            },
            {"says": "It shows.", "guide": "motion", "camera": "moving", "dataset": "clips", "below": "text_top"},
        ]
    },
}
# Runs and evaluations with a text encoder.
WITH_TEACHER: dict[str, Any] = {
    **RUN,
    "dataset": "clips",
    "teacher": TEACHER,
    "language": {"model": "models/one/bert"},
}
PAIRS: dict[str, Any] = {"runs": ["umt", "stm"], "validation_split": "train", "optimisation": OPTIMISATION}
FOLDER = {"source": "folder", "root": "videos", "annotations": "videos/clips.csv"}
LANGUAGE: dict[str, Any] = {
    **PACKED,
    "name": "paper",
    "datasets": {
        "clips": {"dataset": FOLDER},
        "others": {"dataset": {**SHAPES, "label": "color"}},
        "images": {"dataset": {**SHAPES, "label": "shape"}},
    },
    "pretrain": {
        "umt": {**WITH_TEACHER, "method": "umt", "images": {"datasets": ["images"], "batch_size": 8}},
        "stm": {**WITH_TEACHER, "method": "stm", "spatio_temporal": {}},
        "clusterstm": {**WITH_TEACHER, "method": "clusterstm", "resize_on": "device", "cluster": {}},
    },
    "evaluate": {
        # With groups of pairs, without which they run in one process alone.
        "ranks": {"task": "video_text_retrieval", "negatives_among": 2, **PAIRS},
        "answers": {"task": "question_answering", **PAIRS},
        "choices": {"task": "multiple_choice", "negatives_among": 2, **PAIRS},
        "sentences": {"task": "captioning", **PAIRS},
    },
}
# Datasets with official lists.
CORPUS = {"source": "webvid-2m", "root": "corpus", "annotations": "lists"}
LISTS: dict[str, Any] = {
    "name": "paper",
    "datasets": {
        "actions": {"dataset": {"source": "ucf101", "root": "actions", "annotations": "lists"}},
        "again": {"dataset": CORPUS, "frames": {"count": 8}},
        "corpus": {"dataset": CORPUS, "frames": {"count": 8}},
    },
    "pack": {"motion": False},
}
CONFIGS = {"offline": OFFLINE, "masking": MASKING, "language": LANGUAGE, "lists": LISTS}

# The jobs that each key affects. The first pattern that matches a key counts. In a pattern, * stands for one part of the key,
# which {0}, {1} insert into names of jobs, and ** for all further parts. In a name of a job, * stands for any name; ! excludes
# jobs, and ? allows that the config has none. Keys that affect no job have an empty list. `plan` and `report` show the whole
# config: they may always be rerun, and must be where they are listed. A key of one of several datasets is written like that of
# a config with one dataset.
RERUN: tuple[tuple[str, list[str]], ...] = (
    ("name", ["table/*", "figure/*", "plan", "report"]),  # with several datasets, where results are shown
    ("results", ["*", "!demo_models"]),
    ("seed", ["generate", "manifest", "pretrain/*", "evaluate/*", "crop_agreement", "demo_models"]),
    ("seeds", ["pretrain/*", "evaluate/*", "table/*", "figure/*", "report"]),
    # The offline stages.
    ("dataset.probe_timeout_seconds", []),
    ("dataset.**", ["generate?", "manifest"]),
    ("shard_size", ["split"]),
    ("grid", ["embeddings", "similarity/*", "motion", "flow", "shards"]),
    ("bad_input.max_failure_rate", []),
    (
        "bad_input.policy",
        ["manifest", "frames", "captions/*", "similarity/*", "text/*", "motion", "flow", "shards"],
    ),
    ("frames.timeout_seconds", []),
    ("frames.keep", []),
    ("frames.min_side", ["manifest", "frames"]),
    ("frames.max_side", ["manifest", "frames"]),
    ("frames.*", ["frames"]),
    ("captions.*.kind", ["captions/{0}"]),
    ("captions.*.*", ["captions/{0}"]),
    # Keeping embeddings changes no map, but it changes the inputs of the maps, which all sources make together without them.
    ("similarity.keep_embeddings", ["joint_similarity", "similarity/*"]),
    ("similarity.*", ["embeddings", "similarity/*", "crop_agreement?"]),
    ("text.model", ["text/*", "evaluate/*/zero?"]),  # zero-shot evaluation encodes its sentences with this model
    ("text.*", ["text/*"]),
    ("motion.timeout_seconds", []),
    ("motion.*", ["motion"]),
    ("flow.timeout_seconds", []),
    ("flow.*", ["flow"]),
    ("pack.more_splits", []),  # shards of a split that these datasets lack
    ("pack.captions", ["shards", "crop_agreement?"]),  # which is measured on the first source
    ("pack.*", ["shards"]),
    # Clips of the other split then need maps of the sources that are not packed.
    ("mask_quality.split", ["mask_quality", "similarity/blip2", "similarity/llm", "similarity/vlm"]),
    ("mask_quality.*", ["mask_quality"]),
    ("crop_agreement.*", ["crop_agreement"]),
    # Pretraining.
    ("pretrain.*.workers", []),
    ("pretrain.*.kept_gigabytes", []),
    ("pretrain.*.checkpoint_every", []),
    ("pretrain.*.checkpoints_kept", []),
    ("pretrain.*.gradient_checkpointing", []),
    (
        "pretrain.*.dataset",
        ["pretrain/{0}", "evaluate/{0}/*?", "table/*?", "figure/*?"],
    ),  # the results of the run are written to another folder
    ("pretrain.*.seeds", ["pretrain/{0}-*", "evaluate/{0}-*", "table/*?", "figure/*?"]),
    ("pretrain.*.**", ["pretrain/{0}", "evaluate/{0}/*?"]),
    # Evaluation.
    ("evaluate.*.runs", []),  # the metrics of the other runs are unchanged
    ("evaluate.*.gradient_checkpointing", []),
    ("evaluate.*.**", ["evaluate/*/{0}"]),
    # Tables, figures and the report.
    ("tables.*.**", ["table/{0}", "report"]),
    ("figures.*.**", ["figure/{0}", "report"]),
    ("report.**", ["report"]),
    ("prices.*", ["plan", "report"]),
    ("trackers", []),
)
ALWAYS_ALLOWED = {"plan", "report"}

TASKS = [section.__name__ for section in get_args(get_args(EvaluationTask)[0])]
# Valid other values, by section and key, where the generic changes of `others` yield none.
VALUES: dict[str, list[Any]] = {
    "BadInput.policy": [{"too_short": "fail"}],
    "CaptionChoice.sources": [["manual"]],
    "ExpectedCoverage.dataset": ["clips"],
    "ExpectedCoverage.ratio": [0.75],
    "ExpectedCoverage.source": [None],
    "ExpectedScore.evaluation": ["finetune"],
    "ExpectedScore.run": ["tube"],
    "FigureSpec.runs": [{"TGM": "tube"}],
    "FigureSpec.tasks": [["finetune"]],
    "FineTune.classes": ["models/one/start.pth"],
    "Frames.from_dataset": ["again"],
    "FolderDataset.root": ["videos-again"],
    "BenchmarkDataset.annotations": ["lists-again"],
    "BenchmarkDataset.source": ["hmdb51"],
    "FolderDataset.annotations": ["videos/more.csv"],
    "LanguageDataset.annotations": ["lists-again"],
    "LanguageDataset.root": ["corpus-again"],
    "LanguageDataset.source": ["webvid-10m"],
    "BenchmarkDataset.root": ["actions-again"],
    "Images.datasets": [["others"]],
    "LanguageRun.more": [["others"]],
    "Mask.strategy": ["tube", "random"],
    "MovingShapesDataset.clips": [{"train": 4, "test": 3}],
    "Pack.more_splits": [["val"]],
    "Config.trackers": [["tensorboard", "wandb"]],
    "TableColumn.task": ["finetune"],
    "TableRow.certainty": ["source"],
    "TableRow.paper": [[1.0, 2.0]],
    "TableRow.runs": [["tgm", "tube"]],
    "VisionLanguageCaptions.processor": [{"size": 224}],
    "VisionLanguageCaptions.template": [{"enable_thinking": False}],
    **{f"{section}.dataset": ["others"] for section in ("PretrainRun", "LanguageRun", *TASKS)},
    **{f"{section}.runs": [["tgm"], ["umt"]] for section in TASKS},
    **{f"{section}.source": ["manual"] for section in TASKS},
    **{f"{section}.image_size": [64] for section in ("Teacher", "FrameTeacher")},
}
SPLITS = ["test", "train"]  # values of keys that name a split

ONE_VIEW = ("VideoTextRetrieval", "QuestionAnswering", "MultipleChoice", "Captioning", "MaskPersistence")
# Keys with a single value.
FIXED = {
    "LanguageRun.tubelet",
    # Tasks with text, and of masks, test one view of each clip.
    *(f"{task}.{key}" for task in ONE_VIEW for key in ("views", "crops")),
}
# Keys that only some entries can change: the entry to use.
PLACES = {
    "ExpectedCoverage.below": "report.expect.3.below",
    "ExpectedScore.below": "report.expect.1.below",
    "FigureSpec.kind": "figures.clips.kind",
    "FineTune.classes": "evaluate.released.classes",  # a task without training
    # A dataset without motion, and another one with the same videos.
    "Frames.count": "frames.count",
    "Frames.from_dataset": "frames.from_dataset",
    "LanguageRun.decode_on": "pretrain.clusterstm.decode_on",  # runs that resize on the device
    "PretrainRun.decode_on": "pretrain.tube.decode_on",
    "PretrainRun.release": "pretrain.tube.release",  # a run without `init`
}


@dataclass(frozen=True)
class Key:
    """One key of a config of `CONFIGS`."""

    config: str
    path: tuple[str | int, ...]
    section: type[Section]

    @property
    def dataset(self) -> str | None:
        return str(self.path[1]) if self.path[0] == "datasets" else None

    @property
    def name(self) -> str:
        """The key as in `RERUN`."""
        return ".".join(map(str, self.path[2:] if self.dataset else self.path))

    @property
    def field(self) -> str:
        """Section and key, as in `VALUES`."""
        return f"{self.section.__name__}.{self.path[-1]}"


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The section types in a field's annotation: the annotation itself, or those in a union, mapping or list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    yield from chain.from_iterable(map(sections_in, get_args(annotation)))


def walk(section: Section, path: tuple[str | int, ...] = (), place: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key that holds no section: its path, its section, and its place, the path with types in place of names."""
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if isinstance(section, Config) and section.datasets and name in Corpus.model_fields:
            continue  # the default of datasets that do not set it; here all set it
        if not list(sections_in(field.annotation)):
            yield (*path, name), type(section), (*place, name)
            continue
        parts: Iterable[tuple[Any, Any]] = [((), value)] if isinstance(value, Section) else ()
        if isinstance(value, Mapping):
            parts = [((key,), part) for key, part in value.items()]
        elif isinstance(value, tuple):
            parts = [((number,), part) for number, part in enumerate(value)]
        for key, part in parts:
            where = () if name == "datasets" else (*place, name, type(part).__name__)
            yield from walk(part, (*path, name, *key), where)


def find_keys() -> list[Key]:
    """Each key once per kind of place at which its section occurs."""
    found: dict[tuple[str, ...], Key] = {}
    for config, values in CONFIGS.items():
        for path, section, place in walk(parse_config(values)):
            key = Key(config, path, section)
            of_stages, listed = place[0] in Corpus.model_fields, place[:1] == ("dataset",)
            if of_stages == (config == "offline") or listed:
                found.setdefault(place, key)
            if key.name == PLACES.get(key.field):
                found[place] = key
    return [key for key in found.values() if not is_tag(key)]


def is_tag(key: Key) -> bool:
    """Whether the key only identifies its section, as `kind: human` does, and has no other value there."""
    annotation = key.section.model_fields[str(key.path[-1])].annotation
    return key.field in FIXED or (get_origin(annotation) is Literal and len(get_args(annotation)) == 1)


def others(key: Key, value: Any) -> Iterator[Any]:
    """Other values for a key, the most likely first; not all are valid."""
    if key.field in VALUES or key.field.endswith("split"):
        yield from VALUES.get(key.field, SPLITS)
        return
    annotation = key.section.model_fields[str(key.path[-1])].annotation
    yield from (choice for choice in choices_of(annotation) if choice != value)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value * 2, value / 2, value * 0.75, value // 2, value + 0.125)
    elif isinstance(value, str):
        yield f"{value}x"
    elif isinstance(value, list) and value:
        yield from ([*value[1:], value[0]], [part / 2 for part in value if isinstance(part, float)], value[:-1])
        yield [*value, f"{value[0]}x"]
    yield from (1, 0.5, 8, "other", [1])


def choices_of(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        yield from chain.from_iterable(map(choices_of, get_args(annotation)))


@cache
def change(key: Key) -> dict[str, Any]:
    """The whole config, with another valid value for one key."""
    before = parse_config(CONFIGS[key.config])
    plain = before.model_dump(mode="json")
    holder = plain
    for part in key.path[:-1]:
        holder = holder[part]
    for value in others(key, holder[key.path[-1]]):
        old, holder[key.path[-1]] = holder[key.path[-1]], value
        try:
            if Config.model_validate(plain) != before:
                return plain
        except ValidationError:  # `parse_config` takes a tenth of a second to explain it
            pass
        holder[key.path[-1]] = old
    pytest.fail(f"no other valid value of {key.field} was found: add one to VALUES in {Path(__file__).name}")


def find_line(key: Key) -> list[str]:
    """The jobs that `RERUN` lists for a key, with the parts matched by stars inserted."""
    for pattern, jobs in RERUN:
        names = match(pattern.split("."), key.name.split("."))
        if names is not None:
            return [job.format(*names) for job in jobs]
    pytest.fail(
        f"{key.name} is a new key of the config. Add it to RERUN in {Path(__file__).name} with the jobs whose bytes it affects, "
        "which must be rerun when it changes; an empty list if it affects none"
    )


def match(pattern: list[str], key: list[str]) -> list[str] | None:
    """The parts of a key that match a pattern's stars; None if the key does not match."""
    if pattern[-1] == "**" and len(key) >= len(pattern):
        pattern, key = pattern[:-1], key[: len(pattern) - 1]
    if len(pattern) != len(key) or any(one not in ("*", part) for one, part in zip(pattern, key, strict=True)):
        return None
    return [part for one, part in zip(pattern, key, strict=True) if one == "*"]


def expected(key: Key, names: frozenset[str]) -> set[str]:
    """The jobs of the changed config that must be rerun when a key changes."""
    jobs: set[str] = set()
    for pattern in find_line(key):
        plain = pattern.strip("!?")
        scope = f"{key.dataset}:" if key.dataset else "*:"
        matching = {
            n for n in names if fnmatchcase(n, f"{scope}{plain}") or (not key.dataset and fnmatchcase(n, plain))
        }
        assert matching or pattern.endswith("?"), f"RERUN names {plain} for {key.name}, but the config has no such job"
        jobs = jobs - matching if pattern.startswith("!") else jobs | matching
    return jobs


def make_models(folder: Path) -> None:
    """Create placeholder files for models, which are never loaded here."""
    for place, end in product(("one", "two"), ("", "x")):  # `x` is what `others` appends
        for model in ("clip", "blip2", "llm", "vlm", "bert", "text", "teacher"):
            touch(folder / "models" / place / f"{model}{end}" / "weights.bin")
        for file in ("raft.pth", "start.pth"):
            touch(folder / "models" / place / f"{file}{end}")
    touch(folder / "videos/clips.csv")
    for name in ("clips.csv", "more.csv"):
        (folder / "videos" / name).write_text("path,caption\na.mp4,a cat\n")
    (folder / "videos-again").mkdir()
    for again in ("", "-again"):
        make_lists(folder / f"lists{again}")
        for file in ("actions/YoYo/v_YoYo_g01_c01.avi", "actions/clap/v_YoYo_g02_c01.avi", "corpus/1.mp4"):
            top, _, rest = file.partition("/")
            touch(folder / f"{top}{again}" / rest)


def make_lists(lists: Path) -> None:
    """Write lists of UCF101 (two folds), HMDB51 and both WebVid corpora, with one or two clips each."""
    lists.mkdir()
    clips = ("YoYo/v_YoYo_g01_c01.avi", "YoYo/v_YoYo_g02_c01.avi")
    (lists / "classInd.txt").write_text("1 YoYo\n")
    for fold, (train, test) in enumerate((clips, clips[::-1]), 1):
        (lists / f"trainlist0{fold}.txt").write_text(f"{train} 1\n")
        (lists / f"testlist0{fold}.txt").write_text(f"{test}\n")
    (lists / "clap_test_split1.txt").write_text("v_YoYo_g01_c01.avi 1 \nv_YoYo_g02_c01.avi 2 \n")
    for name in ("webvid_train", "webvid_10m_train"):
        (lists / f"{name}.json").write_text(json.dumps([{"video": "1.mp4", "caption": "a cat"}]))


@pytest.fixture(scope="module", autouse=True)
def small_lists() -> Iterator[None]:
    """Replace the official counts of clips by one per split."""
    with pytest.MonkeyPatch.context() as patch:
        for source in ("ucf101", "hmdb51"):
            counts = {fold: {"train": 1, "test": 1} for fold in (1, 2, 3)}
            patch.setitem(BENCHMARKS, source, replace(BENCHMARKS[source], counts=counts))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder per config, in which the workflow seems to have run."""

    @cache
    def make(config: str) -> Path:
        folder = tmp_path_factory.mktemp(config)
        make_models(folder)
        finish(folder, parse_config(CONFIGS[config]).model_dump(mode="json"))
        return folder

    return make


KEYS = find_keys()


def test_every_section_of_the_config_is_asked_about() -> None:
    """A new section must occur in one of `CONFIGS`, or its keys would not be tested."""
    waiting: list[type[Section]] = [Config]
    known: set[type[Section]] = {Config}
    while waiting:
        kinds = {kind for field in waiting.pop().model_fields.values() for kind in sections_in(field.annotation)}
        waiting += kinds - known
        known |= kinds
    tested = {section for values in CONFIGS.values() for _, section, _ in walk(parse_config(values))}
    assert {section.__name__ for section in known - tested} == set()


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.config}-{'.'.join(map(str, key.path))}")
def test_a_key_reruns_what_it_decides_and_nothing_else(key: Key, folders: Callable[[str], Path]) -> None:
    jobs = find_jobs(folders(key.config), change(key))
    must = expected(key, jobs.names)
    assert set(jobs.changed) - ALWAYS_ALLOWED == must - ALWAYS_ALLOWED, key.name
    assert must & ALWAYS_ALLOWED <= jobs.changed


def test_untouched_configs_rerun_nothing(folders: Callable[[str], Path]) -> None:
    for config, values in CONFIGS.items():
        jobs = find_jobs(folders(config), values)
        assert jobs.changed == jobs.rerun == frozenset(), config


# The jobs that read the outputs of a job directly; the test adds their dependents.
NEEDED_BY = {
    "generate": {"manifest", "mask_quality"},
    "manifest": {"split", "report"},
    "frames": {
        *(
            "captions/*",
            "embeddings",
            "similarity/*",
            "motion",
            "flow",
            "shards",
            "mask_quality",
            "crop_agreement",
            "report",
        ),
    },
    "embeddings": {"similarity/*"},
    "captions/manual": {"similarity/manual", "text/manual", "shards", "report"},
    "captions/blip2": {"similarity/blip2", "report"},
    "similarity/manual": {"shards", "mask_quality", "crop_agreement"},
    "similarity/blip2": {"mask_quality"},
    "text/manual": {"shards"},
    "motion": {"shards", "mask_quality"},
    "flow": {"shards"},
    "shards": {"pretrain/tube", "evaluate/tube/linear", "report"},
    "pretrain/tube": {"evaluate/tube/linear", "report"},
    "evaluate/tube/linear": {"report"},
    "mask_quality": {"report"},
    "crop_agreement": {"report"},
}


@pytest.mark.parametrize("job", NEEDED_BY)
def test_what_follows_a_job_that_runs_again(job: str, folders: Callable[[str], Path]) -> None:
    jobs = find_jobs(folders("offline"), OFFLINE)
    direct = {name for pattern in NEEDED_BY[job] for name in jobs.names if fnmatchcase(name, pattern)}
    assert jobs.following[job] == direct.union(*(jobs.following[name] for name in direct))


# The jobs that load each model of `make_models`, by config.
LOADED_BY = {
    ("offline", "clip"): {"embeddings", "similarity/*", "text/*"},
    ("offline", "blip2"): {"captions/blip2"},
    ("offline", "llm"): {"captions/llm"},
    ("offline", "vlm"): {"captions/vlm"},
    ("offline", "raft.pth"): {"flow"},
    ("masking", "clip"): {"*:similarity/*"},
    ("masking", "text"): {"*:text/*", "*:evaluate/tgm/zero"},  # zero-shot evaluation encodes its sentences
    ("masking", "teacher"): {"*:pretrain/tgm"},
    ("masking", "start.pth"): {"*:pretrain/tgm", "*:pretrain/published"},
    ("language", "teacher"): {"*:pretrain/*"},
    ("language", "bert"): {"*:pretrain/*"},
}


@pytest.mark.parametrize(("config", "model"), LOADED_BY)
def test_another_folder_of_a_local_model_reruns_what_loads_it(
    config: str, model: str, folders: Callable[[str], Path]
) -> None:
    """Both folders have the same name, so only the files, which are inputs, reveal the change."""
    plain = parse_config(CONFIGS[config]).model_dump(mode="json")
    moved = json.loads(json.dumps(plain).replace(f"models/one/{model}", f"models/two/{model}"))
    jobs = find_jobs(folders(config), moved)
    loading = loaders(config, model, jobs.names)
    # The params of an evaluation contain the settings of its run, with the paths of models.
    runs = [name.split("/")[1] for name in loading if ":pretrain/" in name]
    loading |= {name for name in jobs.names for run in runs if f":evaluate/{run}/" in name}
    assert jobs.changed - ALWAYS_ALLOWED == loading


@pytest.mark.parametrize(("config", "model"), LOADED_BY)
def test_a_models_file_that_changed_reruns_what_loads_it(
    config: str, model: str, folders: Callable[[str], Path]
) -> None:
    folder, place = folders(config), f"models/one/{model}"
    file = folder / place if (folder / place).is_file() else folder / place / "weights.bin"
    before = file.stat()
    file.write_bytes(b"other weights")
    os.utime(file, ns=(before.st_atime_ns, time.time_ns()))
    try:
        jobs = find_jobs(folder, parse_config(CONFIGS[config]).model_dump(mode="json"))
    finally:
        file.write_bytes(b"")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    loading = loaders(config, model, jobs.names)
    assert not jobs.changed
    assert jobs.rerun == loading.union(*(jobs.following[name] for name in loading))


def loaders(config: str, model: str, names: frozenset[str]) -> set[str]:
    return {name for pattern in LOADED_BY[config, model] for name in names if fnmatchcase(name, pattern)}


def test_sources_are_packed_in_the_order_of_the_config(folders: Callable[[str], Path]) -> None:
    """The script pairs sources with files by position, which Snakemake's criterion does not check."""
    inputs = find_jobs(folders("offline"), OFFLINE).inputs["shards"]
    for part in ("captions", "similarity", "text"):
        found = [Path(path).parent.name for path in inputs if f"/{part}/" in path]
        assert found == ["manual", "label"], part


def test_several_config_files_are_merged_key_by_key(tmp_path: Path) -> None:
    """As Snakemake merges several `--configfile`, at any depth."""
    update = {"pretrain": {"tube": {"mask": {"ratio": 0.75}, "optimisation": {"betas": [0.5, 0.6]}}}}
    for name, values in (("base.yaml", OFFLINE), ("update.yaml", update)):
        (tmp_path / name).write_text(yaml.safe_dump(values))
    files = [str(tmp_path / name) for name in ("base.yaml", "update.yaml")]
    tube = load(Namespace(config=files, set=["pretrain.tube.optimisation.accumulate=2"])).pretrain["tube"]
    assert (tube.mask.strategy, tube.mask.ratio, tube.model) == ("tube", 0.75, "tiny")
    assert (tube.optimisation.epochs, tube.optimisation.betas, tube.optimisation.accumulate) == (2, (0.5, 0.6), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({}, set()),
        ({"motion": {"timeout_seconds": 5}, "report": {"title": "Other"}}, set()),
        ({"flow": {"cells": 4}}, {"flow", "shards", "pretrain", "evaluate"}),
        ({"pretrain": {"tube": {"mask": {"ratio": 0.5}}}}, {"pretrain", "evaluate"}),
        ({"evaluate": {"linear": {"epochs": 3}}}, {"evaluate"}),
        (
            {"text": {"model": "local-dir:models/two/clip"}, "similarity": {"precision": "bfloat16"}},
            {"embeddings", "similarity", "text", "shards", "mask_quality", "crop_agreement", "pretrain", "evaluate"},
        ),
    ],
)
def test_snakemake_on_the_command_line_agrees(
    changes: dict[str, Any], rules: set[str], folders: Callable[[str], Path]
) -> None:
    """The records of `finish` and the criterion of `find_jobs` agree with a real dry run."""
    folder = folders("offline")
    values = merge(parse_config(OFFLINE).model_dump(mode="json"), changes)
    jobs = find_jobs(folder, values)
    printed = snakemake(folder, "--dry-run")
    planned = set(re.findall(r"^(?:local)?(?:rule|checkpoint) (\w+):", printed, re.M)) - {"all"}
    assert planned - ALWAYS_ALLOWED == rules
    rerun = jobs.changed.union(*(jobs.following[name] for name in jobs.changed))
    assert planned == {name.split("/")[0] for name in rerun}
    # Of settings that have changed, only these keys are printed, and of long lists their beginnings.
    assert all(len(line) < 1000 for line in printed.splitlines())
    if "flow" in changes:
        assert re.search(r"Params have changed since last execution: flow\.cells: \d+ -> 4$", printed, re.M)


@pytest.mark.slow
def test_results_that_are_older_than_the_installation_are_kept(folders: Callable[[str], Path]) -> None:
    """An upgrade or a fresh clone dates the script of all rules."""
    folder = folders("offline")
    find_jobs(folder, OFFLINE)
    for path in folder.rglob("*"):
        os.utime(path, (path.stat().st_mtime - 20 * 365 * 86400,) * 2)
    assert "Nothing to be done" in snakemake(folder, "--dry-run")
    assert "Code has changed" in snakemake(folder, "--dry-run", "--rerun-triggers", "code")
