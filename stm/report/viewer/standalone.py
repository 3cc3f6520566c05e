"""The page that `stm view` writes: one viewer and, below it, still images of every mask at its usual ratio."""

import os
from pathlib import Path
from typing import Any

from stm.report.clips import film_strips
from stm.report.clips.cuts import frames_row, map_row, mask_row
from stm.report.clips.draw import MAPS
from stm.report.clips.film_strips import Row
from stm.report.html import data_url, make_environment, to_markup
from stm.report.viewer.fragment import FOLDER, make_parts
from stm.report.viewer.masks import MaskViewer
from stm.report.viewer.own_video import ViewError, ViewRequest, check_request, draw_video
from stm.storage.files import write_bytes

STYLE = Path(__file__).parents[1] / "page" / "style.css"  # the colours and film strips of the study's page


def write_view(request: ViewRequest, out: Path) -> str:
    """Write the viewer page of a video, and return a line that says what was written.

    Raises:
        ViewError: see `stm.report.viewer.own_video.draw_video`; or `out` is a folder, or cannot be written.
    """
    check_request(request)
    if out.is_dir():
        raise ViewError(f"--out {out} is a folder; name a file in it, such as {out / 'view.html'}")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ViewError(
            f"--out {out} cannot be written: {place} is {'read-only' if place.is_dir() else 'not a folder'}"
        )
    data = render_view(draw_video(request), request).encode()
    write_bytes(out, data)
    return f"{out} ({len(data) / 1e6:.1f} MB); open it in a browser"


def render_view(viewer: MaskViewer, request: ViewRequest) -> str:
    """Render the page of a viewer with one clip."""
    name = request.video.name
    shape = request.geometry
    about = (
        f"{shape.frames} frames of {shape.image_size} x {shape.image_size} pixels (the central square); {shape.slots} slots of "
        f"{shape.side} x {shape.side} tokens"
    )
    if request.clip_model is not None:
        about += f"; CLIP: {request.clip_model}"
    style = to_markup(STYLE.read_text(encoding="utf-8"))
    page = make_environment(FOLDER).get_template("standalone.html")
    parts = make_parts({name: viewer})
    captions = [cut.caption for cut in viewer.clips[0]]
    rows = [_show(row) for row in still_rows(viewer)]
    return page.render(name=name, about=about, style=style, parts=parts, captions=captions, rows=rows) + "\n"


def still_rows(viewer: MaskViewer) -> list[Row]:
    """Build the rows of the first clip: frames, maps, and each strategy's mask at its usual ratio, for the first caption."""
    cut = viewer.clips[0][0]
    rows: list[Row | None] = [frames_row(cut), *(map_row(cut, guide, *texts) for guide, texts in MAPS.items())]
    for drawn in viewer.strategies:
        masked = drawn.masks[0][0][drawn.ratios.index(drawn.usual)]
        rows.append(mask_row(cut, f"{drawn.strategy} {drawn.usual:g}", masked, ratio=drawn.usual))
    return [row for row in rows if row is not None]


def _show(row: Row) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "label": row.label,
        "note": row.note,
        "tiles": len(row.tiles),
        "image": data_url(*film_strips.encode(row.tiles)),
    }
