"""What a page needs to show viewers: their HTML, one style sheet, one script, and the policy that allows only that script."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stm.report.html import make_environment, to_markup
from stm.report.viewer.encode import encode_viewer
from stm.report.viewer.masks import MaskViewer

FOLDER = Path(__file__).parent
# A browser loads nothing else for the page and runs no other script, whatever captions and file names contain.
POLICY = Markup("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


@dataclass(frozen=True)
class ViewerParts:
    """The parts of a page with viewers; all of them are empty if there is nothing to view, except the policy."""

    viewers: dict[str, Markup]  # by the name given to `make_parts`
    style: Markup
    script: Markup
    policy: Markup  # value of the page's Content-Security-Policy


def make_parts(viewers: Mapping[str, MaskViewer]) -> ViewerParts:
    """Make the parts of a page for one or more viewers, such as one per dataset; those without clips or masks are left out.

    The page places `style` in its style element, each viewer where it belongs, and `<script>{{ script }}</script>` after the
    last one, without any character in between, because the policy contains the script's hash.
    """
    shown = {name: viewer for name, viewer in viewers.items() if viewer.clips and viewer.strategies}
    if not shown:
        return ViewerParts({}, Markup(), Markup(), POLICY)
    script = _read("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ViewerParts(
        {name: render_viewer(viewer) for name, viewer in shown.items()},
        to_markup(_read("viewer.css")),
        to_markup(script),
        POLICY + to_markup(f"; script-src 'sha256-{digest}'"),
    )


def render_viewer(viewer: MaskViewer) -> Markup:
    """Render one viewer, hidden until the page's script starts it."""
    missing = [f"{strategy} ({reason})" for strategy, reason in viewer.missing.items()]
    boxes = any(cuts[0].boxes is not None for cuts in viewer.clips)
    html = (
        make_environment(FOLDER)
        .get_template("viewer.html")
        .render(data=to_json(encode_viewer(viewer)), missing=missing, boxes=boxes)
    )
    return to_markup(html)


def to_json(values: Any) -> Markup:
    """Format values as JSON for a script element; no caption or file name can close the element."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return to_markup(text)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
