"""The image of a batch: grey where tokens are hidden, the frame's own pixels where they are kept, colours of a guide."""

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

import stm
from stm.api.images import GAP, HEADING_HEIGHT, LABEL_WIDTH, ClipImage

SIDE, PATCH, FRAMES, TUBELET = 96, 24, 8, 2  # 96 pixels are drawn as they are
GREY = 140


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 130, (3, FRAMES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)  # never grey
    noise = torch.rand(3, FRAMES // TUBELET, 16, generator=generator)
    similarity = torch.rand(3, FRAMES // TUBELET, 16, generator=generator)
    guides = {"noise": noise, "similarity": similarity, "flow": torch.zeros(3, 2, FRAMES, 4, 4, 2)}
    return {"video": video, "guides": guides, "caption": ["a red square", "", "a" * 500], "key": ["x", "y", "z"]}


def tile(drawn: ClipImage, line: int, column: int, clip: int = 0, rows: int = 2) -> np.ndarray:
    """The pixels of one tile, found from the layout: rows below a heading per clip, columns right of the labels."""
    step = SIDE + GAP
    top = clip * (HEADING_HEIGHT + rows * step) + HEADING_HEIGHT + line * step
    left = LABEL_WIDTH + column * step
    return np.asarray(drawn.image)[top : top + SIDE, left : left + SIDE]


@pytest.mark.parametrize("boolean", [False, True])
def test_hidden_patches_are_grey_and_kept_ones_are_the_frames(batch: dict[str, Any], boolean: bool) -> None:
    kept = stm.mask(batch, "random", 0.5)
    image = stm.show(batch, stm.hidden(batch, kept) if boolean else kept)
    for clip in range(3):
        visible = set(kept[clip].tolist())
        for slot in range(FRAMES // TUBELET):  # the first frame of each slot
            frame = batch["video"][clip, slot * TUBELET].permute(1, 2, 0).numpy()
            assert (tile(image, 0, slot, clip) == frame).all()
            drawn = tile(image, 1, slot, clip)
            for token in range(16):
                part = np.s_[token // 4 * PATCH :, token % 4 * PATCH :][0:2]
                patch = drawn[part][:PATCH, :PATCH]
                expected = frame[part][:PATCH, :PATCH] if 16 * slot + token in visible else GREY
                assert (patch == expected).all()


def test_several_masks_and_guides_are_one_row_each(batch: dict[str, Any]) -> None:
    masks = {name: stm.mask(batch, name, 0.5) for name in ("random", "tube")}
    image = stm.show(batch, masks, guide="text", clips=[2])
    alone = stm.show(batch, masks["tube"], clips=[2])
    assert (tile(image, 3, 1) == tile(alone, 1, 1)).all()  # after frames, similarity and random
    values = batch["guides"]["similarity"][2].numpy()
    lowest, highest = (np.unravel_index(at, values.shape) for at in (values.argmin(), values.argmax()))
    for (slot, token), end in ((lowest, 0.0), (highest, 1.0)):
        row, column = token // 4 * PATCH, token % 4 * PATCH
        patch = tile(image, 1, slot)[row : row + PATCH, column : column + PATCH]
        grey = batch["video"][2, slot * TUBELET, :, row : row + PATCH, column : column + PATCH].float()
        luma = (grey * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).numpy()
        color = 0.62 * 255 * np.array(mpl.colormaps["viridis"](end)[:3]) + 0.38 * luma[..., None]
        assert np.abs(patch - color).max() <= 0.51


def test_columns_clips_and_formats(batch: dict[str, Any]) -> None:
    assert stm.show(batch, clips=1).image.width == LABEL_WIDTH + 4 * (SIDE + GAP) - GAP + 6
    image = stm.show(batch, clips=2, frames=8)
    for frame in range(8):
        assert (tile(image, 0, frame, 1, rows=1) == batch["video"][1, frame].permute(1, 2, 0).numpy()).all()


def test_a_notebook_displays_a_jpeg_and_files_have_the_exact_pixels(batch: dict[str, Any], tmp_path: Path) -> None:
    drawn = stm.show(batch, clips=1)
    drawn.save(tmp_path / "clips.png")
    assert (np.asarray(Image.open(tmp_path / "clips.png")) == np.asarray(drawn.image)).all()
    displayed = Image.open(io.BytesIO(drawn._repr_jpeg_()))
    assert displayed.format == "JPEG" and displayed.size == drawn.image.size
    assert np.abs(np.asarray(displayed).astype(int) - np.asarray(drawn.image)).mean() < 8
    assert [name for name in dir(drawn) if name.startswith("_repr_")] == ["_repr_jpeg_"]  # a notebook keeps one format


def test_headings_are_captions_or_keys_and_never_wider_than_the_image(batch: dict[str, Any]) -> None:
    image = stm.show(batch)
    step = HEADING_HEIGHT + SIDE + GAP
    for clip in range(3):
        heading = np.asarray(image.image)[clip * step : clip * step + HEADING_HEIGHT]
        assert (heading[:, LABEL_WIDTH:] < 128).any()  # something is written
        assert (heading[:, -4:] == 255).all()


def test_other_sizes_are_resized_and_single_frames_drawn() -> None:
    video = torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8)
    image = stm.show({"video": video, "guides": {"noise": torch.zeros(1, 1, 4)}})
    assert image.image.width == LABEL_WIDTH + 128 + 6


def test_what_cannot_be_drawn_is_explained(batch: dict[str, Any]) -> None:
    for arguments, message in (
        (
            {"masks": torch.zeros(3, 4)},
            r"mask: float32 \[3, 4\] is not a mask of this batch. Kept tokens are int64 \[3, K\]",
        ),
        ({"masks": np.zeros((3, 4))}, "ndarray'> is not a mask of this batch"),
        ({"masks": {"mine": torch.zeros(2, 4, dtype=torch.int64)}}, r"mine: int64 \[2, 4\]"),
        ({"masks": torch.full((3, 4), 64)}, "with numbers from 0 to 63"),
        ({"masks": torch.zeros(3, 5, dtype=torch.bool)}, r"a boolean mask is \[3, 4, 4, 4\]"),
        ({"guide": "flow"}, "no guide 'flow' with one value per token; it has: noise, similarity"),
        ({"guide": "motion"}, "no guide 'motion'"),
        ({"clips": [3]}, "the batch has 3 clips, with numbers from 0 to 2"),
        ({"clips": 0}, "the batch has 3 clips"),
        ({"frames": 0}, "frames must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            stm.show(batch, **arguments)
