"""Motion-guided masking (MGM) as a set: hide the tokens that move most, by the video's motion vectors.

No code of MGM is public, and what is public does not say whether its mask is a box or a top-k set. This is the top-k set
of TGM's description of it: "mask the patches with highest motion over time" (TGM, section 4; its best ratio is 0.75). The
box is in box.py.

`motion_compensated` subtracts camera motion first: its guide is the length of each vector after subtracting the median
vector of its frame. Neither paper does that; TGM only notes that background motion may exceed the object's.
"""

from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("motion", needs=("motion",))
def motion(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens of each slot that move least: int64 [B, K]."""
    return hide_highest(guides["motion"], guides["noise"], ratio)


@register("motion_compensated", needs=("motion_compensated",))
def motion_compensated(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens of each slot that move least relative to the camera: int64 [B, K]."""
    return hide_highest(guides["motion_compensated"], guides["noise"], ratio)
