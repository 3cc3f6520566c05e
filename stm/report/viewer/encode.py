"""Encodes a viewer as values that JSON can hold: frames as JPEGs, masks as packed bits, maps as colour indices."""

import base64
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stm.report.clips import film_strips
from stm.report.clips.cuts import Cut, hidden_share
from stm.report.viewer.masks import CAPTION_GUIDE, Masks, MaskViewer, StrategyMasks

MAX_SIDE = 224  # pixels; larger frames are reduced
JPEG_QUALITY = 80
COLORS = 32  # of an overlaid map
OVERLAYS = {CAPTION_GUIDE: "text similarity", "motion": "motion", "motion_compensated": "motion relative to the camera"}
# Strategies that are one choice in the viewer's list, with a switch between them: (choice, side of the switch).
PAIRS = {"text_top": ("text", "most similar (top)"), "text_bottom": ("text", "least similar (bottom)")}

FIRST = "text_top"  # the strategy that a reader sees first, where it is drawn


def encode_viewer(viewer: MaskViewer) -> dict[str, Any]:
    """Return the values that the page's script reads.

    `strategies` lists the strategies with their ratios, and `start` names the first to show. `clips` has per clip its
    captions, frames (base64 JPEGs) and boxes (fractions of the crop, or null), and by strategy, caption and ratio the masks
    (base64, see `pack_bits`) and the hidden share of the true box (0 to 1; null without boxes). A strategy that does not
    depend on the caption has one entry instead of one per caption.
    """
    shape = viewer.clips[0][0].geometry
    drawn = [strategy.strategy for strategy in viewer.strategies]
    return {
        "side": shape.side,
        "slots": shape.slots,
        "tubelet": shape.tubelet,
        "start": FIRST if FIRST in drawn else drawn[0],
        "colors": film_strips.colormap_stops(COLORS),
        "mapTitles": OVERLAYS,
        "strategies": [_encode_strategy(strategy) for strategy in _pairs_in_order(viewer.strategies)],
        "clips": [_encode_clip(cuts, viewer.strategies, number) for number, cuts in enumerate(viewer.clips)],
    }


def _pairs_in_order(strategies: Sequence[StrategyMasks]) -> list[StrategyMasks]:
    """Put the strategies of a pair next to each other, where its first one is, in the order of PAIRS."""
    choices = [PAIRS.get(drawn.strategy, (drawn.strategy, ""))[0] for drawn in strategies]
    pairs = list(PAIRS)
    places = {
        drawn.strategy: (choices.index(choice), pairs.index(drawn.strategy) if drawn.strategy in PAIRS else 0)
        for drawn, choice in zip(strategies, choices, strict=True)
    }
    return sorted(strategies, key=lambda drawn: places[drawn.strategy])


def _encode_strategy(drawn: StrategyMasks) -> dict[str, Any]:
    choice, switch = PAIRS.get(drawn.strategy, (drawn.strategy, ""))
    ratios = {"usual": drawn.ratios.index(drawn.usual), "ratios": drawn.ratios}
    return {"name": drawn.strategy, "choice": choice, "switch": switch, "perCaption": drawn.per_caption, **ratios}


def _encode_clip(cuts: Sequence[Cut], strategies: Sequence[StrategyMasks], number: int) -> dict[str, Any]:
    cut = cuts[0]
    camera = f"{cut.clip.camera} camera" if cut.clip.camera else ""
    return {
        "name": ", ".join(filter(None, (cut.clip.video_id, cut.clip.label, camera))),
        "captions": [one.caption for one in cuts],
        "frames": encode_frames(cut),
        "boxes": None if cut.boxes is None else [_encode_box(box) for box in cut.boxes],
        "masks": {drawn.strategy: [_encode_masks(cut, masks) for masks in drawn.masks[number]] for drawn in strategies},
        "maps": {guide: maps for guide in OVERLAYS if (maps := _encode_maps(cuts, guide))},
    }


def encode_frames(cut: Cut) -> list[str]:
    """Encode a cut's frames as JPEGs, base64."""
    frames = np.ascontiguousarray(cut.batch["video"][0].permute(0, 2, 3, 1).numpy())
    if frames.shape[1] > MAX_SIDE:
        frames = np.stack([cv2.resize(f, (MAX_SIDE, MAX_SIDE), interpolation=cv2.INTER_AREA) for f in frames])
    return [encode_base64(simplejpeg.encode_jpeg(frame, quality=JPEG_QUALITY, colorspace="RGB")) for frame in frames]


def _encode_box(box: NDArray[np.float64]) -> list[float] | None:
    return [round(float(edge), 4) for edge in box] if np.isfinite(box).all() else None


def _encode_masks(cut: Cut, masks: Masks) -> list[dict[str, Any]]:
    """Encode the masks of one cut, one entry per ratio."""
    shares = [None if cut.boxes is None else hidden_share(cut.boxes, mask, cut.geometry.tubelet) for mask in masks]
    return [{"bits": pack_bits(mask), "box": share} for mask, share in zip(masks, shares, strict=True)]


def pack_bits(mask: NDArray[np.bool_]) -> str:
    """Pack a mask, bool [slots, side, side], into base64: one bit per token in row-major order, most significant first."""
    return encode_base64(np.packbits(mask.reshape(-1)).tobytes())


def _encode_maps(cuts: Sequence[Cut], guide: str) -> list[str]:
    """Encode a guide as one colour index (uint8) per token, base64, for each caption that it depends on; [] if missing."""
    if guide not in cuts[0].batch["guides"]:
        return []
    return [_color_indices(cut, guide) for cut in (cuts if guide == CAPTION_GUIDE else cuts[:1])]


def _color_indices(cut: Cut, guide: str) -> str:
    values = cut.batch["guides"][guide][0].numpy()
    spread = max(float(np.ptp(values)), 1e-12)
    return encode_base64(np.rint((values - values.min()) / spread * (COLORS - 1)).astype(np.uint8).tobytes())


def encode_base64(data: bytes) -> str:
    """Encode bytes as base64 text."""
    return base64.b64encode(data).decode()
