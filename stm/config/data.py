"""Where videos come from, and what to do with those that are damaged."""

from typing import Annotated, Literal

from pydantic import Field

from stm.config.base import Fraction, Name, Section, field
from stm.jobs.status import Policy, Status


class FolderDataset(Section):
    """Any videos, with an optional CSV, JSON or Parquet table of what is known about them."""

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: Literal["folder"]
    root: str = field(..., "folder of the videos; all paths in the annotations are relative to it")
    annotations: str | None = field(
        None,
        "CSV, JSON or Parquet with a column `path` and, where known, `video_id`, `split`, `label`, `caption` or "
        "`captions`, `start`, `end` (seconds), `questions`; a folder's videos that it does not name are left out",
    )
    extensions: tuple[str, ...] = field(
        (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".h264"),
        "file name endings of videos, used when there are no annotations",
    )
    split: Name = field("train", "split of clips whose annotation names none")
    probe_timeout_seconds: float = field(60.0, "a file that takes longer to open is marked `timeout`", "seconds", gt=0)


class MovingShapesDataset(Section):
    """The generated dataset: textured shapes that move over textured backgrounds, as real H.264 files."""

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: Literal["moving-shapes"]
    clips: dict[Name, Annotated[int, Field(ge=1)]] = field({"train": 256, "test": 128}, "clips in each split", "clips")
    frames: int = field(32, "frames in a clip", "frames", ge=8, le=1024)
    fps: int = field(16, "frame rate", "frames per second", ge=1, le=120)
    height: int = field(128, "height of the frames; even", "pixels", ge=64, le=2160, multiple_of=2)
    width: int = field(160, "width of the frames; even", "pixels", ge=64, le=4096, multiple_of=2)
    distractors: int = field(2, "most other objects in a clip", "objects", ge=0, le=8)
    label: Literal["motion", "color", "shape", "texture"] = field(
        "motion", "the class: how the named object moves, or what it looks like"
    )
    seed: int | None = field(None, "the clips' own seed; the config's when not given", ge=0, lt=2**31)
    moving_camera: Fraction = field(0.5, "share of clips whose camera moves")
    probe_timeout_seconds: float = field(60.0, "a file that takes longer to open is marked `timeout`", "seconds", gt=0)


BenchmarkSource = Literal["kinetics-400", "something-something-v2", "ucf101", "hmdb51", "diving48", "epic-kitchens-55"]


class BenchmarkDataset(Section):
    """A public benchmark: its videos, and its annotation files as they are downloaded (docs/datasets.md)."""

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: BenchmarkSource
    root: str = field(..., "folder of the videos")
    annotations: str = field(..., "folder of the official annotation files")
    fold: int = field(1, "split number of UCF101 and HMDB51; the papers use 1", ge=1, le=3)
    label: Literal["action", "verb", "noun"] = field("action", "EPIC-Kitchens: what counts as a class")
    partial: bool = field(
        False,
        "use the clips that are there when files of the official lists are missing; those are listed as missing_file",
    )
    probe_timeout_seconds: float = field(60.0, "a file that takes longer to open is marked `timeout`", "seconds", gt=0)


CorpusSource = Literal["webvid-2m", "webvid-10m", "cc3m", "cc12m", "sbu", "visual-genome", "coco"]
ProtocolSource = Literal[
    "msrvtt",
    "msrvtt-7k",
    "msrvtt-mc",
    "msrvtt-qa",
    "msrvtt-captioning",
    "msvd",
    "msvd-qa",
    "msvd-captioning",
    "didemo",
    "activitynet",
    "activitynet-qa",
    "lsmdc",
    "ssv2-label",
    "ssv2-template",
]


class LanguageDataset(Section):
    """A public corpus or benchmark of videos, or images, with text: its files, and its public annotation files.

    The protocol of a benchmark (paragraphs, trimmed videos, text lengths) is in config/datasets/{source}.yaml and cannot be
    changed here: results with another one cannot be compared.
    """

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: CorpusSource | ProtocolSource
    root: str = field(..., "folder of the videos or images")
    annotations: str = field(..., "folder of the annotation files")
    partial: bool = field(
        False,
        "benchmarks: use the clips that are there when files are missing; corpora of the web are never complete, and are "
        "always used as they are",
    )
    probe_timeout_seconds: float = field(60.0, "a file that takes longer to open is marked `timeout`", "seconds", gt=0)


Dataset = Annotated[
    FolderDataset | MovingShapesDataset | BenchmarkDataset | LanguageDataset, Field(discriminator="source")
]


class BadInput(Section):
    """What to do with clips that are damaged, missing or unusual."""

    cache_neutral = frozenset({"max_failure_rate"})
    policy: dict[Status, Policy] = field(
        {},
        "overrides of the policy per status; `keep`: use what there is, `drop`: leave the clip out and list it in the "
        "quarantine table, `fail`: stop. The defaults are in stm/manifest.py",
    )
    max_failure_rate: Fraction = field(
        0.5,
        "a stage fails when more than this share of its shard's clips is dropped (shards of fewer than 8 never do)",
    )

    def action(self, status: Status) -> Policy:
        return self.policy.get(status, status.default_policy)
