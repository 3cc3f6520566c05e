"""Public corpora and benchmarks of videos or images with text: reads their annotation files into clips.

As in `stm.datasets.actions`, no video is opened and no heavy library is imported. The files of a benchmark are found by
name anywhere under the root, those of a corpus by their listed path, because a corpus is too large to index by name.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stm.config import LanguageDataset
from stm.datasets.annotations import AnnotatedClip
from stm.datasets.copies import CopyReport, DatasetCopy, SplitCounts, check_copy, match_files, report_copy
from stm.datasets.file_lookup import walk_files
from stm.datasets.file_names import ARCHIVE_ENDINGS, same_spelling
from stm.datasets.find_videos import Videos, ending_of, list_videos
from stm.datasets.folder import DatasetError, check_root, refuse_folders
from stm.datasets.official_lists import Annotations, Entry, Typical
from stm.datasets.video_text import benchmarks
from stm.datasets.video_text.by_video import ListedVideos, group_by_video
from stm.datasets.video_text.cleaning import clean_text
from stm.datasets.video_text.corpora import CORPORA, SPLIT, PretrainingCorpus, read_corpus
from stm.datasets.video_text.protocol import Protocol, protocol_names, read_protocol

__all__ = [
    "CORPORA",
    "Protocol",
    "check_language",
    "clean_text",
    "find_answers",
    "has_images",
    "is_corpus",
    "official_counts",
    "protocol_names",
    "protocol_settings",
    "read_answers",
    "read_language",
    "read_protocol",
    "typical",
]

_SUBFOLDERS = ("anno_downstream", "anno_pretrain")  # of the shared annotation folder


def is_corpus(source: str) -> bool:
    """Whether a source is a pretraining corpus, which has no protocol and is never checked for completeness."""
    return source in CORPORA


def has_images(source: str) -> bool:
    """Whether the clips of a source are single images."""
    return source in CORPORA and CORPORA[source].media == "image"


def official_counts(source: str) -> dict[str, int]:
    """Clips per split of a complete copy, approximate if not known exactly; splits of unknown size are omitted."""
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


def protocol_settings(source: str) -> dict[str, Any]:
    """The protocol settings that determine how lists are converted to clips, as JSON values; for receipts."""
    if source in CORPORA:
        return {}
    shaping = {"task", "format", "files", "paragraph", "trim_seconds", "test"}
    return read_protocol(source).model_dump(mode="json", include=shaping)


def _annotations(dataset: LanguageDataset, about: Protocol | PretrainingCorpus) -> Annotations:
    return Annotations(Path(dataset.annotations), about.title, _SUBFOLDERS, about.lists_from)


def read_answers(dataset: LanguageDataset) -> tuple[str, ...]:
    """The unmodified answer list of a question answering benchmark.

    Raises:
        DatasetError: the benchmark has no such list, or the file is missing or does not have the expected format.
    """
    if dataset.source in CORPORA:
        raise DatasetError(f"{dataset.source} is a corpus; it has no list of answers")
    protocol = read_protocol(dataset.source)
    return benchmarks.read_answers(protocol, _annotations(dataset, protocol))


def find_answers(dataset: LanguageDataset) -> Path | None:
    """The file that `read_answers` reads; None if the benchmark has none, or if it is not there (yet)."""
    protocol = None if dataset.source in CORPORA else read_protocol(dataset.source)
    if protocol is None or protocol.answers is None:
        return None
    try:
        return _annotations(dataset, protocol).find(protocol.answers)
    except DatasetError:
        return None


def read_language(dataset: LanguageDataset) -> DatasetCopy:
    """Reads the lists and searches for the file of each video: one clip per video, with all its captions and questions.

    The counts are not checked here; see `check_language`.

    Raises:
        DatasetError: a folder or list is missing, or does not have the expected format.
    """
    if dataset.source in CORPORA:
        return _read_corpus(dataset)
    protocol = read_protocol(dataset.source)
    annotations = _annotations(dataset, protocol)
    lines = benchmarks.read_lists(protocol, annotations)
    listed = group_by_video(lines, end=protocol.trim_seconds, paragraph=protocol.paragraph)
    videos = list_videos(Path(dataset.root))
    shared = _shared_names(listed.clips)
    files = ((clip, _find_name(clip, videos, shared, protocol.optional_prefix)) for clip in listed.clips)
    splits = {
        split: SplitCounts(official=protocol.sizes(split), official_texts=protocol.texts[split])
        for split in protocol.files
    }
    return _copy(protocol.title, "videos", annotations, listed, files, videos, splits)


def _read_corpus(dataset: LanguageDataset) -> DatasetCopy:
    corpus = CORPORA[dataset.source]
    annotations = _annotations(dataset, corpus)
    listed = group_by_video(read_corpus(corpus, annotations))
    videos = _list_files(Path(dataset.root))
    by_name = _by_unique_name(listed.clips, videos) if corpus.unique_names else {}
    files = ((clip, _find_path(clip.path, videos) or by_name.get(clip.path)) for clip in listed.clips)
    splits = {SPLIT: SplitCounts(published=corpus.published)}
    return _copy(corpus.title, f"{corpus.media}s", annotations, listed, files, videos, splits)


def _copy(
    title: str,
    media: str,
    annotations: Annotations,
    listed: ListedVideos,
    files: Iterator[tuple[AnnotatedClip, str | None]],
    videos: Videos,
    expected: dict[str, SplitCounts],
) -> DatasetCopy:
    """The copy of a dataset, built from the contents of its lists and the existing files."""
    matched = match_files(files, videos, listed.refused)
    clips = Counter(clip.split for clip in listed.clips)
    on_disk = Counter(named.clip.split for named in matched.clips)
    splits = {
        split: replace(counts, listed=clips[split], found=on_disk[split], texts=listed.texts[split])
        for split, counts in expected.items()
    }
    report = report_copy(title, media, splits, matched, videos)
    return DatasetCopy(
        matched.clips, [*matched.refused, *refuse_folders(videos.unreadable)], report, annotations.hashes
    )


def _list_files(root: Path) -> Videos:
    """All files under a corpus's root by full path, with any extension; hidden files and linked folders are skipped.

    Archives are listed as well, for the message: `img2dataset`, for instance, writes tar files.
    """
    check_root(root)
    videos = Videos(root)
    for path, link in walk_files(root, videos.unreadable):
        if link and (root / path).is_dir():
            videos.linked_folders.append(path)
            continue
        if ending_of(path) in ARCHIVE_ENDINGS:
            videos.others[path] = [path]
            continue
        videos.by_name[path] = [path]
        if link:
            videos.links.add(path)
    return videos


def _find_path(path: str, videos: Videos) -> str | None:
    """The file at a listed path, or at one that differs only in how accents are composed."""
    if path in videos.by_name or path.isascii():
        return path if path in videos.by_name else None
    spelt = [other for other in videos.candidates(path) if same_spelling(other) == same_spelling(path)]
    return spelt[0] if len(spelt) == 1 else None


def _by_unique_name(clips: list[AnnotatedClip], videos: Videos) -> dict[str, str]:
    """By listed path: the only file with its name, in a copy that has other folders than the list and not one of its paths.

    WebVid's own download, for instance, sorts the videos into folders that the shared lists do not have.
    """
    if any(clip.path in videos.by_name for clip in clips):
        return {}
    files: defaultdict[str, list[str]] = defaultdict(list)
    for path in videos.by_name:
        files[path.rpartition("/")[2]].append(path)
    listed = Counter(clip.path.rpartition("/")[2] for clip in clips)
    names = ((clip.path, clip.path.rpartition("/")[2]) for clip in clips)
    return {path: files[name][0] for path, name in names if listed[name] == 1 and len(files.get(name, ())) == 1}


def _find_name(clip: AnnotatedClip, videos: Videos, shared: set[str], prefix: str) -> str | None:
    """Finds a file by its name without extension, so that converted files and names listed without extension match.

    Args:
        prefix: beginning of the names that some copies have and others do not; may be empty.
    """
    *folders, _ = clip.path.split("/")
    name = _name_of(clip)
    other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
    return videos.find(Entry(clip, (other,) if prefix else (), tuple(folders[-1:])), name in shared)


def _name_of(clip: AnnotatedClip) -> str:
    return (clip.video_id or clip.path).rpartition("/")[2]


def _shared_names(clips: list[AnnotatedClip]) -> set[str]:
    """File names shared by videos in different folders."""
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for clip in clips:
        folders[_name_of(clip)].add(clip.path.rpartition("/")[0])
    return {name for name, places in folders.items() if len(places) > 1 and "" not in places}


def check_language(dataset: LanguageDataset, copy: DatasetCopy | None = None) -> CopyReport:
    """Checks that a benchmark's copy is official and complete, or that a corpus has at least one file.

    Args:
        copy: the result of `read_language`, if it has been called already.

    Raises:
        DatasetError: no file exists, a benchmark's lists do not have the official sizes (if these are known), or files are
            missing and `dataset.partial` is not set. The message contains the counts and the first missing files.
    """
    report = (copy or read_language(dataset)).report
    if is_corpus(dataset.source):
        return check_copy(report, dataset, "", "at the listed paths below it", may_be_partial=True)
    return check_copy(report, dataset, read_protocol(dataset.source).lists_from)
