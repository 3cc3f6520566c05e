"""Public corpora and benchmarks of videos, or pictures, with text: from their annotation files to clips.

As with the benchmarks of actions, nothing here opens a video, and nothing heavy is imported. Files are found by name
anywhere under the root for a benchmark, and by the listed path for a corpus, whose millions of names need not be kept.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stm.config import LanguageDataset
from stm.datasets.annotations import Clip
from stm.datasets.find_videos import Videos, list_videos, walk_files
from stm.datasets.folder import DatasetError, NamedClip, Refused, take_unique
from stm.datasets.official_lists import Annotations, Entry, Typical
from stm.datasets.video_text import benchmarks
from stm.datasets.video_text.cleaning import clean_text
from stm.datasets.video_text.corpora import CORPORA, SPLIT, read_corpus
from stm.datasets.video_text.gathering import Gathered, gather
from stm.datasets.video_text.protocol import Protocol, protocol_names, read_protocol
from stm.datasets.video_text.report import Counts, Report
from stm.jobs.status import Status

__all__ = [
    "CORPORA",
    "LanguageClips",
    "Protocol",
    "Report",
    "check_language",
    "clean_text",
    "has_pictures",
    "is_corpus",
    "official_counts",
    "protocol_names",
    "read_answers",
    "read_language",
    "read_protocol",
    "shape_of",
    "typical",
]

_SUBFOLDERS = ("anno_downstream", "anno_pretrain")  # of the shared folder of annotations


@dataclass(frozen=True)
class LanguageClips:
    """A corpus or benchmark as it lies on the disk."""

    clips: list[NamedClip]  # those with a file, in the order of the lists
    refused: list[Refused]  # the lists' other videos and lines, and why
    report: Report
    annotations: Mapping[Path, str]  # SHA-256 of the annotation files read, by path relative to their folder


def is_corpus(source: str) -> bool:
    """Whether a source is a pretraining corpus, which has no protocol and is never complete."""
    return source in CORPORA


def has_pictures(source: str) -> bool:
    """Whether its clips are single pictures."""
    return source in CORPORA and CORPORA[source].media == "picture"


def official_counts(source: str) -> dict[str, int]:
    """Clips by split of a whole copy, roughly where no more is known; without the splits of which nothing is."""
    if source in CORPORA:
        return {SPLIT: CORPORA[source].published}
    protocol = read_protocol(source)
    sizes = {split: protocol.sizes(split)[:1] or (protocol.about.get(split, 0),) for split in protocol.files}
    return {split: size for split, (size,) in sizes.items() if size}


def typical(source: str) -> Typical:
    """A typical clip, for planning."""
    if source in CORPORA:
        return CORPORA[source].typical
    clip = read_protocol(source).typical
    return Typical(clip.frames, clip.width, clip.height, clip.basis)


def shape_of(source: str) -> dict[str, Any]:
    """What decides how the lists of a source become clips, as JSON values; belongs into receipts."""
    if source in CORPORA:
        return {}
    shaping = {"task", "format", "files", "paragraph", "trim_seconds", "test"}
    return read_protocol(source).model_dump(mode="json", include=shaping)


def read_answers(dataset: LanguageDataset) -> tuple[str, ...]:
    """The list of answers of a question answering benchmark, as written.

    Raises:
        DatasetError: it has none, or the file is missing or is not what it should be.
    """
    if dataset.source in CORPORA:
        raise DatasetError(f"{dataset.source} is a corpus; it has no list of answers")
    protocol = read_protocol(dataset.source)
    return benchmarks.read_answers(protocol, Annotations(Path(dataset.annotations), protocol.title, _SUBFOLDERS))


def read_language(dataset: LanguageDataset) -> LanguageClips:
    """Reads the lists and looks for the file of each video: one clip a video, with all its captions and questions.

    The counts are not judged; see `check_language`.

    Raises:
        DatasetError: a folder or list is missing, or is not what it should be.
    """
    corpus, root = CORPORA.get(dataset.source), Path(dataset.root)
    protocol = None if corpus else read_protocol(dataset.source)
    title = corpus.title if corpus else protocol.title if protocol else ""
    annotations = Annotations(Path(dataset.annotations), title, _SUBFOLDERS)
    if corpus:
        said = gather(read_corpus(corpus, annotations))
        videos, by_path = _list_files(root), True
    else:
        assert protocol is not None
        lines = benchmarks.read_lists(protocol, annotations)
        said = gather(lines, end=protocol.trim_seconds, paragraph=protocol.paragraph)
        videos, by_path = list_videos(root), False
    refused, missing = list(said.refused), Counter[str]()
    found = _with_files(said.clips, videos, by_path, refused, missing)
    clips = list(take_unique(found, refused))
    splits = _count(said, clips, protocol, corpus.published if corpus else None)
    problems = tuple(f"{one.video_id}: {one.detail}" for one in refused if one.path not in missing)
    media = "pictures" if has_pictures(dataset.source) else "videos"
    report = Report(title, media, splits, missing, problems, tuple(videos.linked_folders))
    return LanguageClips(clips, refused, report, annotations.hashes)


def _count(
    said: Gathered, clips: list[NamedClip], protocol: Protocol | None, published: int | None
) -> dict[str, Counts]:
    listed = Counter(clip.split for clip in said.clips)
    there = Counter(named.clip.split for named in clips)
    if protocol is None:
        return {SPLIT: Counts(listed[SPLIT], there[SPLIT], said.texts[SPLIT], published=published)}
    return {
        split: Counts(listed[split], there[split], said.texts[split], protocol.sizes(split), protocol.texts[split])
        for split in protocol.files
    }


def _list_files(root: Path) -> Videos:
    """Every file under a corpus's root by its whole path, whatever its ending; nothing hidden, no linked folder."""
    if not root.is_dir():
        raise DatasetError(
            f"dataset.root: {root} is not a folder; paths in a config are relative to where stm is started"
        )
    videos = Videos(root)
    for path, link in walk_files(root, ""):
        if link and (root / path).is_dir():
            videos.linked_folders.append(path)
            continue
        videos.by_name[path] = [path]
        if link:
            videos.links.add(path)
    return videos


def _with_files(
    clips: list[Clip], videos: Videos, by_path: bool, refused: list[Refused], missing: Counter[str]
) -> list[NamedClip]:
    """The clips whose file is there, with its path; counts the clips of each file that is not."""
    shared = set() if by_path else _shared_names(clips)
    found = []
    for clip in clips:
        video_id = clip.video_id or clip.path
        path = _find_path(clip, videos) if by_path else _find_name(clip, videos, shared)
        if path is None:
            missing[clip.path] += 1
            refused.append(Refused(video_id, clip.path, Status.MISSING_FILE, "no file of this name is there"))
            continue
        wrong = videos.refuse(path)
        if wrong is not None:
            refused.append(Refused(video_id, path, *wrong))
            continue
        found.append(NamedClip(video_id, replace(clip, path=path)))
    return found


def _find_path(clip: Clip, videos: Videos) -> str | None:
    return clip.path if clip.path in videos.by_name else None


def _find_name(clip: Clip, videos: Videos, shared: set[str]) -> str | None:
    """By the file's name without its ending: converted copies are found too, as are names listed without one."""
    *folders, _ = clip.path.split("/")
    name = _name_of(clip)
    # `Entry.name` cuts an ending off; the names themselves may have dots.
    return videos.find(Entry(replace(clip, path=f"{name}.mp4"), folders=tuple(folders[-1:])), name in shared)


def _name_of(clip: Clip) -> str:
    return (clip.video_id or clip.path).rpartition("/")[2]


def _shared_names(clips: list[Clip]) -> set[str]:
    """File names that videos of different folders have."""
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for clip in clips:
        folders[_name_of(clip)].add(clip.path.rpartition("/")[0])
    return {name for name, places in folders.items() if len(places) > 1 and "" not in places}


def check_language(dataset: LanguageDataset, clips: LanguageClips | None = None) -> Report:
    """Whether a benchmark's copy is the official one and complete; of a corpus, whether there is anything.

    Args:
        clips: what `read_language` found, if it was asked already.

    Raises:
        DatasetError: there is not one file; or a benchmark's lists do not have the official sizes, as far as those are
            known; or files are missing and `dataset.partial` is not set. With the counts and the first missing files.
    """
    report = (clips or read_language(dataset)).report
    corpus = is_corpus(dataset.source)
    if not report.is_official:
        told = report.describe() if report.problems else report.table()
        raise DatasetError(
            f"dataset.annotations: the lists in {dataset.annotations} are not the official ones.\n{told}\n"
            "The lists must be whole, however many videos you have. "
            f"Get them from {read_protocol(dataset.source).lists_from}."
        )
    if not report.found:
        where = "at the listed paths below it" if corpus else "by name in any folder below it"
        raise DatasetError(
            f"dataset.root: {dataset.root} has no file of {report.title}.\n{report.describe()}\n"
            f"Files are found {where}; docs/datasets.md says what to download."
        )
    if not report.is_complete and not corpus and not dataset.partial:
        raise DatasetError(
            f"dataset.root: {dataset.root} is not all of {report.title}.\n{report.describe()}\n"
            "Complete the copy, or set `dataset.partial: true` to go on with the clips there are."
        )
    return report
