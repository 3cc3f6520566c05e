"""Clip counts, mean clip sizes and text counts for the plan, with or without a manifest."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stm.config import BenchmarkDataset, Config, FolderDataset, LanguageDataset, MovingShapesDataset
from stm.datasets.annotations import AnnotatedClip
from stm.layout import Layout
from stm.storage.machine_errors import is_machine_error

# Choices per question of a multiple-choice benchmark, until its files have been read: the value for MSRVTT-MC.
CHOICES_PER_QUESTION = 5
# The value for moving-shapes; see `stm.datasets.moving_shapes.sentences.questions_of`.
QUESTIONS_PER_CLIP = 7


# Assumed if no file specifies them: ten seconds at 25 frames per second, at a common size for copies of Kinetics.
_FRAMES, _WIDTH, _HEIGHT = 250, 340, 256


class Texts(NamedTuple):
    """Total number of texts of the clips in a split."""

    captions: float
    questions: float  # one per annotator's answer, plus one per multiple-choice question
    choices: float  # total over all questions


@dataclass(frozen=True)
class Clips:
    """Clip counts and mean clip size of one dataset."""

    per_split: dict[str, int]
    frames: float  # mean per clip
    width: float  # mean, pixels
    height: float  # mean, pixels
    basis: str  # source of the counts, shown in the plan's table
    texts: Mapping[str, Texts] = field(default_factory=dict)  # by split, where known

    @property
    def total(self) -> int:
        return sum(self.per_split.values())


def count_clips(config: Config) -> Clips:
    """Count the clips per split and estimate their mean size.

    Both come from the manifest if it exists, otherwise from the config, official lists or a sample of files.
    """
    manifest = Layout.of(config).manifest
    if manifest.exists():
        return _from_manifest(manifest)
    if isinstance(config.dataset, MovingShapesDataset):
        data = config.dataset
        texts = {split: Texts(count, count * QUESTIONS_PER_CLIP, 0) for split, count in data.clips.items()}
        return Clips(dict(data.clips), data.frames, data.width, data.height, "the config", texts)
    if isinstance(config.dataset, BenchmarkDataset):
        return _from_benchmark(config.dataset)
    if isinstance(config.dataset, LanguageDataset):
        return _from_language(config.dataset)
    assert config.dataset is not None
    return _from_folder(config.dataset, config.seed)


def _from_benchmark(dataset: BenchmarkDataset) -> Clips:
    """Use the official size, so that a plan can be made before the dataset is downloaded."""
    from stm.datasets.actions import official_counts, typical

    clip = typical(dataset.source)
    splits = official_counts(dataset.source, dataset.fold)
    return Clips(splits, clip.frames, clip.width, clip.height, "the official lists, with typical clips")


def _from_language(dataset: LanguageDataset) -> Clips:
    """Use the official size; for a web corpus, the published size, although every copy has lost clips since then."""
    from stm.datasets.video_text import is_corpus, official_counts, read_protocol, typical

    clip, splits = typical(dataset.source), official_counts(dataset.source)
    basis = "the published size"
    texts = {}
    if not is_corpus(dataset.source):
        basis = "the protocol"
        protocol = read_protocol(dataset.source)
        for split, clips in splits.items():
            count = protocol.texts[split] or clips  # one text per clip if the protocol does not specify a count
            kind = protocol.text_kind(split)
            texts[split] = Texts(
                0 if kind == "questions" else count,
                0 if kind == "captions" else count,
                count * CHOICES_PER_QUESTION if kind == "choices" else 0,
            )
    return Clips(splits, clip.frames, clip.width, clip.height, f"{basis}, with typical clips", texts)


def _from_manifest(path: Path) -> Clips:
    from stm.manifest import read_rows

    rows = read_rows(path)
    splits: dict[str, int] = {}
    for row in rows:
        splits[row["split"]] = splits.get(row["split"], 0) + 1
    frames = [_frames_of(row) for row in rows]
    annotated = ((row["split"], row["captions"] or (), [q["choices"] for q in row["questions"] or ()]) for row in rows)
    return Clips(
        splits,
        _mean(frames, _FRAMES),
        _mean([r["width"] for r in rows], _WIDTH),
        _mean([r["height"] for r in rows], _HEIGHT),
        "the manifest",
        _count_texts(annotated),
    )


def _count_texts(clips: Iterable[tuple[str, Sized, Sequence[Sized | None]]]) -> dict[str, Texts]:
    """Count the texts per split, from each clip's split, captions and choices per question."""
    counts: dict[str, Texts] = {}
    for split, captions, choices in clips:
        before = counts.get(split, Texts(0, 0, 0))
        more = len(captions), len(choices), sum(len(texts or ()) for texts in choices)
        counts[split] = Texts(*(old + new for old, new in zip(before, more, strict=True)))
    return counts


def _frames_of(row: dict[str, Any]) -> float | None:
    if row["start"] is not None and row["end"] is not None and row["fps"]:
        return float((row["end"] - row["start"]) * row["fps"])
    return row["frames"] or (row["duration"] * row["fps"] if row["duration"] and row["fps"] else None)


def _mean(values: list[Any], default: float) -> float:
    known = [float(v) for v in values if v]
    return sum(known) / len(known) if known else default


def _from_folder(dataset: FolderDataset, seed: int, sample: int = 32) -> Clips:
    """Count clips from the annotations; estimate the mean size from `sample` headers, as opening all files is slow."""
    from stm.datasets.folder import list_clips
    from stm.preprocess.video.container import VideoError

    root, annotations = Path(dataset.root), None if dataset.annotations is None else Path(dataset.annotations)
    clips = [entry.clip for entry in list_clips(root, annotations, dataset.extensions, dataset.split).clips]
    sizes = []
    for clip in random.Random(seed).sample(clips, min(sample, len(clips))):
        try:
            sizes.append(_read_header(root, clip))
        except (VideoError, OSError) as error:
            if is_machine_error(error):
                raise
            continue  # the manifest will report the error; the plan only needs a mean
    frames, widths, heights = zip(*sizes, strict=True) if sizes else ((), (), ())
    basis = f"{len(clips)} clips, the headers of {len(sizes)} of their files"
    annotated = ((clip.split, clip.captions, [question.choices for question in clip.questions]) for clip in clips)
    return Clips(
        dict(Counter(clip.split for clip in clips)),
        _mean(list(frames), _FRAMES),
        _mean(list(widths), _WIDTH),
        _mean(list(heights), _HEIGHT),
        basis,
        _count_texts(annotated),
    )


def _read_header(root: Path, clip: AnnotatedClip) -> tuple[float, int, int]:
    """Return a clip's frame count, and its width and height as shown, as reported by the container of its file."""
    from stm.datasets.display import PixelAspect, read_cropping, shown_size
    from stm.preprocess.video.container import choose_stream, open_container

    with open_container(root / clip.path) as container:
        video = choose_stream(container)
        rate = float(video.average_rate or 25)
        seconds = (container.duration or 0) / 1e6  # PyAV reports microseconds
        frames = video.frames or seconds * rate  # some containers, such as Matroska, do not store a frame count
        if clip.start is not None or clip.end is not None:
            frames = max(0.0, (clip.end or seconds) - (clip.start or 0.0)) * rate
        size = read_cropping(container, video).size(video.codec_context.width, video.codec_context.height)
        return frames, *shown_size(*size, PixelAspect(video).now())
