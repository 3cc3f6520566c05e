"""Lays out the rehearsal's copy of one dataset: its lists, and the files of the few chosen clips."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from stm.config import BenchmarkDataset, Config, FolderDataset, LanguageDataset
from stm.datasets import check_copy
from stm.datasets.actions import BENCHMARKS, read_benchmark
from stm.datasets.annotations import AnnotatedClip, AnnotationError, BadRow, parse_row, read_annotations
from stm.datasets.file_names import VIDEO_ENDINGS
from stm.datasets.folder import IMAGE_ENDINGS, DatasetError, NamedClip, walk_videos
from stm.datasets.official_lists import Annotations, Settings
from stm.datasets.video_text import CORPORA, find_answers, has_images, read_language, read_protocol
from stm.datasets.video_text.benchmarks import read_lists
from stm.datasets.video_text.by_video import group_by_video
from stm.datasets.video_text.corpora import read_corpus
from stm.rehearsal.copies import actions, video_text
from stm.rehearsal.copies.choose import CLASSES, OTHER_CLIPS, TRAIN_CLIPS, choose_clips
from stm.rehearsal.videos import describe_clip, write_media
from stm.storage.files import write_json

_SECONDS = 4.0  # of a generated video of which all is used
_LONGEST = 2000.0


class LaidOut(NamedTuple):
    """What the rehearsal's copy of a dataset consists of."""

    own_lists: bool  # whether the annotation files are the user's
    own_files: int  # files of the user's copy
    generated: int  # generated files
    problem: str | None  # why the full run would refuse the user's copy; None if it would not, or if there is none


def lay_out(full: Config, small: Config, folder: Path, splits: Sequence[str]) -> LaidOut | None:
    """Lay out a dataset below `folder`; None for generated datasets, which the workflow itself makes.

    Args:
        full, small: the configs, reduced to the dataset.
        splits: the splits that the runs and evaluations read.

    Raises:
        DatasetError: the user's lists cannot be read.
    """
    before, after = full.dataset, small.dataset
    if isinstance(before, FolderDataset) and isinstance(after, FolderDataset):
        return _lay_out_folder(before, after, folder, splits)
    if not isinstance(before, BenchmarkDataset | LanguageDataset) or type(after) is not type(before):
        return None
    root, lists = folder / after.root, folder / after.annotations
    root.mkdir(parents=True, exist_ok=True)
    own_clips, own_lists, problem = _read_own(full)
    if own_lists:
        _link_all(Path(before.annotations), own_lists, lists)
    else:
        lists.mkdir(parents=True, exist_ok=True)
        _write_lists(before, lists)
    listed = choose_clips(_listed(before, lists))
    own = choose_clips(named.clip for named in own_clips)
    have = {clip.split for clip in own}
    _link_all(Path(before.root), [Path(clip.path) for clip in own], root)
    missing = [clip for clip in listed if clip.split not in have]
    generated = _generate(before, missing, root)
    return LaidOut(bool(own_lists), len(own), generated, problem)


# ------------------------------------------------------------------------------------------ public datasets


def _read_own(config: Config) -> tuple[list[NamedClip], list[Path], str | None]:
    """The user's clips with a file, the lists that they are read from, and why the full run would refuse the copy."""
    dataset = config.dataset
    assert isinstance(dataset, BenchmarkDataset | LanguageDataset)
    if not Path(dataset.annotations).is_dir() or not Path(dataset.root).is_dir():
        return [], [], None
    try:
        copy = read_language(dataset) if isinstance(dataset, LanguageDataset) else read_benchmark(dataset)
    except DatasetError as error:
        return [], [], str(error)
    lists = list(copy.annotations)
    answers = find_answers(dataset) if isinstance(dataset, LanguageDataset) else None
    if answers is not None:
        lists.append(answers.relative_to(dataset.annotations))
    try:
        check_copy(config)
    except DatasetError as error:
        return copy.clips, lists if copy.report.is_official else [], str(error)
    return copy.clips, lists, None


def _write_lists(dataset: BenchmarkDataset | LanguageDataset, folder: Path) -> None:
    if isinstance(dataset, LanguageDataset):
        video_text.write_lists(dataset, folder)
    else:
        actions.write_lists(dataset, folder)


def _listed(dataset: BenchmarkDataset | LanguageDataset, folder: Path) -> Iterable[AnnotatedClip]:
    """The clips of the lists in `folder`, as the manifest reads them."""
    if isinstance(dataset, BenchmarkDataset):
        benchmark = BENCHMARKS[dataset.source]
        annotations = Annotations(folder, benchmark.title, benchmark.subfolders)
        entries = benchmark.read(annotations, Settings(dataset.fold, dataset.label))
        return (entry.clip for entry in entries if not entry.problem)
    title = dataset.source
    annotations = Annotations(folder, title, ("anno_downstream", "anno_pretrain"))
    if dataset.source in CORPORA:
        return group_by_video(read_corpus(CORPORA[dataset.source], annotations)).clips
    protocol = read_protocol(dataset.source)
    return group_by_video(read_lists(protocol, annotations), end=protocol.trim_seconds).clips


def _generate(dataset: BenchmarkDataset | LanguageDataset, clips: Sequence[AnnotatedClip], root: Path) -> int:
    """Write the files of these clips where an official copy has them; the first split's last one is broken."""
    ends: dict[PurePosixPath, float] = {}
    for clip in clips:
        place = _place(dataset, clip)
        # A benchmark's trimming is an upper bound, and the videos may be shorter.
        end = clip.end if clip.end is not None and clip.start is not None else _SECONDS
        ends[place] = min(max(end, ends.get(place, 0.0)), _LONGEST)
    broken = _broken(dataset, clips)
    for number, (place, end) in enumerate(ends.items()):
        if not (root / place).exists():
            write_media(root / place, number, end, broken=place == broken)
    return len(ends)


def _broken(dataset: BenchmarkDataset | LanguageDataset, clips: Sequence[AnnotatedClip]) -> PurePosixPath | None:
    """The file of the last clip of the first split, unless it has others too."""
    first = [clip for clip in clips if clip.split == clips[0].split]
    if len(first) <= TRAIN_CLIPS:
        return None
    last = _place(dataset, first[-1])
    return last if [_place(dataset, clip) for clip in clips].count(last) == 1 else None


def _place(dataset: BenchmarkDataset | LanguageDataset, clip: AnnotatedClip) -> PurePosixPath:
    if isinstance(dataset, BenchmarkDataset):
        return actions.place_of(dataset.source, clip.path, clip.split)
    path = PurePosixPath(clip.path)
    if has_images(dataset.source) or path.suffix.lower() in (*VIDEO_ENDINGS, *IMAGE_ENDINGS):
        return path
    return path.with_name(f"{path.name}.mp4")


# --------------------------------------------------------------------------------------------------- folders


def _lay_out_folder(full: FolderDataset, small: FolderDataset, folder: Path, splits: Sequence[str]) -> LaidOut:
    root = folder / small.root
    root.mkdir(parents=True, exist_ok=True)
    own = list(_own_rows(full)) if Path(full.root).is_dir() else []
    rows = own or list(_generated_rows(splits or [full.split]))
    if own:
        _link_all(Path(full.root), [Path(str(row["path"])) for row in own], root)
    else:
        for number, row in enumerate(rows):
            write_media(root / str(row["path"]), number, _SECONDS, broken=number == TRAIN_CLIPS)
    if small.annotations is not None:
        listed = rows if own else [*rows, {"path": "missing.mp4", "split": rows[0]["split"]}]
        (folder / small.annotations).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / small.annotations, listed)
    return LaidOut(bool(own), len(own), 0 if own else len(rows), None)


def _own_rows(dataset: FolderDataset) -> Iterator[Mapping[str, Any]]:
    """The annotations of the first few clips of each split that have a file."""
    if dataset.annotations is None:
        root = Path(dataset.root)
        files = sorted(path for path, _ in walk_videos(root, dataset.extensions) if (root / path).is_file())
        yield from ({"path": path} for path in files[:TRAIN_CLIPS])
        return
    try:
        rows = [row for _, row in read_annotations(Path(dataset.annotations))]
    except AnnotationError:
        return
    by_path: dict[tuple[str, str | None], Mapping[str, Any]] = {}
    clips = []
    for row in rows:
        try:
            clip = parse_row(row, dataset.split)
        except BadRow:
            continue
        if (Path(dataset.root) / clip.path).is_file():
            clips.append(clip)
            by_path[clip.path, clip.video_id] = row
    yield from (by_path[clip.path, clip.video_id] for clip in choose_clips(clips))


def _generated_rows(splits: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, split in enumerate(splits):
        for index in range(TRAIN_CLIPS + 1 if number == 0 else OTHER_CLIPS):
            caption, questions = describe_clip(index)
            yield {
                "path": f"{split}/{split}-{index}.mp4",
                "split": split,
                "label": f"label {index % CLASSES}",
                "captions": [caption],
                "questions": questions,
            }


# ----------------------------------------------------------------------------------------------------- files


def _link_all(source: Path, names: Sequence[Path], target: Path) -> None:
    """Link files into another folder under the same names, or copy them where the disk cannot link.

    They replace what an earlier rehearsal generated.
    """
    for name in names:
        own, place = (source / name).resolve(), target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and _same(own, place):
            continue
        place.unlink(missing_ok=True)
        try:
            os.link(own, place)
        except OSError:
            shutil.copy2(own, place)


def _same(one: Path, other: Path) -> bool:
    """Whether one file is a link to the other, or a copy of it."""
    states = one.stat(), other.stat()
    return one.samefile(other) or len({(state.st_size, state.st_mtime_ns) for state in states}) == 1
