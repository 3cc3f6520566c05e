"""CLIP embeddings of every patch of a frame, each patch resized separately to CLIP's input size (TGM, section 3.3).

Geometry. The cells of a map tile the stored frame exactly, so the side of a cell may be a fractional number of pixels.
The frame is therefore first resized to rows x side by columns x side pixels, where `side` is the larger cell side
rounded up, and then cut. All cells then have the same shape, and each contains only its part of the frame and no
neighbouring content, to within a fraction of a pixel. A frame whose cells already measure whole pixels (224 x 224 with
14 x 14 cells, as in the paper) is not resized. Both resizes are bicubic with antialiasing, as defined by torch and PIL,
in float32 and clamped to the pixel range; PIL also rounds to integers in between, which is not reproduced.

Cells are normalised before they are enlarged. Resizing is linear with weights that sum to 1, so the result differs from
normalising afterwards only by rounding, and the large images are written once and clamped once: memory bandwidth is the
bottleneck here.

A patch is one cell by default. With a window of several cells, patches overlap: a fine grid then gives the positions of
the patches, and the window their size.
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
from stm.pretrained.clip import LoadedClip, embed_texts
from stm.pretrained.hub import exact_convolutions
from stm.shards.grid import map_shape


class Piece(NamedTuple):
    """Consecutive patches of one frame that form part of a batch."""

    frame: np.ndarray  # uint8 [H, W, 3], RGB
    start: int  # first patch, in row-major order
    stop: int  # one past the last patch


@lru_cache(maxsize=64)
def resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Return the matrix of `interpolate(antialias=True)`'s bicubic resize along one axis: float32 [target, source]."""
    # The resize is linear and separable, so its response to unit impulses defines it completely.
    impulses = torch.eye(source)[None, None]
    weights = functional.interpolate(
        impulses, size=(target, source), mode="bicubic", antialias=True, align_corners=False
    )
    return weights[0, 0].to(device)


def stretch(images: Tensor, height: int, width: int) -> Tensor:
    """Resize float images [..., H, W] to [..., height, width] without clamping; unchanged if already of that size."""
    if images.shape[-2:] == (height, width):
        return images
    down = resize_matrix(images.shape[-2], height, images.device)
    across = resize_matrix(images.shape[-1], width, images.device)
    return down @ images @ across.T


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize float images [..., H, W] in 0 to 255, and clamp them to that range; unchanged if already of that size."""
    return images if images.shape[-2:] == (height, width) else stretch(images, height, width).clamp_(0, 255)


def cut_windows(frame: Tensor, rows: int, columns: int, window: int = 1) -> Tensor:
    """Cut a frame into all windows of `window` x `window` cells of its map, in row-major order.

    Args:
        frame: uint8 [H, W, 3].
        rows, columns: size of the map, in cells.
        window: cells per side of a window; 1: the windows are the cells.

    Returns:
        float32 [(rows - window + 1) * (columns - window + 1), 3, window * side, window * side] in 0 to 255; `side` is the
        larger cell side in pixels, rounded up.
    """
    height, width = frame.shape[:2]
    side = max(-(-height // rows), -(-width // columns))
    pixels = resize(frame.permute(2, 0, 1).float(), rows * side, columns * side)
    windows = pixels.unfold(1, window * side, side).unfold(2, window * side, side).permute(1, 2, 0, 3, 4)
    return windows.flatten(0, 1)


def spread_windows(values: np.ndarray, window: int) -> np.ndarray:
    """Give each cell the value of the window around it; at the frame's edges, of the nearest window inside the frame.

    The centre of a window with an even number of cells is half a cell further right and down than that of its cell.

    Args:
        values: one value or vector per window: [T, R - window + 1, C - window + 1, D].

    Returns:
        [T, R, C, D].
    """
    before, after = (window - 1) // 2, window // 2
    return np.pad(values, ((0, 0), (before, after), (before, after), (0, 0)), mode="edge")


class PatchScorer:
    """Computes CLIP embeddings of patches and texts, in batches of a fixed shape."""

    def __init__(self, clip: LoadedClip, grid: int, batch_size: int, compile: bool = False, window: int = 1) -> None:
        """
        Args:
            grid: cells along the short side of a map.
            batch_size: patches per forward pass; a smaller batch is padded, so that the model always runs on one shape.
            compile: whether to compile the image tower.
            window: cells per side of a patch; patches of several cells overlap.
        """
        self.clip = clip
        self.grid = grid
        self.window = window
        self.batch_size = batch_size
        self._mean = 255 * torch.tensor(clip.mean, device=clip.device).view(3, 1, 1)
        self._std = 255 * torch.tensor(clip.std, device=clip.device).view(3, 1, 1)
        # Pixel values 0 and 255 after normalisation: the range to which enlarged cells are clamped.
        self._black = -self._mean / self._std
        self._white = (255 - self._mean) / self._std
        encode = clip.model.encode_image
        self._encode = torch.compile(encode, dynamic=False) if compile else encode

    def count_patches(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of patches of a frame of `width` x `height` pixels."""
        rows, columns = map_shape(width, height, self.grid)
        return rows - self.window + 1, columns - self.window + 1

    def cut(self, shapes: Sequence[tuple[int, int]]) -> list[list[tuple[int, int, int]]]:
        """Distribute the patches of frames over batches; see `cut_batches`.

        Args:
            shapes: rows and columns of patches, per frame.
        """
        return cut_batches([rows * columns for rows, columns in shapes], self.batch_size)

    def prepare(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the image tower's input for one batch of cells: [batch_size, 3, height, width], padded with zeros."""
        height, width = self.clip.image_size
        batch = torch.empty(self.batch_size, 3, height, width, dtype=self.clip.precision, device=self.clip.device)
        filled = 0
        for frame, start, stop in pieces:
            rows, columns = map_shape(frame.shape[1], frame.shape[0], self.grid)
            pixels = torch.from_numpy(frame).to(self.clip.device, non_blocking=True)
            patches = (cut_windows(pixels, rows, columns, self.window)[start:stop] - self._mean) / self._std
            target = batch[filled : filled + len(patches)]
            torch.clamp(stretch(patches, height, width), self._black, self._white, out=target)
            filled += len(patches)
        batch[filled:] = 0  # padding, whose embeddings are dropped
        return batch

    def encode(self, batch: Tensor) -> Tensor:
        """Return unit-length image embeddings of a prepared batch, pooled by the model: float16 [batch_size, D] on the device."""
        with exact_convolutions(self.clip.device):
            features = self._encode(batch)
        # Normalise in float32, because a sum of squares in half precision loses accuracy.
        return functional.normalize(features.float(), dim=-1).half()

    @torch.inference_mode()
    def embed_batches(self, batches: Iterable[Sequence[Piece]]) -> Iterator[np.ndarray]:
        """Yield the embeddings of each batch of at most batch_size cells: float16 [cells, D].

        A batch's result is fetched after the next one is launched, so that the device does not wait for the host.
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
        """Embed the patch of every cell of equally sized frames.

        Args:
            frames: T frames, uint8 [H, W, 3], RGB. Training crops can be passed as frames.

        Returns:
            float16 [T, R, C, D], unit length.
        """
        height, width = frames[0].shape[:2]
        rows, columns = self.count_patches(width, height)
        batches = self.cut([(rows, columns)] * len(frames))
        pieces = ([Piece(frames[f], start, stop) for f, start, stop in batch] for batch in batches)
        patches = np.concatenate(list(self.embed_batches(pieces))).reshape(len(frames), rows, columns, -1)
        return spread_windows(patches, self.window)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts, unit length: float32 [K, D]; see `stm.pretrained.clip.embed_texts`."""
        return embed_texts(self.clip, texts)


def cosine(embeddings: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of patches and texts.

    Args:
        embeddings: float16 [T, R, C, D], unit length. Newly computed embeddings are also rounded to float16, so that
            embeddings read from disk produce the same bytes.
        texts: float32 [K, D], unit length.

    Returns:
        float16 [K, T, R, C] in [-1, 1].
    """
    width = embeddings.shape[-1]
    flat = texts @ embeddings.reshape(-1, width).astype(np.float32).T
    # Rounded unit vectors can be slightly longer than 1.
    return flat.clip(-1, 1).astype(np.float16).reshape(len(texts), *embeddings.shape[:-1])


def cut_batches(patches: Sequence[int], batch_size: int) -> list[list[tuple[int, int, int]]]:
    """Distribute the patches of frames over batches, in order.

    All batches but the last have exactly batch_size patches; a frame may span several batches.

    Args:
        patches: number of patches per frame.

    Returns:
        per batch, a list of (frame index, first patch, one past the last patch).
    """
    batches: list[list[tuple[int, int, int]]] = [[]]
    room = batch_size
    for frame, count in enumerate(patches):
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
    """Yield each kept clip whose key is not in `finished`, with its embeddings, float16 [T, R, C, D].

    Batches span frames and clips. Their boundaries do not depend on `finished`, so a resumed job produces identical
    bits, but recomputes a few patches of finished clips. JPEGs are decoded up to two batches ahead.

    Raises:
        DamagedError: the tar is damaged or does not belong to the index.
    """
    frames = [(clip, number) for clip, row in enumerate(kept) for number in range(row["frames"])]
    shapes = [scorer.count_patches(row["width"], row["height"]) for row in kept]
    patches = [shapes[clip][0] * shapes[clip][1] for clip, _ in frames]
    all_batches = scorer.cut([shapes[clip] for clip, _ in frames])
    batches = [b for b in all_batches if any(kept[frames[f][0]]["key"] not in finished for f, _, _ in b)]

    # A frame may span several consecutive batches; it is decoded once for all of them.
    @lru_cache(maxsize=2)
    def decode(frame: int) -> np.ndarray:
        clip, number = frames[frame]
        return load_frame(frames_tar, kept[clip], number)

    def load(batch: Sequence[tuple[int, int, int]]) -> list[Piece]:
        return [Piece(decode(frame), start, stop) for frame, start, stop in batch]

    loaded = prefetch(partial(load, batch) for batch in batches)
    parts: dict[int, list[np.ndarray]] = {}
    for batch, embeddings in zip(batches, scorer.embed_batches(loaded), strict=True):
        at = 0  # position in the batch
        for frame, start, stop in batch:
            clip, number = frames[frame]
            part = embeddings[at : at + stop - start]
            at += stop - start
            if kept[clip]["key"] in finished:
                continue
            parts.setdefault(clip, []).append(part)
            if number == kept[clip]["frames"] - 1 and stop == patches[frame]:
                whole = np.concatenate(parts.pop(clip)).reshape(kept[clip]["frames"], *shapes[clip], -1)
                yield kept[clip], spread_windows(whole, scorer.window)
