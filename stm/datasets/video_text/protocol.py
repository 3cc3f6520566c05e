"""The evaluation protocols of video-text benchmarks: the files in config/datasets, validated.

A protocol is not part of a run's config, because results with different trimming or paragraphs would not be comparable.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from stm.config.base import Name, Section
from stm.datasets.folder import DatasetError
from stm.storage.shipped import NotShippedError, shipped

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.json$")]
Count = Annotated[int, Field(ge=1)]
Rule = Literal["join", "explode", "keep"]


class InputSizes(Section):
    """Input sizes of the model."""

    train_frames: Count | None = None  # per clip; null: no training
    test_frames: Count
    max_text_tokens: Annotated[int, Field(ge=4, le=512)]  # per caption or question; longer ones are truncated


class TypicalClip(Section):
    """A typical clip, for the plan."""

    frames: Count
    width: Count
    height: Count
    basis: str


class Protocol(Section):
    """One file of config/datasets."""

    title: str
    task: Literal["retrieval", "question_answering", "multiple_choice", "captioning"]
    lists_from: str  # the publisher of the annotation files
    # `list`: [{"video", "caption" | "question", "answer"}]; `videodatainfo`: MSR-VTT's format {"videos", "sentences"}
    format: Literal["list", "videodatainfo"] = "list"
    files: dict[Name, tuple[FileName, ...]]  # by split; the first existing one is read
    answers: FileName | None = None  # file with the list of candidate answers
    # Sizes by split. Several: versions of the lists differ. Null: unknown; the videos are counted but not checked.
    videos: dict[Name, Count | tuple[Count, ...] | None]
    texts: dict[Name, Count | None]  # captions (a paragraph counts as one), or questions
    about: dict[Name, Count] = Field({})  # approximate number of videos of splits without an exact size; for the plan
    paragraph: bool = False  # join the captions of a video into its only text query
    # Several captions per video: `join` into a paragraph, `explode` into one training pair each, `keep` all as correct.
    several_captions: dict[Name, Rule] = Field({})
    optional_prefix: str = ""  # beginning of the file names that some copies lack
    several_videos_per_text: bool = False  # videos with equal captions are all correct for that caption
    trim_seconds: Annotated[float, Field(gt=0)] | None = None  # seconds from the start of each video that are used
    fine_tuned: InputSizes
    zero_shot: InputSizes | None = None
    max_answer_tokens: Count | None = None
    test: Name = "test"
    validation: Name | None  # the split used to select the checkpoint
    checkpoint: Literal["best", "last"]  # for fine-tuning: the best on the validation split, or the last
    typical: TypicalClip

    @model_validator(mode="after")
    def _agrees(self) -> "Protocol":
        splits = set(self.files)
        for name, values in (("videos", self.videos), ("texts", self.texts)):
            if set(values) != splits:
                raise ValueError(f"{name} must have the splits of files: {', '.join(self.files)}")
        if wrong := sorted(split for split in self.about if self.videos.get(split, 0) is not None):
            raise ValueError(f"about.{wrong[0]}: only for a split whose size in videos is null")
        if self.test not in splits:
            raise ValueError(f"test is {self.test!r}; files has: {', '.join(self.files)}")
        if self.validation == self.test or (self.validation is not None and self.validation not in splits):
            raise ValueError(f"validation must be another split than test, or null; is {self.validation!r}")
        if (self.checkpoint == "best") != (self.validation is not None):
            raise ValueError("checkpoint is `best` where there is a validation split, `last` where there is none")
        captioned = {split for split in splits if self.text_kind(split) == "captions"}
        if set(self.several_captions) != captioned:
            raise ValueError(f"several_captions must have the splits with captions: {', '.join(sorted(captioned))}")
        if captioned and self.paragraph != (set(self.several_captions.values()) == {"join"}):
            raise ValueError("paragraph: true goes with the rule `join` in all splits, and only with it")
        questions = self.task == "question_answering"
        if questions != (self.answers is not None) or questions != (self.max_answer_tokens is not None):
            raise ValueError("answers and max_answer_tokens belong to question_answering, and it needs both")
        return self

    def text_kind(self, split: str) -> Literal["captions", "questions", "choices"]:
        """The kind of texts in a split's file. Multiple choice is trained on captions."""
        if self.task == "question_answering":
            return "questions"
        return "choices" if self.task == "multiple_choice" and split == self.test else "captions"

    def sizes(self, split: str) -> tuple[int, ...]:
        """The official numbers of videos, several if versions differ; empty: unknown."""
        size = self.videos[split]
        return () if size is None else (size,) if isinstance(size, int) else size


def protocol_folder() -> Path:
    """Return the folder of the protocols, config/datasets.

    Raises:
        DatasetError: it does not exist.
    """
    try:
        return shipped("config/datasets")
    except NotShippedError as error:
        raise DatasetError(str(error)) from None


def protocol_names() -> list[str]:
    """The sorted names of the benchmarks that have a protocol."""
    return sorted(path.stem for path in protocol_folder().glob("*.yaml"))


@cache
def read_protocol(name: str) -> Protocol:
    """The protocol of a benchmark, for instance `msrvtt`.

    Raises:
        DatasetError: no protocol has this name, or its file is invalid.
    """
    path = protocol_folder() / f"{name}.yaml"
    if name not in protocol_names():
        raise DatasetError(f"there is no protocol {name!r}; config/datasets has: {', '.join(protocol_names())}")
    try:
        return Protocol.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeError, yaml.YAMLError, ValidationError) as error:
        raise DatasetError(f"{path}: is not a valid protocol: {error}") from error
