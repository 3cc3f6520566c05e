"""Motion-guided masking (MGM) with a box: a rectangle of fixed size that follows the motion over time.

MGM's abstract states that motion vectors "guide the position of each mask over time"; how the box is constructed is not
public. Everything below is our inference.

Size. It is the same for all slots and clips: the largest rectangle with at most int(ratio * N) tokens whose width is 1 to
1.5 times its height; of two rectangles with the same area, the one closer to a square. On 14 x 14 tokens this is
13 x 13 at 0.9, 12 x 12 at 0.75, 9 x 13 at 0.6.

Position. In each slot, the box is placed where it covers the most motion; the noise of the top left token breaks ties, so
that tied positions are equally likely. Slots are independent of each other. At the usual ratios the box has little room
to move (2 tokens in each direction at 0.75), so it cannot jump, and a smoothed path would only lag behind the motion that
should be hidden.

Remaining tokens. To hide int(ratio * N) tokens in total, the tokens outside the box with the most motion are hidden, too.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from stm.masking import Guides, count_masked, find_side, hide_highest, keep_first, register, sort_by


@register("motion_box", needs=("motion",))
def motion_box(guides: Guides, ratio: float) -> Tensor:
    """Hide the box with the most motion in each slot, and the tokens with the most motion outside it; kept, int64 [B, K]."""
    return hide_box(guides["motion"], guides["noise"], ratio)


@register("motion_compensated_box", needs=("motion_compensated",))
def motion_compensated_box(guides: Guides, ratio: float) -> Tensor:
    """Like `motion_box`, for motion relative to the camera."""
    return hide_box(guides["motion_compensated"], guides["noise"], ratio)


def hide_box(motion: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """Hide a box in each slot.

    Args:
        motion: float [B, slots, N], where N is a square number. A box that contains a NaN counts as having the most motion.
        noise: float [B, slots, N], breaks ties.
        ratio: fraction of a slot's tokens to hide.

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
    """Height and width, in tokens, of the box for `masked` tokens of a `side` x `side` grid; (0, 0) if `masked` is 0."""
    # Wider than tall, like most videos; most motion is horizontal.
    shapes = [(height, min(side, masked // height, 3 * height // 2)) for height in range(1, math.isqrt(masked) + 1)]
    return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]), default=(0, 0))


def find_box(motion: Tensor, noise: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Top row and left column, int64 [B, slots] each, of the box with the greatest sum of motion [B, slots, N]."""
    side = find_side(motion.shape[-1])
    maps = motion.to(torch.promote_types(motion.dtype, torch.float32)).unflatten(-1, (side, side))
    # Pooling sums each box separately. An integral image would be as fast, but would round equal boxes differently, and
    # one NaN would spread to all boxes.
    sums = functional.avg_pool2d(maps, (height, width), stride=1, divisor_override=1)
    corners = noise.unflatten(-1, (side, side))[..., : sums.shape[-2], : sums.shape[-1]]
    best = sort_by(sums.flatten(2), corners.flatten(2))[..., -1]
    return best // sums.shape[-1], best % sums.shape[-1]
