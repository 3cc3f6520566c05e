"""The lists of corpora and benchmarks of videos or images with text, with generated names and texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stm.config import LanguageDataset
from stm.datasets.video_text import CORPORA, read_protocol
from stm.datasets.video_text.protocol import Protocol
from stm.rehearsal.videos import KINDS, describe_clip
from stm.storage.files import write_bytes

_CORPUS_ROWS = 200  # a corpus has no official length
_UNKNOWN = 1_000  # videos of a split whose official number is unknown
_FEW = 20  # the first videos of a split, those with a file, have few texts
_CHOICES = 5
ANSWERS = ("red", "blue", "circle", "square", "left", "right", "yes", "no")

# What a video of each benchmark is called in the shared lists.
_NAMES = {
    "msrvtt": "video{}.mp4",
    "msvd": "clip{}_10_20.avi",
    "didemo": "12345678@N00_{}_abcdef.mov",
    "activitynet": "v_video{}.mp4",
    "lsmdc": "0001_Film/0001_Film_00.00.{}.161-00.00.33.546.avi",
    "ssv2": "{}.webm",
}


def write_lists(dataset: LanguageDataset, folder: Path) -> None:
    """Write the annotation files of a corpus or benchmark below `folder`."""
    if dataset.source in CORPORA:
        corpus = CORPORA[dataset.source]
        ending = "jpg" if corpus.media == "image" else "mp4"
        key = "image" if corpus.media == "image" else "video"
        rows = [{key: f"00000/{n:09d}.{ending}", "caption": describe_clip(n)[0]} for n in range(_CORPUS_ROWS)]
        _write_json(folder / f"{corpus.names[0]}.json", rows)
        return
    protocol, first = read_protocol(dataset.source), 0
    videodatainfo = []
    for split, names in protocol.files.items():
        count = (protocol.sizes(split) or (protocol.about.get(split, _UNKNOWN),))[0]
        videos = [_name(dataset.source, first + number) for number in range(count)]
        first += count
        if protocol.format == "videodatainfo":
            videodatainfo.append((split, videos))
        else:
            _write_json(folder / names[0], list(_rows(protocol, split, videos)))
    if protocol.answers is not None:
        _write_json(folder / protocol.answers, list(ANSWERS))
    if videodatainfo:
        _write_release(protocol, videodatainfo, folder)


def _name(source: str, number: int) -> str:
    family = next((name for name in _NAMES if source.startswith(name)), "msrvtt")
    return _NAMES[family].format(number)


def _rows(protocol: Protocol, split: str, videos: list[str]) -> Iterator[dict[str, Any]]:
    kind = protocol.text_kind(split)
    counts = _texts_per_video(protocol, split, len(videos))
    for number, (video, count) in enumerate(zip(videos, counts, strict=True)):
        caption, questions = describe_clip(number)
        if kind == "questions":
            for asked in range(count):
                question = questions[asked % len(questions)]["question"]
                yield {"video": video, "question": question, "answer": ANSWERS[(number + asked) % len(ANSWERS)]}
        elif kind == "choices":
            captions = [describe_clip(number + other)[0] for other in range(_CHOICES)]
            yield {"video": video, "caption": captions, "answer": 0}
        else:
            yield {"video": video, "caption": caption if count == 1 else [caption] * count}


def _texts_per_video(protocol: Protocol, split: str, videos: int) -> list[int]:
    """The number of texts of each video; their sum is the official one where it is known."""
    total = protocol.texts[split]
    if protocol.paragraph:
        return [2] * videos  # joined: one text
    several = protocol.text_kind(split) == "questions" or protocol.several_captions.get(split) in ("explode", "keep")
    if total is None:
        return [2 if several else 1] * videos
    few = [min(2, total // videos)] * min(_FEW, videos)
    rest, others = total - sum(few), videos - len(few)
    return [*few, *(rest // others + (number < rest % others) for number in range(others))]


def _write_release(protocol: Protocol, splits: list[tuple[str, list[str]]], folder: Path) -> None:
    """MSR-VTT's release: one file for training and validation, one for the test."""
    files: dict[str, dict[str, list[dict[str, str]]]] = {}
    for split, names in splits:
        content = files.setdefault(protocol.files[split][0], {"videos": [], "sentences": []})
        for number, (name, count) in enumerate(zip(names, _texts_per_video(protocol, split, len(names)), strict=True)):
            video = name.rpartition(".")[0]
            content["videos"].append({"video_id": video, "split": "validate" if split == "val" else split})
            sentence = {"video_id": video, "caption": describe_clip(number % KINDS)[0]}
            content["sentences"] += [sentence] * count
    for name, value in files.items():
        _write_json(folder / name, value)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json.dumps(value).encode())
