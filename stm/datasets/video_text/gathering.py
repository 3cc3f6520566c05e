"""From the lines of annotation files to clips: one for each video, with all that is said about it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from stm.datasets.annotations import Clip
from stm.datasets.find_videos import VIDEO_ENDINGS
from stm.datasets.folder import PICTURE_ENDINGS, Refused, printable
from stm.jobs.status import Status
from stm.manifest import Question


class Line(NamedTuple):
    """What a line says about one video; a line about several is several of these."""

    split: str
    where: str  # for messages
    path: str = ""  # as written
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    problem: str = ""  # why it cannot be used


@dataclass
class Gathered:
    """A list, sorted by video; the order is that in which they are first named."""

    clips: list[Clip] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)  # lines that cannot be used
    texts: Counter[str] = field(default_factory=Counter)  # captions, or questions, by split
    unusable: Counter[str] = field(default_factory=Counter)  # lines that cannot be used, by split


@dataclass
class _Video:
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


def gather(lines: Iterable[Line], *, end: float | None = None, paragraph: bool = False) -> Gathered:
    """Brings the lines about each video of a split together.

    Args:
        end: seconds; only this much of each video's beginning is taken.
        paragraph: a video's captions are joined into one, in their order, with a space between.
    """
    found = Gathered()
    videos: dict[tuple[str, str], _Video] = {}
    for line in lines:
        if line.problem:
            found.refused.append(Refused(line.where, None, Status.BAD_ROW, f"{line.where}: {line.problem}"))
            found.unusable[line.split] += 1
            continue
        path = PurePosixPath(line.path)
        if path.is_absolute() or ".." in path.parts or "\x00" in line.path:
            detail = f"{line.where}: the path must be relative to dataset.root and stay under it"
            name = printable(line.path.replace("\x00", "?"))
            found.refused.append(Refused(name, name, Status.PATH_OUTSIDE_ROOT, detail))
            found.unusable[line.split] += 1
            continue
        video = videos.setdefault((line.split, path.as_posix()), _Video())
        video.captions += line.captions
        video.questions += line.questions
    for (split, name), video in videos.items():
        captions = (" ".join(video.captions),) if paragraph and video.captions else tuple(video.captions)
        # A question that a multiple choice asks comes with the right caption, which is not counted a second time.
        found.texts[split] += len(video.questions) or len(captions)
        questions = tuple(video.questions)
        found.clips.append(Clip(name, split, make_id(name), captions=captions, end=end, questions=questions))
    return found


def make_id(path: str) -> str:
    """A file's path without the ending of a video or picture. Names such as LSMDC's have dots of their own."""
    stem, dot, ending = path.rpartition(".")
    return stem if f"{dot}{ending.lower()}" in (*VIDEO_ENDINGS, *PICTURE_ENDINGS) and stem else path
