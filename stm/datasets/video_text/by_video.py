"""Groups the lines of annotation files into clips: one per video, with all its captions and questions."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from stm.datasets.annotations import AnnotatedClip
from stm.datasets.file_names import bare_name, printable
from stm.datasets.folder import IMAGE_ENDINGS, Refused
from stm.jobs.status import Status
from stm.manifest import Question


class AnnotationLine(NamedTuple):
    """The contents of a line for one video; a line about several videos becomes several objects."""

    split: str
    where: str  # position of the line, for messages
    path: str = ""  # unmodified
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    problem: str = ""  # why the line is unusable


@dataclass
class ListedVideos:
    """The contents of a list, grouped by video, in the order in which the videos first occur."""

    clips: list[AnnotatedClip] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)  # unusable lines
    texts: Counter[str] = field(default_factory=Counter)  # number of captions or questions per split


@dataclass
class _Video:
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


def group_by_video(
    lines: Iterable[AnnotationLine], *, end: float | None = None, paragraph: bool = False
) -> ListedVideos:
    """Combines the lines about each video of a split into one clip.

    Args:
        end: end of each clip, in seconds from the start of its video; None: the whole video.
        paragraph: join the captions of a video in order, separated by spaces.
    """
    listed = ListedVideos()
    videos: dict[tuple[str, str], _Video] = {}
    for line in lines:
        if line.problem:
            listed.refused.append(Refused(line.where, None, Status.BAD_ROW, f"{line.where}: {line.problem}"))
            continue
        path = PurePosixPath(line.path)
        # Lists come from the web, and their paths must not escape the root.
        if path.is_absolute() or ".." in path.parts or "\x00" in line.path:
            detail = f"{line.where}: the path must be relative to dataset.root and stay under it"
            name = printable(line.path.replace("\x00", "?"))
            listed.refused.append(Refused(name, name, Status.PATH_OUTSIDE_ROOT, detail))
            continue
        video = videos.setdefault((line.split, path.as_posix()), _Video())
        video.captions += line.captions
        video.questions += line.questions
    for (split, name), video in videos.items():
        captions = (" ".join(video.captions),) if paragraph and video.captions else tuple(video.captions)
        # A multiple-choice question comes with the correct caption, which is not counted a second time.
        listed.texts[split] += len(video.questions) or len(captions)
        questions = tuple(video.questions)
        listed.clips.append(AnnotatedClip(name, split, make_id(name), captions=captions, end=end, questions=questions))
    return listed


def make_id(path: str) -> str:
    """A file's path without its video or image extension; other dots, as in LSMDC's names, are kept.

    Lists of DiDeMo call a video `x.mov`, `x.mov.mp4` or `x.mp4`: its id is `x` in all of them.
    """
    folder, slash, name = path.rpartition("/")
    bare = bare_name(name)
    stem, dot, ending = name.rpartition(".")
    if bare == name and stem and f"{dot}{ending.lower()}" in IMAGE_ENDINGS:
        bare = stem
    return f"{folder}{slash}{bare}"
