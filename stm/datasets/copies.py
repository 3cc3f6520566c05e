"""The local copy of a public dataset: the listed clips whose files exist, and a comparison with the official counts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stm.config import BenchmarkDataset, LanguageDataset
from stm.datasets.annotations import AnnotatedClip
from stm.datasets.file_names import describe_similar, printable
from stm.datasets.find_videos import Videos
from stm.datasets.folder import DatasetError, NamedClip, Refused, describe_others, drop_duplicates
from stm.jobs.status import Status

_SHOWN = 10
_MOST_INDEXED = 1_000_000  # files


@dataclass(frozen=True)
class SplitCounts:
    """The counts of one split: clips, and texts if the dataset has any."""

    listed: int = 0  # clips in the lists
    found: int = 0  # listed clips whose file exists
    official: tuple[int, ...] = ()  # clips; several if official versions differ; empty: unknown
    published: int | None = None  # clips, according to the authors; not checked
    texts: int | None = None  # captions or questions in the lists
    official_texts: int | None = None

    @property
    def is_official(self) -> bool:
        """Whether the list has the official size; true if that is unknown."""
        clips = not self.official or self.listed in self.official
        return clips and self.official_texts in (None, self.texts)

    @property
    def shown_official(self) -> str:
        """The official number of clips (the matching one if there are several), with `~` if it is not checked."""
        if self.published is not None:
            return f"~{self.published:,}"
        if not self.official:
            return "?"
        return f"{self.listed if self.listed in self.official else self.official[0]:,}"


@dataclass(frozen=True)
class CopyReport:
    """How complete a copy is."""

    title: str
    media: str  # plural noun for the samples: `clips`, `videos` or `images`
    splits: Mapping[str, SplitCounts]
    missing: Mapping[str, int]  # number of clips per missing file, by listed name
    problems: tuple[str, ...] = ()  # unusable lines and links
    similar: Mapping[str, Sequence[str]] = field(default_factory=dict)  # files that may be missing ones, by listed name
    linked_folders: tuple[str, ...] = ()  # not searched
    skipped: tuple[str, ...] = ()  # what else was not looked at; see `describe_skipped`

    @property
    def is_official(self) -> bool:
        """Whether the lists have the official sizes."""
        return all(counts.is_official for counts in self.splits.values())

    @property
    def is_complete(self) -> bool:
        return not self.problems and all(counts.found == counts.listed for counts in self.splits.values())

    @property
    def found(self) -> int:
        return sum(counts.found for counts in self.splits.values())

    def describe(self) -> str:
        """The table of counts, the first missing files, and the first unusable lines."""
        lines = [self.table()]
        if self.missing:
            clips = sum(self.missing.values())
            lines.append(f"{clips:,} {self.media} have no file. The first of {len(self.missing):,} missing files:")
            for name, count in list(self.missing.items())[:_SHOWN]:
                clips_of_file = f" ({count:,} {self.media})" if count > 1 else ""
                lines.append(f"  {printable(name)}{clips_of_file}{describe_similar(self.similar.get(name, ()))}")
        if self.problems:
            lines.append(f"{len(self.problems):,} lines or files cannot be used. The first:")
            lines += [f"  {problem}" for problem in self.problems[:_SHOWN]]
        if self.linked_folders and not self.is_complete:
            shown = ", ".join(self.linked_folders[:_SHOWN])
            lines.append(
                f"Linked folders are not searched: {shown}. Set dataset.root to the folder that they point to."
            )
        return "\n".join([*lines, *self.skipped])

    def table(self) -> str:
        """The counts per split; `?` for an unknown official number, `~` before a number that is not checked."""
        width = max(5, *(len(split) for split in self.splits))
        has_texts = any(counts.texts is not None for counts in self.splits.values())
        head = ["official", "listed", "on disk"] + (["texts", "official"] if has_texts else [])
        lines = [f"{self.title}: {self.media}" + (", and texts about them" if has_texts else "")]
        lines.append(f"  {'split':{width}}" + "".join(f" {name:>12}" for name in head))
        for split, counts in self.splits.items():
            cells = [counts.shown_official, f"{counts.listed:,}", f"{counts.found:,}"]
            if has_texts:
                cells += ["?" if n is None else f"{n:,}" for n in (counts.texts, counts.official_texts)]
            lines.append(f"  {split:{width}}" + "".join(f" {cell:>12}" for cell in cells))
        return "\n".join(lines)


@dataclass(frozen=True)
class DatasetCopy:
    """A benchmark or corpus as stored on disk."""

    clips: list[NamedClip]  # clips whose file exists, in the order of the lists
    refused: list[Refused]  # all other clips and lines of the lists, with reasons
    report: CopyReport
    annotations: Mapping[Path, str]  # SHA-256 of the annotation files read, by path relative to their folder


@dataclass(frozen=True)
class MatchedFiles:
    """The listed clips, matched with files."""

    clips: list[NamedClip]  # with the path of the file on disk
    refused: list[Refused]
    missing: Counter[str]  # number of clips per missing file, by listed name

    @property
    def problems(self) -> tuple[str, ...]:
        """The refusals for reasons other than a missing file."""
        refused = [one for one in self.refused if one.path not in self.missing]
        # A line that cannot be read is named after its place, with which its detail begins.
        return tuple(
            one.detail if one.detail.startswith(f"{one.video_id}: ") else f"{one.video_id}: {one.detail}"
            for one in refused
        )


def report_copy(
    title: str, media: str, splits: Mapping[str, SplitCounts], matched: MatchedFiles, videos: Videos
) -> CopyReport:
    """The report of the listed clips that have been matched with the files of a folder."""
    # An index of the names of millions of files takes gigabytes: only if the copy is of no use without the hint.
    hints = not matched.clips or len(videos.by_name) < _MOST_INDEXED
    similar = videos.similar(list(matched.missing)[:_SHOWN] if hints else [])
    skipped = _describe_skipped(videos, [named.clip.path for named in matched.clips])
    linked = tuple(videos.linked_folders)
    return CopyReport(title, media, splits, matched.missing, matched.problems, similar, linked, skipped)


def _describe_skipped(videos: Videos, used: Iterable[str]) -> tuple[str, ...]:
    """Lines about folders that cannot be read, files that do not have the ending of a video, and archives."""
    shown = ", ".join(f"{printable(folder)} ({reason})" for folder, reason in videos.unreadable[:_SHOWN])
    folders = [f"{len(videos.unreadable):,} folders cannot be read. The first: {shown}"] if shown else []
    archives = [
        f"{len(videos.archives):,} archives are not read; unpack them below dataset.root: "
        f"{', '.join(map(printable, videos.archives[:_SHOWN]))}"
    ]
    others = describe_others(videos.count_others(used), "those of videos")
    return (*folders, *others, *(archives if videos.archives else ()))


def match_files(
    clips: Iterable[tuple[AnnotatedClip, str | None]], videos: Videos, refused: Iterable[Refused]
) -> MatchedFiles:
    """Divides listed clips into clips with a usable file and refused clips.

    Args:
        clips: each clip with the path of its file, relative to the root; None if the file is missing.
        refused: lines of the lists that have already been refused.
    """
    refusals, missing, named = list(refused), Counter[str](), []
    for clip, path in clips:
        video_id = clip.video_id or clip.path
        if path is None:
            missing[clip.path] += 1
            refusals.append(Refused(video_id, clip.path, Status.MISSING_FILE, "there is no file of this name"))
            continue
        problem = videos.refuse(path)
        if problem is not None:
            refusals.append(Refused(video_id, path, *problem))
            continue
        named.append(NamedClip(video_id, replace(clip, path=path)))
    unique = list(drop_duplicates(named, refusals))
    return MatchedFiles(unique, refusals, missing)


def check_copy(
    report: CopyReport,
    dataset: BenchmarkDataset | LanguageDataset,
    lists_from: str,
    places: str = "by name in any folder below it",
    may_be_partial: bool = False,
) -> CopyReport:
    """Checks that a copy is usable, and returns its report.

    Args:
        lists_from: download location of the lists, for the message.
        places: searched folders, for the message.
        may_be_partial: accept missing files, regardless of `dataset.partial`.

    Raises:
        DatasetError: the lists do not have the official sizes, files are missing and the copy may not be partial, or no
            file exists. The message contains the counts, the first missing files, and the remedy.
    """
    if not report.is_official:
        shown = report.describe() if report.problems else report.table()
        raise DatasetError(
            f"dataset.annotations: the lists in {dataset.annotations} are not the official ones.\n{shown}\n"
            f"The lists must be complete, however many videos you have. Get them from {lists_from}."
        )
    if not report.found:
        raise DatasetError(
            f"dataset.root: {dataset.root} has no file of {report.title}.\n{report.describe()}\n"
            f"Files are searched {places}; docs/datasets.md says what to download."
        )
    if not report.is_complete and not may_be_partial and not dataset.partial:
        raise DatasetError(
            f"dataset.root: {dataset.root} is not a complete copy of {report.title}.\n{report.describe()}\n"
            "Complete it, or set `dataset.partial: true` to use the clips that exist."
        )
    return report
