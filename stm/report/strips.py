"""Film strips: pixels of one row of a clip's picture. Rows are quantities, columns are time slots.

All tiles are uint8 [slots, side, side, 3], red, green and blue.
"""

import io
import textwrap
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, features

Tiles = NDArray[np.uint8]

TILE = 128  # pixels; frames of 96 to 160 pixels are shown as they are
GAP = 4  # pixels between the tiles
LABEL_INCHES, HEAD_INCHES = 1.7, 0.45  # of a composed figure
HIDDEN = 140  # grey of a masked patch
BOX = (240, 228, 66)  # Okabe and Ito's yellow, with a black line around it: visible on anything
COLORMAP = "viridis"  # even in lightness, so it reads the same without colours


@dataclass(frozen=True)
class Scale:
    """What the colours of a heat map stand for."""

    low: float
    high: float
    unit: str


@dataclass(frozen=True)
class Row:
    """One quantity over the time slots of a clip."""

    kind: str  # frames, map, mask or reconstruction
    label: str
    tiles: Tiles
    note: str = ""
    scale: Scale | None = None
    run: int | None = None  # number of the run, for its colour


def resize(tiles: Tiles) -> Tiles:
    """To the size that is shown: small frames are enlarged, large ones reduced."""
    side = tiles.shape[1]
    if 96 <= side <= 160:
        return tiles
    parts = [Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.LANCZOS) for tile in tiles]
    return np.stack([np.asarray(part) for part in parts])


def enlarge(cells: NDArray[np.generic], side: int) -> NDArray[np.generic]:
    """Cells [slots, n, n] -> [slots, side, side], each cell a flat square."""
    index = np.arange(side) * cells.shape[1] // side
    return cells[:, index][:, :, index]


def heat(tiles: Tiles, cells: NDArray[np.float32], scale: Scale) -> Tiles:
    """A map [slots, n, n] in colour over the frames in grey."""
    side = tiles.shape[1]
    spread = max(scale.high - scale.low, 1e-12)
    share = np.clip((enlarge(cells, side).astype(np.float64) - scale.low) / spread, 0, 1)
    color = mpl.colormaps[COLORMAP](share)[..., :3] * 255
    grey = tiles @ np.array([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
    return np.rint(0.62 * color + 0.38 * grey[..., None]).astype(np.uint8)


def colormap_stops(count: int = 7) -> list[str]:
    """Colours of the heat maps from low to high, for the legend."""
    values = mpl.colormaps[COLORMAP](np.linspace(0, 1, count))[:, :3]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in value) for value in values]


def grey_out(tiles: Tiles, masked: NDArray[np.bool_]) -> Tiles:
    """Masked cells [slots, n, n] become grey squares."""
    hidden = enlarge(masked, tiles.shape[1])
    return np.where(hidden[..., None], np.uint8(HIDDEN), tiles)


def draw_boxes(tiles: Tiles, boxes: NDArray[np.float64]) -> Tiles:
    """Outlines of boxes [slots, 4] (x0, y0, x1, y1 as shares of the tile); NaN: none in that slot."""
    drawn = tiles.copy()
    side = tiles.shape[1]
    for tile, box in zip(drawn, boxes, strict=True):
        if np.isfinite(box).all():
            x0, y0, x1, y1 = (int(v) for v in np.rint(box * side))
            for inset, width, color in ((0, 3, (0, 0, 0)), (1, 2, BOX)):
                _outline(tile, (x0 + inset, y0 + inset, x1 - inset, y1 - inset), width, color)
    return drawn


def _outline(tile: Tiles, box: tuple[int, int, int, int], width: int, color: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = box
    tile[y0:y1, x0 : x0 + width] = tile[y0:y1, max(x0, x1 - width) : x1] = color
    tile[y0 : y0 + width, x0:x1] = tile[max(y0, y1 - width) : y1, x0:x1] = color


def join(tiles: Tiles) -> NDArray[np.uint8]:
    """Tiles side by side with transparent gaps, [side, width, 4]."""
    slots, side = tiles.shape[:2]
    strip = np.zeros((side, slots * (side + GAP) - GAP, 4), dtype=np.uint8)
    for slot, tile in enumerate(tiles):
        left = slot * (side + GAP)
        strip[:, left : left + side, :3] = tile
        strip[:, left : left + side, 3] = 255
    return strip


def encode(tiles: Tiles) -> tuple[str, bytes]:
    """Media type and bytes of a strip for the page: WebP, a tenth of PNG's size, or PNG where Pillow lacks it."""
    sink = io.BytesIO()
    image = Image.fromarray(join(tiles))
    if features.check("webp"):
        image.save(sink, "WEBP", quality=88, method=4, use_sharp_yuv=True)
        return "image/webp", sink.getvalue()
    image.save(sink, "PNG", optimize=True)
    return "image/png", sink.getvalue()


def compose(title: str, rows: list[Row]) -> Figure:
    """All rows of a clip as one figure, labels on the left: the same layout as the page's. Sizes are in inches."""
    slots = max((len(row.tiles) for row in rows), default=1)
    tile = 1.1 if slots < 6 else 6.6 / slots
    width, height = max(5.0, LABEL_INCHES + slots * tile + 0.1), HEAD_INCHES + max(1, len(rows)) * tile + 0.05
    with mpl.rc_context({"text.parse_math": False, "font.sans-serif": ["DejaVu Sans"]}):
        figure = Figure(figsize=(width, height), facecolor="white")
        # Matplotlib's own wrapping takes a dollar sign for mathematics, whatever the settings say.
        heading = textwrap.shorten(title or "no clip to show", int(2 * 15 * width), placeholder=" …")
        heading = textwrap.fill(heading, int(15 * width))
        figure.text(0.08 / width, 1 - 0.1 / height, heading, fontsize=8, va="top")
        for number, row in enumerate(rows):
            middle = height - HEAD_INCHES - (number + 0.5) * tile
            figure.text(
                (LABEL_INCHES - 0.1) / width, middle / height, _label(row), ha="right", va="center", fontsize=7.5
            )
        if rows:
            place = (LABEL_INCHES / width, 0.05 / height, slots * tile / width, len(rows) * tile / height)
            axes = figure.add_axes(place)
            axes.imshow(_stack(rows, slots), interpolation="antialiased", aspect="auto")
            axes.set_axis_off()
    return figure


def _stack(rows: list[Row], slots: int) -> Tiles:
    """All strips on white, one square field a tile, the gap at its right and lower edge."""
    field = max(row.tiles.shape[1] for row in rows) + GAP
    canvas = np.full((len(rows) * field, slots * field, 3), 255, dtype=np.uint8)
    for number, row in enumerate(rows):
        for slot, tile in enumerate(row.tiles):
            top, left, side = number * field, slot * field, len(tile)
            canvas[top : top + side, left : left + side] = tile
    return canvas


def _label(row: Row) -> str:
    scale = "" if row.scale is None else f"{row.scale.low:.2f} to {row.scale.high:.2f}\n{row.scale.unit}"
    return "\n".join(filter(None, (row.label, row.note, scale)))
