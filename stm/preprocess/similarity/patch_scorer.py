"""Embedding every patch of a frame with CLIP, each resized alone to CLIP's full input (TGM, section 3.3).

Geometry. A map's cells cover the stored frame exactly, so a cell's side need not be a whole number of pixels. The frame
is therefore first resized to rows x side by columns x side pixels, `side` being the larger cell side rounded up, and
then cut: each cell holds its own share of the frame and nothing of its neighbours', to a fraction of a pixel, and all
cells have one shape. A frame whose cells are whole pixels (224 x 224 with 14 x 14 cells, as in the paper) is not
resized at all. Both resizes are bicubic with antialiasing, as torch and PIL define it, in float32 and clamped to the
range of pixels; PIL also rounds to whole numbers between, which is not copied.

Cells are normalised before they are enlarged, not after. Resizing is linear and its weights add up to 1, so that is the same
but for rounding, and the large pictures are written once and clamped once: passes over memory are what costs here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stm.preprocess.batches import prefetch
from stm.preprocess.frames.table import load_frame
from stm.pretrained.clip import Clip, embed_texts
from stm.pretrained.hub import exact_convolutions
from stm.shards.grid import map_shape


class Piece(NamedTuple):
    """Some cells of one frame: part of a batch."""

    frame: np.ndarray  # uint8 [H, W, 3], RGB
    start: int  # first cell, row by row
    stop: int  # one past the last


@lru_cache(maxsize=64)
def resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """[target, source] float32: bicubic antialiased resizing along one axis, as `interpolate(antialias=True)` does it.

    The resize is linear and separable, so its effect on unit impulses is all of it.
    """
    impulses = torch.eye(source)[None, None]
    weights = functional.interpolate(
        impulses, size=(target, source), mode="bicubic", antialias=True, align_corners=False
    )
    return weights[0, 0].to(device)


def stretch(images: Tensor, height: int, width: int) -> Tensor:
    """Float images [..., H, W] resized, not clamped; unchanged when they have the size."""
    if images.shape[-2:] == (height, width):
        return images
    down = resize_matrix(images.shape[-2], height, images.device)
    across = resize_matrix(images.shape[-1], width, images.device)
    return down @ images @ across.T


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Float images [..., H, W] in 0 to 255, resized and clamped to that range; unchanged when they have the size."""
    return images if images.shape[-2:] == (height, width) else stretch(images, height, width).clamp_(0, 255)


def cut_cells(frame: Tensor, rows: int, columns: int) -> Tensor:
    """Cuts a frame into its map's cells, row by row.

    Args:
        frame: uint8 [H, W, 3].

    Returns:
        float32 [rows * columns, 3, side, side] in 0 to 255, side = the larger cell side in pixels, rounded up.
    """
    height, width = frame.shape[:2]
    side = max(-(-height // rows), -(-width // columns))
    pixels = resize(frame.permute(2, 0, 1).float(), rows * side, columns * side)
    cells = pixels.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return cells.reshape(rows * columns, 3, side, side)


class PatchScorer:
    """Embeds patches and texts with a CLIP, in batches of one fixed shape."""

    def __init__(self, clip: Clip, grid: int, batch_size: int, compile: bool = False) -> None:
        """
        Args:
            grid: cells on the short side of a map.
            batch_size: patches a forward pass; a smaller batch is filled up, so that the model sees one shape only.
            compile: compile the image tower.
        """
        self.clip, self.grid, self.batch_size = clip, grid, batch_size
        self._mean = 255 * torch.tensor(clip.mean, device=clip.device).view(3, 1, 1)
        self._std = 255 * torch.tensor(clip.std, device=clip.device).view(3, 1, 1)
        self._black, self._white = -self._mean / self._std, (255 - self._mean) / self._std
        encode = clip.model.encode_image
        self._encode = torch.compile(encode, dynamic=False) if compile else encode

    def prepare(self, pieces: Sequence[Piece]) -> Tensor:
        """The image tower's input for one batch of cells: [batch_size, 3, height, width], the rest zeros."""
        height, width = self.clip.image_size
        batch = torch.empty(self.batch_size, 3, height, width, dtype=self.clip.precision, device=self.clip.device)
        filled = 0
        for frame, start, stop in pieces:
            rows, columns = map_shape(frame.shape[1], frame.shape[0], self.grid)
            pixels = torch.from_numpy(frame).to(self.clip.device, non_blocking=True)
            cells = (cut_cells(pixels, rows, columns)[start:stop] - self._mean) / self._std
            place = batch[filled : filled + len(cells)]
            torch.clamp(stretch(cells, height, width), self._black, self._white, out=place)
            filled += len(cells)
        batch[filled:] = 0
        return batch

    def encode(self, batch: Tensor) -> Tensor:
        """Projected CLS embeddings of a prepared batch, of length 1: float16 [batch_size, D] on the device."""
        with exact_convolutions(self.clip.device):
            features = self._encode(batch)
        return functional.normalize(features.float(), dim=-1).half()

    @torch.inference_mode()
    def embed_batches(self, batches: Iterable[Sequence[Piece]]) -> Iterator[np.ndarray]:
        """Embeddings of each batch of at most batch_size cells: float16 [cells, D].

        A batch's result is fetched when the next one is under way, so that the device does not wait for the host.
        """
        previous: tuple[Tensor, int] | None = None
        for pieces in batches:
            count = sum(stop - start for _, start, stop in pieces)
            current = (self.encode(self.prepare(pieces)), count)
            if previous is not None:
                yield previous[0][: previous[1]].cpu().numpy()
            previous = current
        if previous is not None:
            yield previous[0][: previous[1]].cpu().numpy()

    def embed_frames(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings of every cell of frames of one size.

        Args:
            frames: T frames, uint8 [H, W, 3], RGB. A training crop counts as a frame.

        Returns:
            float16 [T, R, C, D], each of length 1.
        """
        height, width = frames[0].shape[:2]
        rows, columns = map_shape(width, height, self.grid)
        batches = cut_batches([rows * columns] * len(frames), self.batch_size)
        pieces = ([Piece(frames[f], start, stop) for f, start, stop in batch] for batch in batches)
        return np.concatenate(list(self.embed_batches(pieces))).reshape(len(frames), rows, columns, -1)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Projected embeddings of texts at [EOS], of length 1: float32 [K, D]; see `clip_text.embed_texts`."""
        return embed_texts(self.clip, texts)


def cosine(embeddings: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Cosine similarity of patches and texts.

    Args:
        embeddings: float16 [T, R, C, D] of length 1. Always the rounded ones, so that embeddings that were kept on the
            disk give the same bytes as fresh ones.
        texts: float32 [K, D] of length 1.

    Returns:
        float16 [K, T, R, C] in [-1, 1].
    """
    width = embeddings.shape[-1]
    flat = texts @ embeddings.reshape(-1, width).astype(np.float32).T
    return flat.clip(-1, 1).astype(np.float16).reshape(len(texts), *embeddings.shape[:-1])


def cut_batches(cells: Sequence[int], batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Deals frames' cells to batches, in order: each batch a list of (frame number, first cell, one past the last).

    All batches but the last have exactly batch_size cells; a frame may be spread over several.

    Args:
        cells: the number of cells of each frame.
    """
    batches: list[list[tuple[int, int, int]]] = [[]]
    room = batch_size
    for frame, count in enumerate(cells):
        start = 0
        while start < count:
            if room == 0:
                batches.append([])
                room = batch_size
            stop = min(count, start + room)
            batches[-1].append((frame, start, stop))
            room -= stop - start
            start = stop
    return batches if batches[-1] else []


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
