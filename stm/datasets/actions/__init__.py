"""Public action recognition benchmarks: reads their official annotation files and checks the official sizes.

Each module of this package declares one benchmark in `BENCHMARK`. This package opens no video and imports no heavy
library, so that the workflow can check a copy before it starts.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from stm.config import BenchmarkDataset
from stm.datasets.annotations import AnnotatedClip
from stm.datasets.copies import CopyReport, DatasetCopy, SplitCounts, check_copy, match_files, report_copy
from stm.datasets.file_names import printable
from stm.datasets.find_videos import Videos, list_videos
from stm.datasets.folder import Refused, refuse_folders
from stm.datasets.official_lists import Annotations, Benchmark, Entry, Settings, Typical
from stm.jobs.status import Status

__all__ = ["BENCHMARKS", "check_benchmark", "official_counts", "read_benchmark", "typical"]


def _declared() -> dict[str, Benchmark]:
    """The benchmarks declared by this package's modules, keyed by `dataset.source`."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {module.BENCHMARK.source: module.BENCHMARK for module in modules}


BENCHMARKS = _declared()


def official_counts(source: str, fold: int = 1) -> dict[str, int]:
    """Clips per split of a complete copy; `fold` is the split index of UCF101 and HMDB51; all others have one."""
    return dict(BENCHMARKS[source].official(fold))


def typical(source: str) -> Typical:
    """A typical clip of a benchmark, for planning."""
    return BENCHMARKS[source].typical


def read_benchmark(dataset: BenchmarkDataset) -> DatasetCopy:
    """Reads the official lists and searches for each clip's file by name, anywhere under the root.

    The counts are not checked here; see `check_benchmark`.

    Raises:
        DatasetError: a folder or list is missing, or does not have the expected format.
    """
    benchmark = BENCHMARKS[dataset.source]
    annotations = Annotations(Path(dataset.annotations), benchmark.title, benchmark.subfolders, benchmark.lists_from)
    entries = list(benchmark.read(annotations, Settings(dataset.fold, dataset.label)))
    videos = list_videos(Path(dataset.root))
    matched = match_files(_with_files(entries, videos), videos, _unusable(entries))
    official = benchmark.official(dataset.fold)
    listed = Counter(entry.clip.split for entry in entries)
    on_disk = Counter(named.clip.split for named in matched.clips)
    splits = {
        split: SplitCounts(listed[split], on_disk[split], (official.get(split, 0),)) for split in [*official, *listed]
    }
    report = report_copy(benchmark.title, "clips", splits, matched, videos)
    return DatasetCopy(
        matched.clips, [*matched.refused, *refuse_folders(videos.unreadable)], report, annotations.hashes
    )


def _unusable(entries: Sequence[Entry]) -> Iterator[Refused]:
    """The refusals of the entries whose line is unusable."""
    for entry in entries:
        if entry.problem:
            video_id = printable(entry.clip.video_id or entry.clip.path)
            yield Refused(video_id, None, Status.BAD_ROW, entry.problem)


def _with_files(entries: Sequence[Entry], videos: Videos) -> Iterator[tuple[AnnotatedClip, str | None]]:
    """The clips of the usable entries, each with the path of its file, or None if the file is missing."""
    shared = _shared_names(entries)
    for entry in entries:
        if not entry.problem:
            yield entry.clip, videos.find(entry, entry.name in shared)


def _shared_names(entries: Sequence[Entry]) -> set[str]:
    """File names shared by entries in different folders; segments of the same video are in the same folder."""
    folders: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for entry in entries:
        if entry.folders:
            folders[entry.name].add(entry.folders)
    return {name for name, places in folders.items() if len(places) > 1}


def check_benchmark(dataset: BenchmarkDataset, copy: DatasetCopy | None = None) -> CopyReport:
    """Checks that a copy is official and complete; takes seconds, because it only lists folders and reads the lists.

    Args:
        copy: the result of `read_benchmark`, if it has been called already.

    Raises:
        DatasetError: the lists do not have the official sizes, files are missing and `dataset.partial` is not set, or
            no file exists. The message contains the counts, the first missing files, and the remedy.
    """
    return check_copy((copy or read_benchmark(dataset)).report, dataset, BENCHMARKS[dataset.source].lists_from)
