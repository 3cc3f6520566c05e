"""Draws clips of a batch with their masks and guides, as the report's page does, as an image for a notebook."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stm.api.masks import geometry_of, hidden
from stm.data.geometry import Geometry
from stm.report.clips import film_strips
from stm.report.clips.cuts import choose_frames, show_video
from stm.report.clips.film_strips import GAP, Row, Scale

ALIASES = {"text": "similarity"}  # what people call a guide
UNITS = {"similarity": "cosine", "motion": "cells per frame"}
LABEL_WIDTH, HEADING_HEIGHT, MARGIN = 158, 22, 6  # pixels; `motion_compensated_box` fits
FONT_SIZE = 11  # pixels
JPEG_QUALITY = 80


@dataclass(frozen=True)
class ClipImage:
    """An image that a notebook displays.

    It is displayed as a JPEG, because the PNG of textured frames is five times as large and a notebook keeps it; `image` has
    the exact pixels.
    """

    image: Image.Image  # RGB

    def save(self, path: str | Path) -> None:
        """Write the image to a file, in the format of its suffix."""
        self.image.save(path)

    def _repr_jpeg_(self) -> bytes:
        sink = io.BytesIO()
        self.image.save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
        return sink.getvalue()

    def __repr__(self) -> str:
        return f"<image of {self.image.width} x {self.image.height} pixels>"


def show(
    batch: Mapping[str, Any],
    masks: Tensor | Mapping[str, Tensor] | None = None,
    *,
    guide: str | Sequence[str] = (),
    clips: int | Sequence[int] = 4,
    frames: int | None = None,
) -> ClipImage:
    """Draw clips with their masks and guides: one row each, one column per frame.

    Examples:
        >>> stm.show(batch, kept)  # doctest: +SKIP
        >>> stm.show(batch, {"text": kept, "tube": stm.mask(batch, "tube", 0.6)}, guide="text", clips=1)  # doctest: +SKIP

    Args:
        batch: "video" uint8 [B, T, 3, S, S] and "guides", as loaders return them; "caption" if there are captions.
        masks: kept tokens, int64 [B, K], whose complement is drawn in grey; or several of them, by label. Boolean masks, as
            `hidden` returns them, are drawn, too.
        guide: the name of a guide to draw as a heat map, or several; "text" is the similarity to the caption.
        clips: how many of the batch's clips to draw, or their numbers.
        frames: columns; by default at most 8, one per slot if there are many.

    Returns:
        An image that a notebook displays; `save` writes it to a file. Frames of 96 to 160 pixels keep their size, others are
        resized to 128.

    Raises:
        ValueError: a mask does not belong to the batch, the batch has no such guide, or there are no such clips.
    """
    shape = geometry_of(batch)
    columns = choose_frames(shape) if frames is None else _spread(frames, shape.frames)
    named = dict(masks) if isinstance(masks, Mapping) else {} if masks is None else {"mask": masks}
    booleans = {label: _to_hidden(batch, label, each) for label, each in named.items()}
    guides = [ALIASES.get(name, name) for name in ([guide] if isinstance(guide, str) else guide)]
    for name in guides:
        _check_guide(batch, name)
    drawn = [
        (_heading(batch, clip), _draw_rows(batch, clip, shape, columns, guides, booleans))
        for clip in _choose_clips(clips, len(batch["video"]))
    ]
    return ClipImage(_compose(drawn))


def _spread(count: int, frames: int) -> list[int]:
    """`count` of a clip's frames, evenly spaced from the first on; all of them if there are fewer."""
    if count < 1:
        raise ValueError(f"frames must be a positive integer, is {count}")
    return list(range(0, frames, -(-frames // count)))


def _choose_clips(clips: int | Sequence[int], count: int) -> list[int]:
    chosen = list(range(min(clips, count))) if isinstance(clips, int) else list(clips)
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(f"clips={clips}: the batch has {count} clips, with numbers from 0 to {count - 1}")
    return chosen


def _to_hidden(batch: Mapping[str, Any], label: str, tokens: Tensor) -> NDArray[np.bool_]:
    """A mask given as kept tokens or as booleans, as bool [B, slots, side, side]."""
    shape, clips = geometry_of(batch), len(batch["video"])
    full = (clips, shape.slots, shape.side, shape.side)
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool and tokens.numel() == math.prod(full):
        return tokens.cpu().reshape(full).numpy()
    try:
        return hidden(batch, tokens).cpu().numpy()
    except ValueError as error:
        raise ValueError(f"{label}: {error}; a boolean mask is {list(full)}") from None


def _check_guide(batch: Mapping[str, Any], name: str) -> None:
    """Reject a guide that the batch lacks, or that is not one number per token, such as optical flow."""
    present = batch["guides"]
    drawable = [each for each, values in present.items() if values.shape == present["noise"].shape]
    if name not in drawable:
        raise ValueError(f"the batch has no guide {name!r} with one value per token; it has: {', '.join(drawable)}")


def _heading(batch: Mapping[str, Any], clip: int) -> str:
    caption = batch.get("caption", [""] * (clip + 1))[clip]
    return f"“{caption}”" if caption else str(batch.get("key", [""] * (clip + 1))[clip])


def _draw_rows(
    batch: Mapping[str, Any],
    clip: int,
    shape: Geometry,
    columns: list[int],
    guides: Sequence[str],
    masks: Mapping[str, NDArray[np.bool_]],
) -> list[Row]:
    tiles = show_video(batch["video"][clip : clip + 1].cpu(), columns)
    slots = [frame // shape.tubelet for frame in columns]
    rows = [Row("frames", "frames", tiles)]
    for name in guides:
        values = batch["guides"][name][clip].float().cpu().numpy()
        grid = values.reshape(-1, shape.side, shape.side)[slots]
        scale = Scale(float(grid.min()), float(grid.max()), UNITS.get(name, ""))
        note = f"{scale.low:.2f} to {scale.high:.2f}"
        rows.append(Row("map", name, film_strips.heat_map(tiles, grid, scale), note, scale))
    for label, masked in masks.items():
        note = f"hides {100 * masked[clip].mean():.3g} %"
        rows.append(Row("mask", label, film_strips.grey_out(tiles, masked[clip][slots]), note))
    return rows


# --------------------------------------------------------------------------------------------------- the image


def _compose(clips: Sequence[tuple[str, list[Row]]]) -> Image.Image:
    """Place the rows of each clip below its heading, with the labels on the left; a tile's pixels stay as they are."""
    columns, side = clips[0][1][0].tiles.shape[:2]
    width = LABEL_WIDTH + columns * (side + GAP) - GAP + MARGIN
    height = sum(HEADING_HEIGHT + len(rows) * (side + GAP) for _, rows in clips) + MARGIN
    image = Image.new("RGB", (width, height), "white")
    draw, font, top = ImageDraw.Draw(image), _load_font(), 0
    for heading, rows in clips:
        draw.text((LABEL_WIDTH, top + 4), _shorten(heading, font, width - LABEL_WIDTH - MARGIN), "black", font)
        top += HEADING_HEIGHT
        for row in rows:
            strip = Image.fromarray(film_strips.join(row.tiles))  # with transparent gaps
            image.paste(strip, (LABEL_WIDTH, top), strip)
            lines = [_shorten(line, font, LABEL_WIDTH - 2 * MARGIN) for line in (row.label, row.note) if line]
            place = (LABEL_WIDTH - MARGIN, top + side / 2)
            draw.multiline_text(place, "\n".join(lines), "black", font, anchor="rm", align="right")
            top += side + GAP
    return image


@cache
def _load_font() -> ImageFont.FreeTypeFont:
    """The font of the report's figures, which matplotlib ships."""
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT_SIZE)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as fits `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
