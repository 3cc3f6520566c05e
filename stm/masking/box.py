"""Motion-guided masking (MGM) as a box: a rectangle of fixed size that follows the motion over time.

MGM's abstract says that motion vectors "guide the position of each mask over time"; its construction is not
public. All of the following is our inference.

Size. One for all slots and clips: of the rectangles that hold at most int(ratio * N) tokens and are at most
half as wide again as they are tall, never taller than wide, the largest, and of two as large the squarer.
Of 14 x 14 tokens that is 13 x 13 at 0.9, 12 x 12 at 0.75, 9 x 13 at 0.6.

Place. In each slot where the sum of the motion inside is greatest, of all places inside the frame; the noise
of the top left token decides between equal sums, so that each is equally likely. Slots are placed one by
one. At the ratios in use the box leaves itself little room (2 tokens each way at 0.75), so it cannot jump,
and a smoothed path would only lag behind the motion that is to be hidden.

Rest. The tokens that the box lacks of int(ratio * N) are those outside of it that move most.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from stm.masking import Guides, count_masked, find_side, hide_highest, keep_first, register, sort_by


@register("motion_box", needs=("motion",))
def motion_box(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: hidden are each slot's box of most motion and what it lacks of the count."""
    return hide_box(guides["motion"], guides["noise"], ratio)


@register("motion_compensated_box", needs=("motion_compensated",))
def motion_compensated_box(guides: Guides, ratio: float) -> Tensor:
    """As `motion_box`, by the motion against the camera."""
    return hide_box(guides["motion_compensated"], guides["noise"], ratio)


def hide_box(motion: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """Hides a box in each slot.

    Args:
        motion: float [B, slots, N], N a square. A box with a NaN in it counts as the one of most motion.
        noise: float [B, slots, N], decides between equals.
        ratio: share of a slot's tokens to hide.

    Returns:
        Kept tokens, int64 [B, slots * (N - int(ratio * N))], sorted ascending.
    """
    side = find_side(motion.shape[-1])
    height, width = box_shape(count_masked(side * side, ratio), side)
    if height == 0:
        return hide_highest(motion, noise, ratio)
    top, left = find_box(motion, noise, height, width)
    place = torch.arange(side, device=motion.device)
    rows = (place >= top[..., None]) & (place < top[..., None] + height)
    columns = (place >= left[..., None]) & (place < left[..., None] + width)
    inside = (rows[..., :, None] & columns[..., None, :]).flatten(2)
    return keep_first(sort_by(inside.to(torch.uint8), motion, noise), ratio)


def box_shape(masked: int, side: int) -> tuple[int, int]:
    """Height and width of the box for `masked` tokens of a grid of `side` x `side`; (0, 0) for none."""
    # Wider than tall, since videos are and move that way more often.
    shapes = [(height, min(side, masked // height, 3 * height // 2)) for height in range(1, math.isqrt(masked) + 1)]
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]), default=(0, 0))


def find_box(motion: Tensor, noise: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Top row and left column, int64 [B, slots] each, of the box with the greatest sum of motion [B, slots, N]."""
    side = find_side(motion.shape[-1])
    maps = motion.to(torch.promote_types(motion.dtype, torch.float32)).unflatten(-1, (side, side))
    # A pool adds each box up by itself. Differences of running sums would be as fast, but round equal boxes
    # unequally, and one NaN would spoil them all.
    sums = functional.avg_pool2d(maps, (height, width), stride=1, divisor_override=1)
    corners = noise.unflatten(-1, (side, side))[..., : sums.shape[-2], : sums.shape[-1]]
    best = sort_by(sums.flatten(2), corners.flatten(2))[..., -1]
    return best // sums.shape[-1], best % sums.shape[-1]
