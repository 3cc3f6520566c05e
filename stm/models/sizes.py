"""VideoMAE's model sizes."""

from collections.abc import Mapping
from typing import NamedTuple

from stm.config import ModelSize


class Size(NamedTuple):
    """Widths, depths and numbers of heads of the encoder and the decoder."""

    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


# VideoMAE's sizes (its modeling_pretrain.py), with the decoder depths of its pretraining scripts. `tiny` is ours, for the
# demo and the tests: a third of the width and depth of `small`.
SIZES: Mapping[ModelSize, Size] = {
    "tiny": Size(128, 4, 4, 64, 2, 2),
    "small": Size(384, 12, 6, 192, 4, 3),
    "base": Size(768, 12, 12, 384, 4, 6),
    "large": Size(1024, 24, 16, 512, 12, 8),
    "huge": Size(1280, 32, 16, 640, 12, 8),
}


def size_of_width(width: int) -> Size | None:
    """Return the size with this encoder width, or None."""
    return next((size for size in SIZES.values() if size.width == width), None)


def heads_of_width(width: int, decoder: bool = False) -> int | None:
    """Number of heads of VideoMAE's encoder (or decoder) of this width; None if no size has this width.

    The number of heads cannot be inferred from weights, and is not always width / 64: `huge` has a head width of 80.
    """
    known = {
        size.decoder_width if decoder else size.width: size.decoder_heads if decoder else size.heads
        for size in SIZES.values()
    }
    return known.get(width)
