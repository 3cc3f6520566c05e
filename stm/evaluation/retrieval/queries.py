"""Query captions for retrieval, and the clips that they describe."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stm.config import CaptionChoice
from stm.data.sampling import choose_captions
from stm.shards.index import ClipIndex
from stm.shards.reader import ShardReader


@dataclass(frozen=True)
class Queries:
    """The query captions of all clips, ordered by clip."""

    captions: list[str]
    clips: NDArray[np.int64]  # [Q], index of each caption's clip among the captioned clips
    vectors: NDArray[np.float32]  # [Q, D], unit vectors

    def own_clip(self) -> list[NDArray[np.int64]]:
        """The clip of each caption."""
        return list(self.clips[:, None])

    def own_captions(self) -> list[NDArray[np.int64]]:
        """The captions of each clip."""
        return np.split(np.arange(len(self.clips)), np.flatnonzero(np.diff(self.clips)) + 1)

    def clips_of_text(self) -> list[NDArray[np.int64]]:
        """For each caption, all clips that have a caption with the same text."""
        texts, members = self._by_text()
        clips = [np.unique(self.clips[captions]) for captions in members]
        return [clips[text] for text in texts]

    def captions_of_texts(self) -> list[NDArray[np.int64]]:
        """For each clip, all captions of any clip that have the same text as one of its captions."""
        texts, members = self._by_text()
        return [np.unique(np.concatenate([members[t] for t in texts[own]])) for own in self.own_captions()]

    def _by_text(self) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        """The index of each caption's text among the distinct texts, and the captions of each text."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(self.captions))}
        texts = np.array([numbers[caption] for caption in self.captions])
        order = np.argsort(texts, kind="stable")
        return texts, np.split(order, np.flatnonzero(np.diff(texts[order])) + 1)


def first_source(index: ClipIndex) -> str | None:
    """The first packed caption source; None if the shards do not name sources.

    Captions are packed in the order of `pack.captions`, so the clip with the most sources shows that order.
    """
    orders = [list(dict.fromkeys(index[number].sources)) for number in range(len(index))]
    fullest = max(orders, key=len)
    return fullest[0] if fullest else None


def collect_queries(index: ClipIndex, source: str | None, count: int) -> tuple[Queries, NDArray[np.int64]]:
    """The query captions, and the indices of the captioned clips.

    Args:
        index: the test split.
        source: the source of the captions; None: all sources.
        count: captions per clip, evenly spaced; 1 selects the middle caption.

    Raises:
        ValueError: no clip has a caption from the source, a captioned clip has no text vectors, or vectors of several
            encoders are mixed.
    """
    if len(widths := index.values("text_width")) > 1:
        shown = " and ".join(str(width) for width in widths)
        raise ValueError(
            f"the test split has text vectors of {shown} dimensions: pack all shards with one text encoder"
        )
    reader, choice = ShardReader(), CaptionChoice(sources=None if source is None else (source,), count=count)
    captions: list[str] = []
    owners: list[int] = []
    captioned: list[int] = []
    vectors = []
    for number in range(len(index)):
        clip = index[number]
        chosen = choose_captions(len(clip.captions), clip.sources, choice)
        if not chosen:
            continue
        if not index.packed("text", number):
            raise ValueError(f"{clip.tar}: clip {clip.key!r} has captions without text vectors: set pack.text")
        captions += [clip.captions[place] for place in chosen]
        owners += [len(captioned)] * len(chosen)
        vectors.append(reader.text(clip, chosen))
        captioned.append(number)
    if not captioned:
        known = ", ".join(index.sources()) or "none"
        raise ValueError(
            f"no clip of the test split has a caption of the source {source!r}; packed sources: {known}. Splits that "
            "the config reads no captions of are packed without them, unless `pack.more_splits` names them"
        )
    return Queries(captions, np.array(owners), np.concatenate(vectors)), np.array(captioned)
