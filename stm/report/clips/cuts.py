"""Clips as they are shown: cut as in evaluation, the middle window and the central square, without flip.

Guides are those that training would see for that cut.
"""

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
from stm.masking import get_strategy, to_boolean
from stm.methods import TEACHER_GUIDE
from stm.report.clips import film_strips
from stm.report.clips.film_strips import Row, Scale
from stm.report.clips.select import Chosen

if TYPE_CHECKING:
    from stm.models.teachers.frame_teacher import FrameTeacher

MOST_SLOTS = 8  # columns; longer clips show every n-th slot
FEW_SLOTS = 3  # with so few, all frames are columns, or a clip would be one picture


@dataclass(frozen=True)
class Cut:
    """A clip cut to a geometry, S pixels a side as it is shown."""

    clip: Chosen
    geometry: Geometry
    batch: Mapping[str, Any]  # of one sample
    caption: str
    moments: list[int]  # frames that are shown: the first of each slot, or several of each of few slots
    frames: film_strips.Tiles  # [moments, S, S, 3]
    boxes: NDArray[np.float64] | None  # [frames, 4], shares of the crop; NaN: outside

    @property
    def slots(self) -> list[int]:
        """The slot of each shown frame."""
        return [moment // self.geometry.tubelet for moment in self.moments]

    def outline(self, tiles: film_strips.Tiles) -> film_strips.Tiles:
        """The tiles with the true box drawn, where there is one."""
        if self.boxes is None:
            return tiles
        return film_strips.draw_boxes(tiles, self.boxes[self.moments])

    def cells(self, tokens: Tensor) -> NDArray[np.float32]:
        """A value for each token, [1, slots, N] or [1, slots * N] -> float32 [shown slots, side, side]."""
        side = self.geometry.side
        shown: NDArray[np.float32] = tokens.reshape(-1, side, side)[self.slots].float().numpy()
        return shown


def cut_clips(
    chosen: Sequence[Chosen], geometry: Geometry, seed: int, captions: CaptionChoice | None = None
) -> list[Cut]:
    """Each clip cut to a geometry, with a caption of those that are allowed and all guides that the clips have."""
    indexes: list[Path] = sorted({clip.index for clip in chosen})
    if not indexes:
        return []
    plain = Augmentation(crop="center", flip=False)
    dataset = ClipDataset(indexes, geometry, plain, seed, train=False, captions=captions or CaptionChoice())
    numbers = {dataset.index[number].key: number for number in range(len(dataset))}
    return [_cut(clip, geometry, dataset[numbers[clip.key]][0]) for clip in chosen]


def _cut(clip: Chosen, geometry: Geometry, sample: Mapping[str, Any]) -> Cut:
    moments = choose_moments(geometry)
    video = torch.from_numpy(sample["video"])[None]
    guides = {name: torch.from_numpy(guide)[None] for name, guide in sample["guides"].items()}
    frames = show_video(video, moments)
    batch = {"video": video, "guides": guides}
    return Cut(clip, geometry, batch, str(sample["caption"]), moments, frames, _boxes_in_crop(clip, geometry))


def choose_moments(geometry: Geometry) -> list[int]:
    """Frames that stand for a clip, ascending: the first of each slot, or of every n-th; or, of few slots, all frames."""
    if geometry.slots <= FEW_SLOTS:
        step = -(-geometry.frames // MOST_SLOTS)
        return list(range(0, geometry.frames, step))
    step = -(-geometry.slots // MOST_SLOTS)
    slots = range(geometry.slots // 2 % step, geometry.slots, step)  # the middle slot is among them
    return [slot * geometry.tubelet for slot in slots]


def show_video(video: Tensor, moments: Sequence[int]) -> film_strips.Tiles:
    """uint8 [1, T, 3, S, S] -> the frames of these numbers, at the size that is shown."""
    return film_strips.resize(np.ascontiguousarray(video[0, list(moments)].permute(0, 2, 3, 1).numpy()))


def _boxes_in_crop(clip: Chosen, geometry: Geometry) -> NDArray[np.float64] | None:
    """The true boxes of the cut's frames, clipped to the crop and as shares of it."""
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


def default_geometry(config: Config, chosen: Sequence[Chosen]) -> Geometry:
    """A shape that suits the stored frames, where no run says one."""
    patch = max(1, config.frames.short_side // config.grid)
    frames = min(MOST_SLOTS, min(clip.frames for clip in chosen))
    stride = max(1, min(clip.frames for clip in chosen) // frames)
    return Geometry(patch * config.grid, patch, 1, frames, stride)


# ------------------------------------------------------------------------------------------------------ guides


@cache
def load_frame_teacher(settings: Teacher, side: int, layers: int = 1) -> "FrameTeacher":
    """A run's teacher: of its features only the last layer; with 0 layers for its attention alone."""
    from stm.models.teachers.frame_teacher import FrameTeacher

    shared = settings.model_dump(include=set(Teacher.model_fields))
    return FrameTeacher.load(FrameTeacherSettings(**shared, layers=layers) if layers else Teacher(**shared), side)


def _find_features(teacher: Teacher, cut: Cut) -> Tensor:
    """The teacher's tokens as unit vectors, the mean over a tubelet's frames, [1, slots, N, D]."""
    tokens = load_frame_teacher(teacher, cut.geometry.side)(cut.batch["video"]).tokens
    return normalize(tokens.unflatten(1, (-1, cut.geometry.tubelet)).mean(dim=2), dim=-1)


def find_guides(cut: Cut, needs: Iterable[str], teacher: Teacher | None) -> Mapping[str, Tensor] | None:
    """The cut's guides, with the teacher's attention where it is needed; None when one is missing."""
    guides = dict(cut.batch["guides"])
    if TEACHER_GUIDE in needs and teacher is not None:
        attention_teacher = load_frame_teacher(teacher, cut.geometry.side, layers=0)
        guides[TEACHER_GUIDE] = attention_teacher.attend(cut.batch["video"], cut.geometry.tubelet)
    if "features" in needs and teacher is not None:
        guides["features"] = _find_features(teacher, cut)
    return None if any(guide not in guides for guide in needs) else guides


def mask_cut(cut: Cut, strategy: str, ratio: float, teacher: Teacher | None = None) -> NDArray[np.bool_] | None:
    """What a strategy hides of the cut, bool [slots, side, side]; None when a guide is missing."""
    found, shape = get_strategy(strategy), cut.geometry
    guides = find_guides(cut, found.needs, teacher)
    if guides is None:
        return None
    kept = found(guides, ratio)
    masked: NDArray[np.bool_] = to_boolean(kept, shape.slots, shape.tokens)[0].numpy()
    return masked.reshape(-1, shape.side, shape.side)


def hidden_share(boxes: NDArray[np.float64], masked: NDArray[np.bool_], tubelet: int) -> float | None:
    """Share of the boxes' area that lies under masked tokens, over all frames of the cut.

    Args:
        boxes: [frames, 4], shares of the crop; NaN rows count nothing.
        masked: [slots, side, side].

    Returns:
        None when no frame has a box.
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
    shape = cut.geometry
    if shape.sampling == "tsn":
        note = f"{shape.frames} frames, one a segment"
    else:
        note = f"{shape.frames} frames" + (f", stride {shape.stride}" if shape.stride > 1 else "")
    return Row("frames", "Frames", cut.outline(cut.frames), note)


def map_row(cut: Cut, guide: str, label: str, unit: str, note: str = "") -> Row | None:
    """A guide over the frames; None when it is not packed."""
    if guide not in cut.batch["guides"]:
        return None
    cells = cut.cells(cut.batch["guides"][guide])
    scale = Scale(float(cells.min()), float(cells.max()), unit)
    return Row("map", label, cut.outline(film_strips.heat(cut.frames, cells, scale)), note, scale)


def mask_row(
    cut: Cut,
    label: str,
    masked: NDArray[np.bool_],
    note: str = "",
    run: int | None = None,
    ratio: float | None = None,
) -> Row:
    """A mask, bool [slots, side, side], with the share of the true box that it hides.

    Where truncation makes the share of hidden tokens differ visibly from the run's `ratio`, the row says the real one.
    """
    tiles = cut.outline(film_strips.grey_out(cut.frames, masked[cut.slots]))
    covered = None if cut.boxes is None else hidden_share(cut.boxes, masked, cut.geometry.tubelet)
    share = float(masked.mean())
    truncated = ratio is not None and abs(share - ratio) >= 0.005
    hidden = [f"{100 * share:.3g} % of the tokens"] if truncated else []
    hidden += [] if covered is None else [f"{100 * covered:.0f} % of the box"]
    parts = [note, f"hides {' and '.join(hidden)}" if hidden else ""]
    return Row("mask", label, tiles, ", ".join(filter(None, parts)), run=run)
