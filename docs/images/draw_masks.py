"""Draws `masks.png`, the README's picture: one generated clip of the demo under the masking strategies.

    python docs/images/draw_masks.py

It takes half a minute on one core, without a network; the CLIP is the demo's.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw, ImageFont

from stm.config import MovingShapesDataset, load_config
from stm.datasets.moving_shapes.generate import caption_of, draw_clip_spec, encode, render_clip
from stm.report.clips.film_strips import Tiles, grey_out
from stm.report.viewer.masks import MaskViewer
from stm.report.viewer.own_video import ViewRequest, draw_video

ROOT = Path(__file__).parents[2]
CLIP = 7  # of the demo's test split; its camera moves, so that motion alone does not find the object
TITLES = {
    "tube": "tube",
    "text_top": "text_top (TGM)",
    "motion": "motion (MGM)",
    "motion_compensated": "motion_compensated",
    "flow": "flow (MGMAE)",
    "attention": "attention (UMT)",
    "cluster": "cluster (ClusterSTM)",
}
COLUMNS, TILE, GAP, LABEL = 6, 88, 4, 202  # pixels, except COLUMNS
COLORS = 96  # of the palette: 256 would double the file


def draw_clip() -> tuple[MaskViewer, str]:
    """Generate the clip, and draw every strategy on it; also return its caption."""
    dataset = load_config(ROOT / "config/demo.yaml").of("shapes").dataset
    assert isinstance(dataset, MovingShapesDataset)
    spec = draw_clip_spec(0, "test", CLIP, dataset)
    with TemporaryDirectory() as folder:
        video = Path(folder) / "clip.mp4"
        encode(render_clip(spec).frames, spec.fps, video)
        request = ViewRequest(
            video,
            captions=(caption_of(spec),),
            model=f"local-dir:{ROOT / 'stm/assets/demo-clip'}",
            frames=12,
            image_size=128,
            every=2,
        )
        return draw_video(request), caption_of(spec)


def make_rows(viewer: MaskViewer) -> list[tuple[str, Tiles]]:
    """Return the label and the tiles [COLUMNS, S, S, 3] of each row."""
    (cut,) = viewer.clips[0]
    rows = [("frames", cut.frames)]
    masks = {drawn.strategy: drawn for drawn in viewer.strategies}
    for strategy, title in TITLES.items():
        drawn = masks[strategy]
        hidden = drawn.masks[0][0][drawn.ratios.index(drawn.usual)]
        rows.append((f"{title} {drawn.usual:g}", grey_out(cut.frames, hidden[cut.slots])))
    return rows


def compose(rows: list[tuple[str, Tiles]]) -> Image.Image:
    """Lay out the rows on white, with the labels on the left."""
    field = TILE + GAP
    canvas = Image.new("RGB", (LABEL + COLUMNS * field, len(rows) * field + GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for number, (label, tiles) in enumerate(rows):
        top = GAP + number * field
        pen.text((LABEL - 10, top + TILE / 2), label, fill=(30, 30, 30), font=font, anchor="rm")
        for column, tile in enumerate(tiles[:COLUMNS]):
            small = Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.LANCZOS)
            canvas.paste(small, (LABEL + column * field, top))
    return canvas.quantize(COLORS, dither=Image.Dither.NONE)


def main() -> None:
    viewer, caption = draw_clip()
    print(caption, viewer.missing)
    compose(make_rows(viewer)).save(Path(__file__).with_name("masks.png"), optimize=True)


if __name__ == "__main__":
    main()
