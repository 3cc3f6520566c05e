"""Clips cut as in evaluation (middle window, centre crop, no flip), with the guides that training would use."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from stm.config import Augmentation, CaptionChoice, Config, Teacher
from stm.config import FrameTeacher as FrameTeacherSettings
from stm.data.crop_boxes import center_crop
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.sampling import view_windows
from stm.masking import find_side, get_strategy, to_boolean
from stm.methods import TEACHER_GUIDE
from stm.report.clips import film_strips
from stm.report.clips.film_strips import Row, Scale
from stm.report.clips.select import ReportClip

if TYPE_CHECKING:
    from stm.models.teachers.frame_teacher import FrameTeacher

MAX_SLOTS = 8  # columns; longer clips show every n-th slot
FEW_SLOTS = 3  # with this few slots every frame gets a column, as one frame per slot would hardly show motion


@dataclass(frozen=True)
class Cut:
    """A clip cut to a geometry, shown at S x S pixels."""

    clip: ReportClip
    geometry: Geometry
    batch: Mapping[str, Any]  # a batch of one: `video` and `guides`
    caption: str
    frame_indices: list[int]  # the F frames shown; see `choose_frames`
    frames: film_strips.Tiles  # [F, S, S, 3]
    boxes: NDArray[np.float64] | None  # [all frames, 4], as fractions of the crop; NaN: outside it

    @property
    def slots(self) -> list[int]:
        """The time slot of each shown frame."""
        return [frame // self.geometry.tubelet for frame in self.frame_indices]

    def outline(self, tiles: film_strips.Tiles) -> film_strips.Tiles:
        """Draw the ground-truth box on the tiles, if known."""
        if self.boxes is None:
            return tiles
        return film_strips.draw_boxes(tiles, self.boxes[self.frame_indices])

    def token_grid(self, tokens: Tensor) -> NDArray[np.float32]:
        """Reshape one value per token, [1, slots, N] or [1, slots * N], to float32 [F, side, side] (shown frames)."""
        side = self.geometry.side
        grid: NDArray[np.float32] = tokens.reshape(-1, side, side)[self.slots].float().numpy()
        return grid


def cut_clips(
    clips: Sequence[ReportClip], geometry: Geometry, seed: int, captions: CaptionChoice | None = None
) -> list[Cut]:
    """Cut clips to a geometry, with one of the allowed captions and all packed guides."""
    indexes: list[Path] = sorted({clip.index for clip in clips})
    if not indexes:
        return []
    no_augmentation = Augmentation(crop="center", flip=False)
    dataset = ClipDataset(indexes, geometry, no_augmentation, seed, train=False, captions=captions or CaptionChoice())
    positions = {dataset.index[position].key: position for position in range(len(dataset))}
    return [_cut(clip, geometry, dataset[positions[clip.key]][0]) for clip in clips]


def _cut(clip: ReportClip, geometry: Geometry, sample: Mapping[str, Any]) -> Cut:
    frame_indices = choose_frames(geometry)
    video = torch.from_numpy(sample["video"])[None]
    guides = {name: torch.from_numpy(guide)[None] for name, guide in sample["guides"].items()}
    frames = show_video(video, frame_indices)
    batch = {"video": video, "guides": guides}
    return Cut(clip, geometry, batch, str(sample["caption"]), frame_indices, frames, _boxes_in_crop(clip, geometry))


def choose_frames(geometry: Geometry) -> list[int]:
    """Return the indices of frames to show, ascending: the first of each or every n-th slot, or all of few slots."""
    if geometry.slots <= FEW_SLOTS:
        step = -(-geometry.frames // MAX_SLOTS)
        return list(range(0, geometry.frames, step))
    step = -(-geometry.slots // MAX_SLOTS)
    # This offset ensures that the middle slot is shown: attention is drawn from one of its patches.
    slots = range(geometry.slots // 2 % step, geometry.slots, step)
    return [slot * geometry.tubelet for slot in slots]


def show_video(video: Tensor, frame_indices: Sequence[int]) -> film_strips.Tiles:
    """Select frames of a uint8 video [1, T, 3, H, W] and resize them for display, [F, S, S, 3]."""
    return film_strips.resize(np.ascontiguousarray(video[0, list(frame_indices)].permute(0, 2, 3, 1).numpy()))


def _boxes_in_crop(clip: ReportClip, geometry: Geometry) -> NDArray[np.float64] | None:
    """Return the cut's ground-truth boxes, clipped to the crop, as fractions of it, [frames, 4]; NaN: outside."""
    if clip.boxes is None:
        return None
    window = view_windows(1, geometry.frames, geometry.stride, clip.frames, geometry.sampling)[0]
    crop = center_crop(*clip.size)
    pixels = clip.boxes[window] * np.tile(clip.size, 2)
    shares = (pixels - np.tile([crop.left, crop.top], 2)) / np.tile([crop.width, crop.height], 2)
    inside = np.clip(shares, 0, 1)
    empty = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    inside[empty] = np.nan
    return inside


def default_geometry(config: Config, clips: Sequence[ReportClip]) -> Geometry:
    """Return a geometry that fits the stored frames, for configs without runs."""
    patch = max(1, config.frames.short_side // config.grid)
    frames = min(MAX_SLOTS, min(clip.frames for clip in clips))
    stride = max(1, min(clip.frames for clip in clips) // frames)
    return Geometry(patch * config.grid, patch, 1, frames, stride)


# ------------------------------------------------------------------------------------------------------ guides


@cache
def load_frame_teacher(settings: Teacher, side: int, layers: int = 1) -> "FrameTeacher":
    """Load a run's teacher to compute its attention and last-layer features; with 0 layers, only its attention.

    Cached, because several masks on a page share a teacher.
    """
    from stm.models.teachers.frame_teacher import FrameTeacher

    shared = settings.model_dump(include=set(Teacher.model_fields))
    return FrameTeacher.load(FrameTeacherSettings(**shared, layers=layers) if layers else Teacher(**shared), side)


def _compute_features(teacher: Teacher, video: Tensor, tubelet: int, side: int) -> Tensor:
    """Return the teacher's tokens, averaged over each tubelet's frames, as unit vectors [B, slots, N, D]."""
    tokens = load_frame_teacher(teacher, side)(video).tokens
    return normalize(tokens.unflatten(1, (-1, tubelet)).mean(dim=2), dim=-1)


def compute_guides(
    batch: Mapping[str, Any], needs: Iterable[str], teacher: Teacher | None
) -> Mapping[str, Tensor] | None:
    """Return the guides that a strategy needs, both packed and computed by the teacher; None if any is missing.

    Args:
        batch: "video" uint8 [B, T, 3, S, S] and "guides", of which "noise" is [B, slots, N].
    """
    guides = dict(batch["guides"])
    slots, tokens = guides["noise"].shape[1:]
    side, tubelet = find_side(tokens), batch["video"].shape[1] // slots
    if TEACHER_GUIDE in needs and teacher is not None:
        attention_teacher = load_frame_teacher(teacher, side, layers=0)
        guides[TEACHER_GUIDE] = attention_teacher.attend(batch["video"], tubelet)
    if "features" in needs and teacher is not None:
        guides["features"] = _compute_features(teacher, batch["video"], tubelet, side)
    return None if any(guide not in guides for guide in needs) else guides


def mask_cut(cut: Cut, strategy: str, ratio: float, teacher: Teacher | None = None) -> NDArray[np.bool_] | None:
    """Compute a strategy's mask, bool [slots, side, side], True: hidden; None if a guide is missing."""
    draw_mask = get_strategy(strategy)
    guides = compute_guides(cut.batch, draw_mask.needs, teacher)
    if guides is None:
        return None
    shape = cut.geometry
    masked: NDArray[np.bool_] = to_boolean(draw_mask(guides, ratio), shape.slots, shape.tokens)[0].numpy()
    return masked.reshape(-1, shape.side, shape.side)


def hidden_share(boxes: NDArray[np.float64], masked: NDArray[np.bool_], tubelet: int) -> float | None:
    """Compute the fraction of the boxes' area that masked tokens cover, over all frames.

    Args:
        boxes: [frames, 4], as fractions of the crop; frames with NaN have no box.
        masked: bool [slots, side, side].
        tubelet: frames per slot.

    Returns:
        The fraction, or None if no frame has a box.
    """
    side = masked.shape[1]
    edges = np.arange(side + 1) / side
    area = hidden = 0.0
    for frame, (x0, y0, x1, y1) in enumerate(boxes):
        if np.isfinite(x0):
            across = np.clip(np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0), 0, None)
            down = np.clip(np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0), 0, None)
            overlap = np.outer(down, across)
            area += overlap.sum()
            hidden += overlap[masked[frame // tubelet]].sum()
    return hidden / area if area else None


# -------------------------------------------------------------------------------------------------------- rows


def frames_row(cut: Cut) -> Row:
    """Build the row of frames with the ground-truth box, and note how the frames are sampled."""
    shape = cut.geometry
    if shape.sampling != "dense":
        note = f"{shape.frames} frames, one per segment"
    else:
        note = f"{shape.frames} frames" + (f", stride {shape.stride}" if shape.stride > 1 else "")
    return Row("frames", "Frames", cut.outline(cut.frames), note)


def map_row(cut: Cut, guide: str, label: str, unit: str, note: str = "") -> Row | None:
    """Build the heat map of a packed guide over the frames; None if the guide is not packed."""
    if guide not in cut.batch["guides"]:
        return None
    grid = cut.token_grid(cut.batch["guides"][guide])
    scale = Scale(float(grid.min()), float(grid.max()), unit)
    return Row("map", label, cut.outline(film_strips.heat_map(cut.frames, grid, scale)), note, scale)


def mask_row(
    cut: Cut,
    label: str,
    masked: NDArray[np.bool_],
    note: str = "",
    run: int | None = None,
    ratio: float | None = None,
) -> Row:
    """Build the row of a mask, with a note on how much it hides.

    Args:
        cut: the clip.
        label: the row's label.
        masked: bool [slots, side, side].
        note: precedes the fraction of the ground-truth box that the mask hides, if the box is known.
        run: index of the run, which determines its colour.
        ratio: the nominal ratio; the note reports the fraction of hidden tokens if truncation changes it visibly.
    """
    tiles = cut.outline(film_strips.grey_out(cut.frames, masked[cut.slots]))
    covered = None if cut.boxes is None else hidden_share(cut.boxes, masked, cut.geometry.tubelet)
    share = float(masked.mean())
    truncated = ratio is not None and abs(share - ratio) >= 0.005
    hidden = [f"{100 * share:.3g} % of the tokens"] if truncated else []
    hidden += [] if covered is None else [f"{100 * covered:.0f} % of the box"]
    parts = [note, f"hides {' and '.join(hidden)}" if hidden else ""]
    return Row("mask", label, tiles, ", ".join(filter(None, parts)), run=run)
