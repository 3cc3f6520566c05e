"""Embeddings of whole clips from batches that are filled across frames and clips."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from stm.preprocess.batches import prefetch
from stm.preprocess.similarity.patch_scorer import PatchScorer, Piece, cut_batches
from stm.preprocess.stored_frames import load_frame
from stm.shards.grid import map_shape


def embed_clips(
    scorer: PatchScorer, frames_tar: Path, kept: Sequence[Mapping[str, Any]], finished: set[str]
) -> Iterator[tuple[Mapping[str, Any], np.ndarray]]:
    """Embeddings, float16 [T, R, C, D], of each kept clip whose key is not in `finished`.

    Batches are filled across frames and clips. Where they begin and end does not depend on `finished`, so a resumed
    job gives the same bits; it computes a few patches of finished clips again. JPEGs are decoded a batch ahead.
    """
    frames = [(clip, number) for clip, row in enumerate(kept) for number in range(row["frames"])]
    shapes = [map_shape(row["width"], row["height"], scorer.grid) for row in kept]
    cells = [shapes[clip][0] * shapes[clip][1] for clip, _ in frames]
    every = cut_batches(cells, scorer.batch_size)
    batches = [b for b in every if any(kept[frames[f][0]]["key"] not in finished for f, _, _ in b)]

    # A frame may be spread over several batches in a row; it is decoded once for them.
    @lru_cache(maxsize=2)
    def decode(frame: int) -> np.ndarray:
        clip, number = frames[frame]
        return load_frame(frames_tar, kept[clip], number)

    def load(batch: Sequence[tuple[int, int, int]]) -> list[Piece]:
        return [Piece(decode(frame), start, stop) for frame, start, stop in batch]

    loaded = prefetch(partial(load, batch) for batch in batches)
    parts: dict[int, list[np.ndarray]] = {}
    for batch, found in zip(batches, scorer.embed_batches(loaded), strict=True):
        at = 0
        for frame, start, stop in batch:
            clip, number = frames[frame]
            part = found[at : at + stop - start]
            at += stop - start
            if kept[clip]["key"] in finished:
                continue
            parts.setdefault(clip, []).append(part)
            if number == kept[clip]["frames"] - 1 and stop == cells[frame]:
                whole = np.concatenate(parts.pop(clip))
                yield kept[clip], whole.reshape(kept[clip]["frames"], *shapes[clip], -1)
