"""Flow masking (MGMAE): the visible tokens follow the motion, so that hidden content stays hidden in all frames.

As in the paper, random tokens are chosen in the base frame, which is the middle one; a map with a Gaussian at each of them is
warped from frame to frame by optical flow, outward in both directions; in each slot the tokens with the highest map values
stay visible. The formulas are those of MGMAE's released code (`engine_for_mgmae.py`, `masking_generator.py`), with these
differences:

- Backward warping needs the flow from the frame to be computed to the frame that is known. The released code uses this flow
  after the base frame, but the opposite flow before it (its loop compares the option with a value that it never has). Here
  the correct flow is used in both directions.
- A slot keeps N - int(ratio * N) tokens, 20 of 196 at 0.9, like all strategies here; MGMAE keeps int((1 - ratio) * N),
  which is 19. MGMAE starts from 20 seeds, as here.
- The map is tracked at 8 cells per token side (MGMAE: 16, one per pixel), and the flow, which is stored more coarsely, is
  linearly upsampled to that resolution. Every bilinear warp blurs the map by up to a quarter of a squared cell. At 2
  cells per token, a moving Gaussian is so flat after seven frames that tokens next to a static one exceed it: with a camera
  that moves by up to half a token per frame in each direction, 68 % of the farthest slot's visible tokens agree with an
  almost unblurred map (32 cells). At 8 cells it is 91 %; at 16 cells it is 96 %, for six times the cost.
- The flow is computed once on the stored frames and then cropped, instead of being computed on the augmented frames.
"""

import torch
from torch import Tensor
from torch.nn import functional

from stm.masking import Guides, count_masked, find_side, hide_highest, register, sort_by

CELLS = 8  # minimum number of cells per token side


@register("flow", needs=("flow",))
def flow(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens that follow the flow from random seeds; kept tokens, int64 [B, K].

    guides["flow"] is float [B, 2, T, R, C, 2]: the displacement of each frame's content to the next frame and to
    the previous one, in tokens of the crop, x right and y down, with R = C a multiple of a slot's side.
    """
    vectors, noise = guides["flow"], guides["noise"]
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    side, frames = find_side(noise.shape[-1]), vectors.shape[2]
    cells = max(CELLS, vectors.shape[3] // side)
    base = frames // 2  # the middle frame: warps, and their blur, accumulate over half of the clip at most
    seeds = choose_seeds(noise[:, base // (frames // noise.shape[1])], ratio)
    maps = spread(draw_seeds(seeds, side, cells, vectors.dtype), vectors, cells)
    # Sum the map over each token and over the frames of its slot.
    score = functional.avg_pool2d(maps, cells, divisor_override=1).flatten(2).unflatten(1, (noise.shape[1], -1)).sum(2)
    # Negated, because the tokens with the highest map values stay visible.
    return hide_highest(-score, noise, ratio)


def choose_seeds(noise: Tensor, ratio: float) -> Tensor:
    """Choose as many tokens as a slot keeps, by its noise [B, N], like `random`: int64 [B, seeds]."""
    return sort_by(noise)[:, : noise.shape[-1] - count_masked(noise.shape[-1], ratio)]


def draw_seeds(seeds: Tensor, side: int, cells: int, dtype: torch.dtype) -> Tensor:
    """Draw the maximum of the seeds' Gaussians, exp(-(distance in tokens)^2): [B, side * cells, side * cells]."""
    centres = (torch.arange(side * cells, device=seeds.device, dtype=dtype) + 0.5) / cells
    rows = (centres - (seeds // side + 0.5)[..., None]) ** 2
    columns = (centres - (seeds % side + 0.5)[..., None]) ** 2
    # The nearest seed's Gaussian is the greatest.
    nearest = (rows[..., :, None] + columns[..., None, :]).amin(dim=1)
    return torch.exp(-nearest)


def spread(middle: Tensor, vectors: Tensor, cells: int) -> Tensor:
    """Warp the map of frame T // 2 to all frames.

    Args:
        middle: [B, W, W], with `cells` cells per token side.
        vectors: [B, 2, T, R, C, 2], as in `flow`.

    Returns:
        [B, T, W, W].
    """
    base, steps = vectors.shape[2] // 2, vectors.shape[2] - 1 - vectors.shape[2] // 2
    back = vectors[:, 0, :base].flip(1)  # frames nearest to the base first
    ahead = functional.pad(vectors[:, 1, base + 1 :], (0, 0) * 3 + (0, base - steps))
    # Both directions are warped at once, as two halves of the batch: this halves the number of sequential steps.
    grid = sampling_grid(torch.cat([back, ahead]), middle.shape[-1], cells)
    beginning = torch.cat([middle, middle])[:, None]
    maps = [beginning]
    for step in range(base):
        maps.append(warp(maps[-1], grid[:, step], beginning))
    earlier, later = torch.cat(maps, dim=1).chunk(2)
    return torch.cat([earlier[:, 1:].flip(1), later[:, : 1 + steps]], dim=1)


def sampling_grid(vectors: Tensor, width: int, cells: int) -> Tensor:
    """The position that each cell of a frame is sampled from: vectors in tokens, [B, S, R, C, 2] -> [B, S, width, width, 2].

    Positions are in `grid_sample`'s coordinates with align_corners, for a map padded to `padded_width`.
    """
    fine = functional.interpolate(vectors.flatten(0, 1).movedim(-1, 1), (width, width), mode="bilinear")
    place = torch.arange(width, device=vectors.device, dtype=vectors.dtype)
    here = torch.stack([place.expand(width, width), place[:, None].expand(width, width)])
    grid = (here + fine * cells) * (2 / (padded_width(width) - 1)) - 1
    # NaN flow is set to a position outside the frame, where the map is zero; the clamp bounds are outside, too.
    grid = torch.nan_to_num(grid, nan=3.0).clamp(-3, 3)
    return grid.movedim(1, -1).unflatten(0, vectors.shape[:2])


def padded_width(width: int) -> int:
    """The next power of two plus 1: `grid_sample` then scales without rounding, so that static cells stay exact."""
    return (1 << (width - 1).bit_length()) + 1


def warp(known: Tensor, grid: Tensor, beginning: Tensor) -> Tensor:
    """Backward-warp maps [B, 1, W, W] of a frame to its neighbour.

    Where the warped map is zero, the base frame's map is used instead (MGMAE's "consist").
    """
    room = padded_width(known.shape[-1]) - known.shape[-1]
    moved = functional.grid_sample(functional.pad(known, (0, room, 0, room)), grid, align_corners=True)
    return torch.where(moved == 0, beginning, moved)
