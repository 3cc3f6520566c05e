"""What the plan starts from: how many clips of what size there are, before and after the manifest."""

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stm.config import BenchmarkDataset, Config, FolderDataset, LanguageDataset, MovingShapesDataset
from stm.datasets.annotations import Clip
from stm.layout import Layout


@dataclass(frozen=True)
class Clips:
    """Counts of one dataset, and its mean clip."""

    per_split: dict[str, int]
    frames: float
    width: float
    height: float
    basis: str

    @property
    def total(self) -> int:
        return sum(self.per_split.values())


def count_clips(config: Config) -> Clips:
    """Clips per split and their mean size: from the manifest if there is one, else from the config or a sample of files."""
    manifest = Layout.of(config).manifest
    if manifest.exists():
        return _from_manifest(manifest)
    if isinstance(config.dataset, MovingShapesDataset):
        data = config.dataset
        return Clips(dict(data.clips), data.frames, data.width, data.height, "the config")
    if isinstance(config.dataset, BenchmarkDataset):
        return _from_benchmark(config.dataset)
    if isinstance(config.dataset, LanguageDataset):
        return _from_language(config.dataset)
    assert config.dataset is not None
    return _from_folder(config.dataset, config.seed)


def _from_benchmark(dataset: BenchmarkDataset) -> Clips:
    """The official size: a plan can be made before there is a copy."""
    from stm.datasets.benchmarks import official_counts, typical

    clip = typical(dataset.source)
    splits = official_counts(dataset.source, dataset.fold)
    return Clips(splits, clip.frames, clip.width, clip.height, "the official lists, with typical clips")


def _from_language(dataset: LanguageDataset) -> Clips:
    """The official size, or the published one of a corpus, which no copy has any more."""
    from stm.datasets.language import is_corpus, official_counts, typical

    clip = typical(dataset.source)
    basis = "the published size" if is_corpus(dataset.source) else "the protocol"
    return Clips(official_counts(dataset.source), clip.frames, clip.width, clip.height, f"{basis}, with typical clips")


def _from_manifest(path: Path) -> Clips:
    from stm.manifest import read_rows

    rows = read_rows(path)
    splits: dict[str, int] = {}
    for row in rows:
        splits[row["split"]] = splits.get(row["split"], 0) + 1
    frames = [_frames_of(row) for row in rows]
    return Clips(
        splits,
        _mean(frames, 250),
        _mean([r["width"] for r in rows], 340),
        _mean([r["height"] for r in rows], 256),
        "the manifest",
    )


def _frames_of(row: dict[str, Any]) -> float | None:
    if row["start"] is not None and row["end"] is not None and row["fps"]:
        return float((row["end"] - row["start"]) * row["fps"])
    return row["frames"] or (row["duration"] * row["fps"] if row["duration"] and row["fps"] else None)


def _mean(values: list[Any], default: float) -> float:
    known = [float(v) for v in values if v]
    return sum(known) / len(known) if known else default


def _from_folder(dataset: FolderDataset, seed: int, sample: int = 32) -> Clips:
    """The headers of a few files stand for all of them."""
    from stm.datasets.folder import list_clips
    from stm.preprocess.container import VideoError

    root, annotations = Path(dataset.root), None if dataset.annotations is None else Path(dataset.annotations)
    clips = [named.clip for named in list_clips(root, annotations, dataset.extensions, dataset.split)[0]]
    sizes = []
    for clip in random.Random(seed).sample(clips, min(sample, len(clips))):
        try:
            sizes.append(_read_header(root, clip))
        except (VideoError, OSError):
            continue  # the manifest will name it; the plan only needs an average
    frames, widths, heights = zip(*sizes, strict=True) if sizes else ((), (), ())
    basis = f"{len(clips)} clips, the headers of {len(sizes)} of their files"
    return Clips(
        dict(Counter(clip.split for clip in clips)),
        _mean(list(frames), 250),
        _mean(list(widths), 340),
        _mean(list(heights), 256),
        basis,
    )


def _read_header(root: Path, clip: Clip) -> tuple[float, int, int]:
    """A clip's frames, width and height, as its file's container states them."""
    from stm.preprocess.container import choose_stream, open_container

    with open_container(root / clip.path) as container:
        video = choose_stream(container)
        rate, seconds = float(video.average_rate or 25), (container.duration or 0) / 1e6
        frames = video.frames or seconds * rate
        if clip.start is not None or clip.end is not None:
            frames = max(0.0, (clip.end or seconds) - (clip.start or 0.0)) * rate
        return frames, video.codec_context.width, video.codec_context.height
