"""Annotation files for retrieval, question answering, multiple choice and captioning, as in VindLU and UMT."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stm.datasets.folder import DatasetError
from stm.datasets.official_lists import Annotations, integer_of, text_of
from stm.datasets.text_files import BadRow
from stm.datasets.video_text.by_video import AnnotationLine
from stm.datasets.video_text.protocol import Protocol
from stm.datasets.video_text.releases import recognise_release
from stm.manifest import Question

_MSRVTT_SPLITS = {"val": "validate"}  # if the release uses a different name


def read_lists(protocol: Protocol, annotations: Annotations) -> Iterator[AnnotationLine]:
    """The contents of a benchmark's files, in order; unusable lines have a `problem`.

    Raises:
        DatasetError: a file is missing, or does not have the expected format.
    """
    for split, names in protocol.files.items():
        path = annotations.find(*names)
        if protocol.format == "videodatainfo":
            yield from _read_videodatainfo(annotations, path, split)
            continue
        kind = protocol.text_kind(split)
        for where, row in annotations.json_rows(path, recognise_release):
            try:
                yield from _LINES[kind](split, where, row)
            except BadRow as error:
                yield AnnotationLine(split, where, problem=str(error))


def read_answers(protocol: Protocol, annotations: Annotations) -> tuple[str, ...]:
    """The unmodified candidate answers of a question answering benchmark.

    Raises:
        DatasetError: the protocol has no answer list, or the file is missing or not a list of texts.
    """
    if protocol.answers is None:
        raise DatasetError(f"{protocol.title} has no list of answers")
    path = annotations.find(protocol.answers)
    answers = annotations.json(path, list)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise DatasetError(f"{path}: must hold a list of answers; is it the official file?")
    return tuple(answers)


def _videos_of(row: Any) -> list[str]:
    """The video or videos that the text of an entry describes (several in SSv2). VindLU also uses the key `image`."""
    key = "video" if isinstance(row, Mapping) and "video" in row else "image"
    value = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(value, list):
        if not value:
            raise BadRow(f"`{key}` is empty")
        return [text_of({key: one}, key) for one in value]
    return [text_of(row, key)]


def _texts_of(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """One or several texts; empty texts in a list are dropped."""
    value = row.get(key)
    if not isinstance(value, list):
        return (text_of(row, key),)
    texts = tuple(text_of({key: one}, key) for one in value if one != "")
    if not texts:
        raise BadRow(f"`{key}` is empty")
    return texts


def _captions(split: str, where: str, row: Any) -> Iterator[AnnotationLine]:
    """{"video", "caption": text or list of texts}"""
    for video in _videos_of(row):
        yield AnnotationLine(split, where, video, captions=_texts_of(row, "caption"))


def _questions(split: str, where: str, row: Any) -> Iterator[AnnotationLine]:
    """{"video", "question", "answer": text or list}: one question per answer, which weights frequent answers more."""
    for video in _videos_of(row):
        question = text_of(row, "question")
        yield AnnotationLine(
            split, where, video, questions=tuple(Question(question, a) for a in _texts_of(row, "answer"))
        )


def _choices(split: str, where: str, row: Any) -> Iterator[AnnotationLine]:
    """{"video", "caption": [texts], "answer": index of the correct one}, which is also the clip's caption."""
    for video in _videos_of(row):
        value = row.get("caption")
        if not isinstance(value, list) or len(value) < 2:
            raise BadRow(f"`caption` must be a list of captions to choose from, is {str(value)[:60]!r}")
        choices = tuple(text_of({"caption": one}, "caption") for one in value)
        answer = integer_of(row, "answer")
        if not 0 <= answer < len(choices):
            raise BadRow(f"`answer` must be from 0 to {len(choices) - 1}, is {answer}")
        right = choices[answer]
        yield AnnotationLine(split, where, video, captions=(right,), questions=(Question("", right, choices),))


_LINES = {"captions": _captions, "questions": _questions, "choices": _choices}


def _read_videodatainfo(annotations: Annotations, path: Path, split: str) -> Iterator[AnnotationLine]:
    """The format of MSR-VTT's release: {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}."""
    release = annotations.json(path, dict)
    videos, sentences = release.get("videos"), release.get("sentences")
    if not isinstance(videos, list) or not isinstance(sentences, list):
        raise DatasetError(f"{path}: has no lists `videos` and `sentences`; is it the official file?")
    captions: defaultdict[str, list[str]] = defaultdict(list)
    for number, sentence in enumerate(sentences):
        try:
            captions[text_of(sentence, "video_id")].append(text_of(sentence, "caption"))
        except BadRow as error:
            yield AnnotationLine(split, f"{path.name}, sentence {number}", problem=str(error))
    for number, video in enumerate(videos):
        where = f"{path.name}, video {number}"
        try:
            name, part = text_of(video, "video_id"), text_of(video, "split")
        except BadRow as error:
            yield AnnotationLine(split, where, problem=str(error))
            continue
        if part == _MSRVTT_SPLITS.get(split, split):
            yield AnnotationLine(split, where, f"{name}.mp4", captions=tuple(captions[name]))
