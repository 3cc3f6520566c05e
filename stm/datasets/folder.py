"""Lists the clips of a folder of videos, from its annotations or from its files, without opening any video."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stm.datasets.annotations import AnnotatedClip, AnnotationError, BadRow, parse_row, read_annotations
from stm.jobs.status import Status
from stm.manifest import make_key
from stm.storage.files import UnsafePathError, safe_join

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # extensions of images, which are single-frame clips


class DatasetError(ValueError):
    """An unusable dataset; the message contains the location of the problem and the remedy."""


@dataclass(frozen=True)
class Refused:
    """A clip that cannot enter the manifest, with the reason."""

    video_id: str
    path: str | None
    status: Status
    detail: str


@dataclass(frozen=True)
class NamedClip:
    """A clip with its id; `clip.path` is relative to the root, with forward slashes."""

    video_id: str
    clip: AnnotatedClip


def list_clips(
    root: Path, annotations: Path | None, extensions: Sequence[str], split: str
) -> tuple[list[NamedClip], list[Refused]]:
    """The usable and the refused clips of a folder.

    Args:
        annotations: annotation file; None: use every file under `root` with one of `extensions`.
        split: split of the clips whose annotation does not specify one.

    Raises:
        DatasetError: `root` is not a folder, or it contains no clips.
        AnnotationError: the annotations are unusable.
    """
    if not root.is_dir():
        raise DatasetError(
            f"dataset.root: {root} is not a folder; paths in a config are relative to where stm is started"
        )
    refused: list[Refused] = []
    if annotations is None:
        clips = list(_clips_in(root, extensions, split, refused))
    else:
        clips = list(_clips_of(annotations, split, refused))
    clips = list(_inside(root, clips, refused))
    if not clips and not refused:
        missing = f"no file ending in {', '.join(extensions)}" if annotations is None else f"no row in {annotations}"
        raise DatasetError(f"dataset.root: no clips in {root}: there is {missing}")
    return list(_named(clips, refused)), refused


def _clips_of(annotations: Path, split: str, refused: list[Refused]) -> Iterator[AnnotatedClip]:
    if not annotations.is_file():
        raise AnnotationError(f"dataset.annotations: there is no file {annotations}")
    for where, row in read_annotations(annotations):
        try:
            yield parse_row(row, split)
        except BadRow as error:
            path = row.get("path") if isinstance(row, dict) else None
            name = path if isinstance(path, str) and path else where
            refused.append(Refused(printable(name), None, Status.BAD_ROW, f"{where}: {error}"))


def _clips_in(root: Path, extensions: Sequence[str], split: str, refused: list[Refused]) -> Iterator[AnnotatedClip]:
    for path in sorted(walk_videos(root, extensions)):
        relative = path.relative_to(root).as_posix()
        if printable(relative) != relative:
            detail = "the file's name is not valid UTF-8; rename it"
            refused.append(Refused(printable(relative), printable(relative), Status.BAD_ROW, detail))
        elif path.is_dir():
            # Its target may be under the root as well, in which case its files would be found twice.
            refused.append(
                Refused(relative, relative, Status.PATH_OUTSIDE_ROOT, "a linked folder; links are not followed")
            )
        else:
            yield AnnotatedClip(relative, split)


def walk_videos(root: Path, extensions: Sequence[str]) -> Iterator[Path]:
    """The files under `root` with one of the extensions (in any case), and linked folders; hidden ones are skipped."""
    endings = tuple(ending.lower() for ending in extensions)
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        yield from (here / name for name in folders if not name.startswith(".") and (here / name).is_symlink())
        # Modified in place, so that `os.walk` descends only into these folders, in this order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in files if name.lower().endswith(endings) and not name.startswith("."))


def printable(text: str) -> str:
    """Text that can be encoded as UTF-8; undecodable bytes of file names are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _inside(root: Path, clips: Sequence[AnnotatedClip], refused: list[Refused]) -> Iterator[AnnotatedClip]:
    """The clips whose path is inside the root and refers to a file."""
    for clip in clips:
        name = printable(clip.video_id or clip.path)
        try:
            path = safe_join(root, clip.path)
            if path.is_file():
                yield clip
            else:
                what = "it is not a regular file" if path.exists() else "there is no such file"
                refused.append(Refused(name, printable(clip.path), Status.MISSING_FILE, what))
        except UnsafePathError:
            detail = "the path must be relative to dataset.root and stay under it, links resolved"
            refused.append(Refused(name, printable(clip.path), Status.PATH_OUTSIDE_ROOT, detail))
        except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, or a symlink loop
            reason = getattr(error, "strerror", None) or type(error).__name__
            refused.append(Refused(name, printable(clip.path), Status.MISSING_FILE, f"cannot be looked up: {reason}"))


def _named(clips: Sequence[AnnotatedClip], refused: list[Refused]) -> Iterator[NamedClip]:
    """Assigns ids; only the first of several clips with the same id is kept."""
    defaults = _default_ids({clip.path for clip in clips})
    named = (NamedClip(clip.video_id or defaults[clip.path] + _segment(clip), clip) for clip in clips)
    return drop_duplicates(named, refused)


def drop_duplicates(clips: Iterable[NamedClip], refused: list[Refused]) -> Iterator[NamedClip]:
    """The clips without duplicates, that is, without clips that have the id of an earlier clip."""
    taken: set[str] = set()
    for named in clips:
        key = make_key(named.video_id)
        if key in taken:
            detail = "an earlier clip has this video_id"
            refused.append(Refused(named.video_id, named.clip.path, Status.DUPLICATE_ID, detail))
            continue
        taken.add(key)
        yield named


def _default_ids(paths: set[str]) -> dict[str, str]:
    """Ids by path: the relative path without its extension, or with it if two ids would otherwise collide."""
    stems = {path: PurePosixPath(path).with_suffix("").as_posix() for path in paths}
    count: Counter[str] = Counter(stems.values())
    return {path: stem if count[stem] == 1 else PurePosixPath(path).as_posix() for path, stem in stems.items()}


def _segment(clip: AnnotatedClip) -> str:
    """The id suffix of a segment of a video: `@1.5-4` for seconds 1.5 to 4."""
    if clip.start is None and clip.end is None:
        return ""
    end = "" if clip.end is None else f"{clip.end!r}".removesuffix(".0")
    return f"@{clip.start or 0.0!r}".removesuffix(".0") + f"-{end}"


def row_of(named: NamedClip, facts: dict[str, Any]) -> dict[str, Any]:
    """A row of the manifest."""
    clip = named.clip
    return {
        "video_id": named.video_id,
        "key": make_key(named.video_id),
        "path": clip.path,
        "start": clip.start,
        "end": clip.end,
        "split": clip.split,
        "label": clip.label,
        "captions": list(clip.captions),
        "questions": [question._asdict() for question in clip.questions],
        **{name: facts.get(name) for name in _FACTS},
    }


_FACTS = ("fps", "width", "height", "codec", "frames", "duration", "bytes", "sha256")
