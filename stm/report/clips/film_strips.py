"""Film strips: the images of a clip, with one row per quantity and one column per time slot.

Tiles are uint8 RGB [slots, side, side, 3]; grids have one value per token, [slots, n, n].
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, features

Tiles = NDArray[np.uint8]

TILE = 128  # pixels; frames of 96 to 160 pixels keep their size
GAP = 4  # pixels between the tiles
LABEL_INCHES, HEAD_INCHES, GAP_INCHES = 1.7, 0.45, 0.1  # in a composed figure
MAX_INCHES = 9.0  # maximum total width of clips placed side by side
LABEL_CHARACTERS = 26  # per line
HIDDEN = 140  # grey of a masked patch
BOX = (240, 228, 66)  # Okabe and Ito's yellow; outlined in black, so that it is visible on any background
QUERY = (220, 30, 30)  # red outline of the query token of an attention map
COLORMAP = "viridis"  # perceptually uniform, and legible in greyscale


@dataclass(frozen=True)
class Scale:
    """Range and unit of a heat map's colours."""

    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class Row:
    """One quantity over the time slots of a clip."""

    kind: str  # frames, map, mask, reconstruction or attention
    label: str
    tiles: Tiles
    note: str = ""
    scale: Scale | None = None
    run: int | None = None  # index of the run in the config, which determines its colour


def resize(tiles: Tiles) -> Tiles:
    """Resize tiles for display: small frames are enlarged, large ones reduced."""
    side = tiles.shape[1]
    if 96 <= side <= 160:
        return tiles
    parts = [Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.LANCZOS) for tile in tiles]
    return np.stack([np.asarray(part) for part in parts])


def enlarge(grid: NDArray[np.generic], side: int) -> NDArray[np.generic]:
    """Upsample a grid [slots, n, n] to [slots, side, side] by nearest neighbour: each token is a flat square."""
    index = np.arange(side) * grid.shape[1] // side
    return grid[:, index][:, :, index]


def heat_map(tiles: Tiles, grid: NDArray[np.float32], scale: Scale) -> Tiles:
    """Overlay a grid [slots, n, n] in colour on the greyscale frames."""
    side = tiles.shape[1]
    spread = max(scale.high - scale.low, 1e-12)
    share = np.clip((enlarge(grid, side).astype(np.float64) - scale.low) / spread, 0, 1)
    return _tint(tiles, mpl.colormaps[COLORMAP](share)[..., :3])


def color_groups(tiles: Tiles, groups: NDArray[np.int64]) -> Tiles:
    """Overlay zero-based group indices [slots, n, n] on the greyscale frames, with one colour per group."""
    number = enlarge(groups, tiles.shape[1]).astype(np.float64)
    # Golden-ratio steps keep the hues of consecutive groups far apart for any number of groups.
    hue = (number * 0.618034) % 1
    strong = number % 2 == 0
    return _tint(tiles, hsv_to_rgb(np.stack([hue, np.where(strong, 0.9, 0.6), np.where(strong, 0.8, 1.0)], axis=-1)))


def _tint(tiles: Tiles, color: NDArray[np.float64]) -> Tiles:
    """Blend colours [slots, side, side, 3], from 0 to 1, with the greyscale frames."""
    grey = tiles @ np.array([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
    return np.rint(0.62 * 255 * color + 0.38 * grey[..., None]).astype(np.uint8)


def colormap_stops(count: int = 7) -> list[str]:
    """Return the hexadecimal colours of the heat maps from low to high, for the legend."""
    values = mpl.colormaps[COLORMAP](np.linspace(0, 1, count))[:, :3]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in value) for value in values]


def grey_out(tiles: Tiles, masked: NDArray[np.bool_]) -> Tiles:
    """Replace masked tokens, bool [slots, n, n], with grey squares."""
    hidden = enlarge(masked, tiles.shape[1])
    return np.where(hidden[..., None], np.uint8(HIDDEN), tiles)


def draw_boxes(tiles: Tiles, boxes: NDArray[np.float64]) -> Tiles:
    """Outline boxes [slots, 4] (x0, y0, x1, y1 as fractions of the tile); NaN: no box in that slot."""
    drawn = tiles.copy()
    side = tiles.shape[1]
    for tile, box in zip(drawn, boxes, strict=True):
        if np.isfinite(box).all():
            x0, y0, x1, y1 = (int(v) for v in np.rint(box * side))
            for inset, width, color in ((0, 3, (0, 0, 0)), (1, 2, BOX)):
                _outline(tile, (x0 + inset, y0 + inset, x1 - inset, y1 - inset), width, color)
    return drawn


def mark_token(tiles: Tiles, slot: int, row: int, column: int, side: int) -> Tiles:
    """Outline one token of a tile's `side` x `side` grid in red, with a white border."""
    drawn = tiles.copy()
    size = tiles.shape[1]
    # The same rounding as in `enlarge`, which assigns a pixel to token pixel * side // size.
    x0, x1 = (-(-edge * size // side) for edge in (column, column + 1))
    y0, y1 = (-(-edge * size // side) for edge in (row, row + 1))
    for outset, width, color in ((3, 2, (255, 255, 255)), (1, 2, QUERY)):
        box = (max(0, x0 - outset), max(0, y0 - outset), min(size, x1 + outset), min(size, y1 + outset))
        _outline(drawn[slot], box, width, color)
    return drawn


def mark_points(
    tiles: Tiles, points: NDArray[np.float64], shape: Literal["dot", "square"], color: tuple[int, int, int], size: float
) -> Tiles:
    """Mark points [slots, K, 2] (x, y: fractions of the tile; NaN: no point), `size` pixels wide, outlined in black."""
    drawn = tiles.copy()
    axis = np.arange(tiles.shape[1]) + 0.5
    for tile, pixels in zip(drawn, points * tiles.shape[1], strict=True):
        for x, y in pixels[np.isfinite(pixels).all(axis=-1)]:
            across, down = np.abs(axis - x), np.abs(axis - y)[:, None]
            distance = np.hypot(across, down) if shape == "dot" else np.maximum(across, down)
            tile[distance <= size / 2 + 1.5] = 0
            tile[distance <= size / 2] = color
    return drawn


def _outline(tile: Tiles, box: tuple[int, int, int, int], width: int, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    tile[y0:y1, x0 : x0 + width] = tile[y0:y1, max(x0, x1 - width) : x1] = color
    tile[y0 : y0 + width, x0:x1] = tile[max(y0, y1 - width) : y1, x0:x1] = color


def join(tiles: Tiles) -> NDArray[np.uint8]:
    """Join tiles side by side with transparent gaps, RGBA [side, width, 4]."""
    slots, side = tiles.shape[:2]
    strip = np.zeros((side, slots * (side + GAP) - GAP, 4), dtype=np.uint8)
    for slot, tile in enumerate(tiles):
        left = slot * (side + GAP)
        strip[:, left : left + side, :3] = tile
        strip[:, left : left + side, 3] = 255
    return strip


def encode(tiles: Tiles) -> tuple[str, bytes]:
    """Return the media type and encoded bytes of a strip for the page."""
    return encode_image(Image.fromarray(join(tiles)))


def encode_image(image: Image.Image) -> tuple[str, bytes]:
    """Return the media type and encoded bytes of an image: WebP, a tenth of PNG's size, or PNG if Pillow lacks WebP."""
    sink = io.BytesIO()
    # WebP is limited to 16383 pixels per side.
    if features.check("webp") and max(image.size) < 16384:
        image.save(sink, "WEBP", quality=88, method=4, use_sharp_yuv=True)
        return "image/webp", sink.getvalue()
    image.save(sink, "PNG", optimize=True)
    return "image/png", sink.getvalue()


def compose(clips: Sequence[tuple[str, list[Row]]], title: str = "") -> Figure:
    """Compose clips into one figure with the labels on the left, as on the page.

    Args:
        clips: heading and rows of each clip; short clips are placed side by side, long ones are stacked.
        title: shown above all clips.
    """
    slots = max((len(row.tiles) for _, rows in clips for row in rows), default=1)
    tile = 1.1 if slots < 6 else 6.6 / slots
    across = max(5.0 if len(clips) == 1 else 0.0, LABEL_INCHES + slots * tile + 0.1)
    columns = min(len(clips), max(1, int(MAX_INCHES / across)))
    lines = [list(clips[start : start + columns]) for start in range(0, len(clips), columns)]
    heights = [HEAD_INCHES + max(1, *(len(rows) for _, rows in line)) * tile + 0.05 for line in lines]
    top = 0.3 if title else 0.0
    width = columns * across
    height = top + sum(heights) + GAP_INCHES * (len(lines) - 1)
    with mpl.rc_context({"text.parse_math": False, "font.sans-serif": ["DejaVu Sans"]}):
        figure = Figure(figsize=(width, height), facecolor="white")
        figure.text(0.08 / width, 1 - 0.1 / height, title, fontsize=10, va="top", fontweight="bold")
        for line, extent in zip(lines, heights, strict=True):
            for column, (heading, rows) in enumerate(line):
                _draw_clip(figure, heading, rows, (column * across, height - top), across, tile, slots)
            top += extent + GAP_INCHES
    return figure


def _draw_clip(
    figure: Figure, heading: str, rows: list[Row], place: tuple[float, float], across: float, tile: float, slots: int
) -> None:
    """Draw one clip, `across` inches wide; `place` is its upper left corner, in inches from the figure's lower left."""
    width, height = figure.get_size_inches()
    left, upper = place
    # Matplotlib's own wrapping parses dollar signs as math even with text.parse_math off.
    heading = textwrap.shorten(heading or "no clip to show", int(2 * 15 * across), placeholder=" …")
    heading = textwrap.fill(heading, int(15 * across))
    figure.text((left + 0.08) / width, (upper - 0.1) / height, heading, fontsize=8, va="top")
    for number, row in enumerate(rows):
        x, y = left + LABEL_INCHES - 0.1, upper - HEAD_INCHES - (number + 0.5) * tile
        figure.text(x / width, y / height, _label(row), ha="right", va="center", fontsize=7.5)
    if rows:
        lower = upper - HEAD_INCHES - len(rows) * tile
        extent = (slots * tile / width, len(rows) * tile / height)
        axes = figure.add_axes(((left + LABEL_INCHES) / width, lower / height, *extent))
        axes.imshow(_stack(rows, slots), interpolation="antialiased", aspect="auto")
        axes.set_axis_off()


def _stack(rows: list[Row], slots: int) -> Tiles:
    """Stack all strips on a white background; each tile is padded by the gap at its right and bottom edges."""
    field = max(row.tiles.shape[1] for row in rows) + GAP
    canvas = np.full((len(rows) * field, slots * field, 3), 255, dtype=np.uint8)
    for number, row in enumerate(rows):
        for slot, tile in enumerate(row.tiles):
            top, left, side = number * field, slot * field, len(tile)
            canvas[top : top + side, left : left + side] = tile
    return canvas


def _label(row: Row) -> str:
    """Format a row's label, note and scale in lines that fit next to the strip; long notes are broken at commas."""
    scale = "" if row.scale is None else f"{row.scale.low:.2f} to {row.scale.high:.2f}\n{row.scale.unit}"
    notes = [row.note] if len(row.note) <= LABEL_CHARACTERS else row.note.split(", ")
    parts = (textwrap.shorten(part, 2 * LABEL_CHARACTERS, placeholder=" …") for part in (row.label, *notes))
    return "\n".join(filter(None, (*(textwrap.fill(part, LABEL_CHARACTERS) for part in parts), scale)))
