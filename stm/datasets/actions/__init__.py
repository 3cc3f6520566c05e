"""Public benchmarks: from their official annotation files to clips, with the official sizes checked.

Nothing here opens a video, and nothing heavy is imported: a workflow can ask before it starts.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stm.config import BenchmarkDataset
from stm.datasets.actions import diving48, epic_kitchens, hmdb51, kinetics, something_something, ucf101
from stm.datasets.completeness import Report, SplitCounts
from stm.datasets.find_videos import Videos, list_videos
from stm.datasets.folder import DatasetError, NamedClip, Refused, printable, take_unique
from stm.datasets.official_lists import Annotations, Benchmark, Entry, Settings, Typical
from stm.jobs.status import Status

__all__ = [
    "BENCHMARKS",
    "BenchmarkClips",
    "Report",
    "Typical",
    "check_benchmark",
    "official_counts",
    "read_benchmark",
    "typical",
]

BENCHMARKS: dict[str, Benchmark] = {
    "kinetics-400": kinetics.BENCHMARK,
    "something-something-v2": something_something.BENCHMARK,
    "ucf101": ucf101.BENCHMARK,
    "hmdb51": hmdb51.BENCHMARK,
    "diving48": diving48.BENCHMARK,
    "epic-kitchens-55": epic_kitchens.BENCHMARK,
}


@dataclass(frozen=True)
class BenchmarkClips:
    """A benchmark as it lies on the disk."""

    clips: list[NamedClip]  # those with a file, in the order of the lists
    refused: list[Refused]  # the lists' other lines, and why
    official: Mapping[str, int]  # clips by split
    report: Report
    annotations: Mapping[Path, str]  # SHA-256 of the annotation files read, by path relative to their folder


def official_counts(source: str, fold: int = 1) -> dict[str, int]:
    """Clips by split of a whole copy; `fold` is the split number of UCF101 and HMDB51, others have one."""
    return dict(BENCHMARKS[source].official(fold))


def typical(source: str) -> Typical:
    """A typical clip of a benchmark, for planning."""
    return BENCHMARKS[source].typical


def read_benchmark(dataset: BenchmarkDataset) -> BenchmarkClips:
    """Reads the official lists and looks for each clip's file by name, wherever it lies under the root.

    The counts are not judged; see `check_benchmark`.

    Raises:
        DatasetError: a folder or list is missing, or is not what it should be.
    """
    benchmark = BENCHMARKS[dataset.source]
    annotations = Annotations(Path(dataset.annotations), benchmark.title, benchmark.subfolders)
    entries = list(benchmark.read(annotations, Settings(dataset.fold, dataset.label)))
    videos = list_videos(Path(dataset.root))
    refused: list[Refused] = []
    missing: Counter[str] = Counter()
    found = list(_with_files(entries, videos, refused, missing))
    official = benchmark.official(dataset.fold)
    listed = Counter(entry.clip.split for entry in entries)
    clips = list(take_unique(found, refused))
    there = Counter(named.clip.split for named in clips)
    splits = {split: SplitCounts(official.get(split, 0), listed[split], there[split]) for split in [*official, *listed]}
    problems = tuple(f"{one.video_id}: {one.detail}" for one in refused if one.path not in missing)
    report = Report(benchmark.title, splits, missing, problems, tuple(videos.linked_folders))
    return BenchmarkClips(clips, refused, official, report, annotations.hashes)


def _with_files(
    entries: Sequence[Entry], videos: Videos, refused: list[Refused], missing: Counter[str]
) -> Iterator[NamedClip]:
    """The entries whose file is there, with its path; counts the clips of each file that is not."""
    shared = _shared_names(entries)
    for entry in entries:
        video_id = entry.clip.video_id or entry.clip.path
        if entry.problem:
            refused.append(Refused(printable(video_id), None, Status.BAD_ROW, entry.problem))
            continue
        path = videos.find(entry, entry.name in shared)
        if path is None:
            missing[entry.clip.path] += 1
            refused.append(Refused(video_id, entry.clip.path, Status.MISSING_FILE, "no file of this name is there"))
            continue
        wrong = videos.refuse(path)
        if wrong is not None:
            refused.append(Refused(video_id, path, *wrong))
            continue
        yield NamedClip(video_id, replace(entry.clip, path=path))


def _shared_names(entries: Sequence[Entry]) -> set[str]:
    """File names that entries of different folders have; segments of one video share theirs rightly."""
    folders: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for entry in entries:
        if entry.folders:
            folders[entry.name].add(entry.folders)
    return {name for name, places in folders.items() if len(places) > 1}


def check_benchmark(dataset: BenchmarkDataset, clips: BenchmarkClips | None = None) -> Report:
    """Whether a copy is the official one and complete; takes seconds, as it only lists folders and reads the lists.

    Args:
        clips: what `read_benchmark` found, if it was asked already.

    Raises:
        DatasetError: the lists do not have the official sizes; or files are missing and `dataset.partial` is not set;
            or there is not one. With the counts, the first missing files, and what to do.
    """
    benchmark = BENCHMARKS[dataset.source]
    report = (clips or read_benchmark(dataset)).report
    if not report.is_official:
        raise DatasetError(
            f"dataset.annotations: the lists in {dataset.annotations} are not the official ones.\n{report.table()}\n"
            f"The lists must be whole, however many videos you have. Get them from {benchmark.lists_from}."
        )
    if not report.found:
        raise DatasetError(
            f"dataset.root: {dataset.root} has no file of {benchmark.title}.\n{report.describe()}\n"
            "Files are found by name in any folder below; docs/datasets.md says what to download."
        )
    if not report.is_complete and not dataset.partial:
        raise DatasetError(
            f"dataset.root: {dataset.root} is not all of {benchmark.title}.\n{report.describe()}\n"
            "Complete the copy, or set `dataset.partial: true` to go on with the clips there are."
        )
    return report
