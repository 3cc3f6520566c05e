"""Lists the clips of a folder of videos, from its annotations or from its files, without opening any video."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from stm.datasets.annotations import AnnotatedClip, AnnotationError, parse_row, read_annotations
from stm.datasets.file_lookup import FileLookup, walk_files
from stm.datasets.file_names import describe_similar, printable, same_spelling
from stm.datasets.text_files import BadRow
from stm.jobs.status import Status
from stm.manifest import make_key

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # extensions of images, which are single-frame clips


class DatasetError(ValueError):
    """An unusable dataset; the message contains the location of the problem and the remedy."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A clip that cannot enter the manifest, with the reason."""

    video_id: str
    path: str | None
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class NamedClip:
    """A clip with its id; `clip.path` is relative to the root, with forward slashes."""

    video_id: str
    clip: AnnotatedClip


@dataclass(frozen=True)
class Listing:
    """The clips of a dataset before any video is opened."""

    clips: list[NamedClip]
    refused: list[Refused]
    notes: tuple[str, ...] = ()  # what was left out or combined, for the log


def list_clips(root: Path, annotations: Path | None, extensions: Sequence[str], split: str) -> Listing:
    """The usable and the refused clips of a folder.

    Args:
        annotations: annotation file; None: use every file under `root` with one of `extensions`.
        split: split of the clips whose annotation does not specify one.

    Raises:
        DatasetError: `root` is not a folder, or it contains no clips.
        AnnotationError: the annotations are unusable.
    """
    check_root(root)
    refused: list[Refused] = []
    notes: list[str] = []
    if annotations is None:
        listed: Iterable[AnnotatedClip] = _clips_in(root, extensions, split, refused, notes)
    else:
        listed = _clips_of(annotations, split, refused)
    clips = list(_inside(root, listed, refused))
    if not clips and not refused:
        missing = f"no file ending in {', '.join(extensions)}" if annotations is None else f"no row in {annotations}"
        raise DatasetError("\n".join([f"dataset.root: no clips in {root}: there is {missing}", *notes]))
    merged = _merge_rows(_with_ids(clips))
    if len(merged) < len(clips):
        notes.append(
            f"{len(clips) - len(merged):,} rows add captions or questions to the clip of an earlier row, which has the same "
            "video, part, split and label"
        )
    return Listing(list(drop_duplicates(merged, refused)), refused, tuple(notes))


def check_root(root: Path) -> None:
    """Check that a dataset's root is a folder.

    Raises:
        DatasetError: it is not; the message says how the path is understood.
    """
    if root.is_dir():
        return
    if root.exists():
        raise DatasetError(f"dataset.root: {root} is not a folder, but a file; name the folder that holds the videos")
    raise DatasetError(f"dataset.root: {root} is not a folder; paths in a config are relative to where stm is started")


def _clips_of(annotations: Path, split: str, refused: list[Refused]) -> Iterator[AnnotatedClip]:
    if annotations.is_dir():
        raise AnnotationError(f"dataset.annotations: {annotations} is a folder; name the file with the annotations")
    if not annotations.is_file():
        raise AnnotationError(
            f"dataset.annotations: there is no file {annotations}; for a folder of videos without annotations, set it to null"
        )
    rows = read_annotations(annotations)
    rows.reverse()
    while rows:
        where, row = rows.pop()  # freed one by one, because the rows of a large file need as much memory as its clips
        try:
            yield parse_row(row, split)
        except BadRow as error:
            path = row.get("path") if isinstance(row, dict) else None
            name = path if isinstance(path, str) and path else where
            refused.append(Refused(printable(name), None, Status.BAD_ROW, f"{where}: {error}"))


def _clips_in(
    root: Path, extensions: Sequence[str], split: str, refused: list[Refused], notes: list[str]
) -> Iterator[AnnotatedClip]:
    unreadable: list[tuple[str, str]] = []
    others: Counter[str] = Counter()
    hidden: list[str] = []
    for relative, link in walk_videos(root, extensions, unreadable, others, hidden):
        if printable(relative) != relative:
            detail = "the file's name is not valid UTF-8; rename it"
            refused.append(Refused(printable(relative), printable(relative), Status.BAD_ROW, detail))
        elif link and (root / relative).is_dir():
            # Its target may be under the root as well, in which case its files would be found twice.
            refused.append(
                Refused(relative, relative, Status.PATH_OUTSIDE_ROOT, "a linked folder; links are not followed")
            )
        else:
            yield AnnotatedClip(relative, split)
    refused += refuse_folders(unreadable)
    notes += describe_others(others, "dataset.extensions")
    notes += _describe_hidden(hidden, extensions)


def refuse_folders(unreadable: Iterable[tuple[str, str]]) -> list[Refused]:
    """A refusal per subfolder that may not be entered."""
    return [
        Refused(
            printable(folder), printable(folder), Status.OPEN_FAILED,
            f"a folder that cannot be read ({reason}): videos in it are not in the manifest",
        )
        for folder, reason in unreadable
    ]  # fmt: skip


_SHOWN_ENDINGS = 10


def describe_others(others: Counter[str], where: str) -> list[str]:
    """A line that counts the files whose ending is not looked for, by ending; no line if there are none.

    Args:
        where: what decides the endings.
    """
    if not others:
        return []
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{printable(ending) or '(no ending)'} ({count:,})" for ending, count in ordered[:_SHOWN_ENDINGS]]
    more = f" and {len(ordered) - _SHOWN_ENDINGS:,} more endings" if len(ordered) > _SHOWN_ENDINGS else ""
    return [
        f"{others.total():,} files are ignored, because their endings are not among {where}: {', '.join(shown)}{more}"
    ]


def _describe_hidden(hidden: Iterable[str], extensions: Sequence[str]) -> list[str]:
    """A line that counts the hidden folders, and the hidden files with one of the extensions; no line if there are none."""
    endings = ("/", *(ending.lower() for ending in extensions))
    paths = [path for path in hidden if path.lower().endswith(endings)]
    if not paths:
        return []
    shown = ", ".join(printable(path) for path in paths[:_SHOWN_ENDINGS])
    more = f" and {len(paths) - _SHOWN_ENDINGS:,} more" if len(paths) > _SHOWN_ENDINGS else ""
    return [f"{len(paths):,} videos and folders are ignored, because they are hidden: {shown}{more}"]


def walk_videos(
    root: Path,
    extensions: Sequence[str],
    unreadable: list[tuple[str, str]] | None = None,
    others: Counter[str] | None = None,
    hidden: list[str] | None = None,
) -> Iterator[tuple[str, bool]]:
    """(relative path, whether it is a link) per file under `root` with one of the extensions, and per linked folder.

    Extensions match in any case; hidden files and folders are skipped.

    Args:
        unreadable: receives the subfolders that may not be entered; see `walk_files`.
        others: counts the other files by extension.
        hidden: receives the hidden files and folders; see `walk_files`.
    """
    endings = tuple(ending.lower() for ending in extensions)
    for path, link in walk_files(root, [] if unreadable is None else unreadable, hidden):
        name = path.rpartition("/")[2].lower()
        if name.endswith(endings) or (link and (root / path).is_dir()):
            yield path, link
        elif others is not None:
            others[PurePosixPath(name).suffix] += 1


def _inside(root: Path, clips: Iterable[AnnotatedClip], refused: list[Refused]) -> Iterator[AnnotatedClip]:
    """The clips whose path is inside the root and refers to a file, with the path as on disk."""
    lookup = FileLookup(root)
    known: dict[str, tuple[str, Status | None, str]] = {}  # many clips may be parts of one file
    for clip in clips:
        found = known.get(clip.path)
        if found is None:
            found = known[clip.path] = lookup.find(clip.path)
        path, status, detail = found
        if status is None:
            yield clip if path == clip.path else replace(clip, path=path)
        else:
            if status is Status.MISSING_FILE:
                detail += describe_similar(lookup.similar(clip.path))
            refused.append(Refused(printable(clip.video_id or clip.path), printable(clip.path), status, detail))


def _with_ids(clips: Sequence[AnnotatedClip]) -> Iterator[NamedClip]:
    defaults = _default_ids({clip.path for clip in clips})
    return (
        NamedClip(clip.video_id or defaults[clip.path] + segment_suffix(clip.start, clip.end), clip) for clip in clips
    )


def _merge_rows(clips: Iterable[NamedClip]) -> list[NamedClip]:
    """One clip for all rows of a clip that differ only in their texts: many lists have one row per caption.

    Repeated captions are kept, as in the official lists.
    """
    merged: list[NamedClip] = []
    places: dict[str, int] = {}  # index in `merged` of the first row with an id
    for named in clips:
        place = places.setdefault(named.video_id, len(merged))
        if place == len(merged) or not (named.clip.captions or named.clip.questions):
            merged.append(named)
            continue
        first = merged[place].clip
        if _differences(first, named.clip):
            merged.append(named)
            continue
        captions, questions = first.captions + named.clip.captions, first.questions + named.clip.questions
        merged[place] = NamedClip(named.video_id, replace(first, captions=captions, questions=questions))
    return merged


def _differences(one: AnnotatedClip, other: AnnotatedClip) -> list[str]:
    """The names of the values, other than texts, in which two clips differ."""
    return [name for name in ("path", "start", "end", "split", "label") if getattr(one, name) != getattr(other, name)]


def drop_duplicates(clips: Iterable[NamedClip], refused: list[Refused]) -> Iterator[NamedClip]:
    """The clips without duplicates, that is, without clips that have the id of an earlier clip.

    Ids that differ only in the composition of accents look the same, and count as the same.
    """
    taken: dict[str, NamedClip] = {}
    for named in clips:
        earlier = taken.setdefault(same_spelling(named.video_id), named)
        if earlier is named:
            yield named
            continue
        other = ", ".join(_differences(earlier.clip, named.clip))
        detail = "an earlier clip has this video_id" + (f", and another {other}" if other else "")
        refused.append(Refused(named.video_id, named.clip.path, Status.DUPLICATE_ID, detail))


def _default_ids(paths: set[str]) -> dict[str, str]:
    """Ids by path: the relative path without its extension, or with it if two ids would otherwise collide.

    In NFC, so that the ids of a dataset do not depend on the file system that it was copied from.
    """
    stems = {path: same_spelling(PurePosixPath(path).with_suffix("").as_posix()) for path in paths}
    count: Counter[str] = Counter(stems.values())
    return {path: stem if count[stem] == 1 else same_spelling(path) for path, stem in stems.items()}


def segment_suffix(start: float | None, end: float | None) -> str:
    """The id suffix of a segment of a video: `@1.5-4` for seconds 1.5 to 4; empty for a whole video."""
    if start is None and end is None:
        return ""
    until = "" if end is None else f"{end!r}".removesuffix(".0")
    return f"@{start or 0.0!r}".removesuffix(".0") + f"-{until}"


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


_FACTS = ("fps", "width", "height", "codec", "frames", "duration", "bytes", "sha256", "ends_hash")
