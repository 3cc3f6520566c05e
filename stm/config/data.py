"""Dataset sources, and policies for damaged clips."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from stm.config.base import Fraction, Name, Place, Section, WorkflowPlace, field
from stm.jobs.status import Policy, Status


class FolderDataset(Section):
    """A folder of any videos, with an optional CSV, JSON or Parquet table of annotations."""

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: Literal["folder"]
    root: Place = field(..., "folder of the videos; all paths in the annotations are relative to it")
    annotations: WorkflowPlace | None = field(
        None,
        "CSV, JSON or Parquet table with a column `path` and optionally `video_id`, `split`, `label`, `caption` or "
        "`captions`, `start`, `end` (seconds), `questions`; videos that it does not list are ignored",
    )
    extensions: tuple[str, ...] = field(
        (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".h264"),
        "file name extensions of videos, used if there are no annotations",
    )
    split: Name = field("train", "split of clips whose annotation has none")
    probe_timeout_seconds: float = field(
        60.0, "files that take longer to open get the status `timeout`", "seconds", gt=0
    )


def _check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError("the first number is the minimum and the second one the maximum")
    return bounds


def _check_not_switch(value: Any) -> Any:
    # `false` would read as 0.0, and add the object that it is meant to leave out.
    if isinstance(value, bool):
        raise ValueError("must be a share from 0 to 1, or null for no such object")
    return value


Size = Annotated[float, Field(ge=0.08, le=0.7)]
Amplitude = Annotated[float, Field(ge=0.01, le=0.4)]


class MovingShapesDataset(Section):
    """The generated dataset: textured shapes moving over textured backgrounds, as real H.264 files.

    By default the context says nothing about the named object. `background_context`, `companion`, `object_size`,
    `camera_amplitude`, `moving_background` and `caption` add what real videos have (docs/data.md).
    """

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: Literal["moving-shapes"]
    clips: dict[Name, Annotated[int, Field(ge=1)]] = field({"train": 256, "test": 128}, "clips per split", "clips")
    frames: int = field(32, "frames per clip", "frames", ge=8, le=1024)
    fps: int = field(16, "frame rate", "frames per second", ge=1, le=120)
    height: int = field(128, "frame height; even", "pixels", ge=64, le=2160, multiple_of=2)
    width: int = field(160, "frame width; even", "pixels", ge=64, le=4096, multiple_of=2)
    distractors: int = field(2, "maximum number of other objects per clip", "objects", ge=0, le=8)
    label: Literal["motion", "color", "shape", "texture"] = field(
        "motion", "what the class label names: how the captioned object moves, or an aspect of its appearance"
    )
    seed: int | None = field(None, "seed of the clips; by default the config's", ge=0, lt=2**31)
    moving_camera: Fraction = field(0.5, "share of clips with a moving camera")
    camera_amplitude: Annotated[tuple[Amplitude, Amplitude], AfterValidator(_check_range)] = field(
        (0.09, 0.16),
        "range of a moving camera's amplitude along each axis; reduced where the named object would leave the frame",
        "share of the short side",
    )
    object_size: Annotated[tuple[Size, Size], AfterValidator(_check_range)] = field(
        (0.34, 0.34),
        "range of the objects' median sides, drawn log-uniformly per object; other objects than the named one have 0.85 times "
        "that. Growing and shrinking objects pass through 0.75 to 1.34 times the median, all others keep one of these sides",
        "share of the short side",
    )
    background_context: Fraction = field(
        0.0,
        "how far the background tells the motion: this share of clips has the background that belongs to the motion, of which "
        "opposite motions share one, and the moving part, if there is one, moves in step with the named object; in the other "
        "clips both are drawn independently",
    )
    companion: Annotated[Fraction | None, BeforeValidator(_check_not_switch)] = field(
        None,
        "adds an object to every clip, besides the distractors: in this share of clips it moves in step with the named object, "
        "at its side; in the other clips it is one more distractor, in all clips with 0. null: no such object",
    )
    moving_background: Fraction = field(
        0.0,
        "share of clips in which a part of the background moves: an ellipse in which the texture moves as an object does",
    )
    caption: Literal["full", "action", "appearance"] = field(
        "full",
        "what a clip's caption names. `full`: what moves, how and where; `action`: what and how; `appearance`: what and where",
    )
    probe_timeout_seconds: float = field(
        60.0, "files that take longer to open get the status `timeout`", "seconds", gt=0
    )

    @model_validator(mode="after")
    def _check_objects(self) -> "MovingShapesDataset":
        if self.companion is not None and self.distractors > 7:
            raise ValueError("`companion` is one of at most 8 other objects: set `distractors` to at most 7")
        return self


BenchmarkSource = Literal["kinetics-400", "something-something-v2", "ucf101", "hmdb51", "diving48", "epic-kitchens-55"]


class BenchmarkDataset(Section):
    """A public benchmark: its videos, and its annotation files as downloaded (docs/datasets.md)."""

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: BenchmarkSource
    root: Place = field(..., "folder of the videos")
    annotations: Place = field(..., "folder of the official annotation files")
    fold: int = field(1, "split number of UCF101 and HMDB51; the papers use 1", ge=1, le=3)
    label: Literal["action", "verb", "noun"] = field("action", "EPIC-Kitchens: what the classes are")
    partial: bool = field(
        False,
        "accept an incomplete copy: use the available clips, and list the others with the status missing_file",
    )
    probe_timeout_seconds: float = field(
        60.0, "files that take longer to open get the status `timeout`", "seconds", gt=0
    )


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
    """A public corpus or benchmark of videos or images with text, and its public annotation files.

    The protocol of a benchmark (paragraphs, trimmed videos, text lengths) is in config/datasets/{source}.yaml. It cannot be
    changed here, because results under another protocol are not comparable.
    """

    cache_neutral = frozenset({"probe_timeout_seconds"})
    source: CorpusSource | ProtocolSource
    root: Place = field(..., "folder of the videos or images")
    annotations: Place = field(..., "folder of the annotation files")
    partial: bool = field(
        False,
        "benchmarks: accept an incomplete copy and use the available clips; web corpora are never complete and are always "
        "used as they are",
    )
    probe_timeout_seconds: float = field(
        60.0, "files that take longer to open get the status `timeout`", "seconds", gt=0
    )


Dataset = Annotated[
    FolderDataset | MovingShapesDataset | BenchmarkDataset | LanguageDataset, Field(discriminator="source")
]


class BadInput(Section):
    """Policies for clips that are damaged, missing or unusual."""

    cache_neutral = frozenset({"max_failure_rate"})
    policy: dict[Status, Policy] = field(
        {},
        "policies per status that override the defaults in stm/jobs/status.py; `keep`: use the readable part, `drop`: leave "
        "the clip out and list it in the quarantine table, `fail`: stop the stage",
    )
    max_failure_rate: Fraction = field(
        0.5,
        "a stage fails if more than this share of a shard's clips is dropped (never for shards of fewer than 8 clips)",
    )

    def action(self, status: Status) -> Policy:
        """Return the policy for a status."""
        return self.policy.get(status, status.default_policy)
