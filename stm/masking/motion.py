"""Motion-guided masking (MGM) as a top-k set: hide the tokens with the most motion, by the video's motion vectors.

MGM's code is not public, and the available sources do not specify whether its mask is a box or a top-k set. This module
implements the top-k set, following TGM's description: "mask the patches with highest motion over time" (TGM, section 4; its
best ratio is 0.75). The box is implemented in box.py.

`motion_compensated` subtracts camera motion first: its guide is the length of each vector after subtracting the frame's
median vector. Neither paper does this; TGM only notes that background motion may exceed the object's motion.
"""

from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("motion", needs=("motion",))
def motion(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens with the least motion in each slot: int64 [B, K]."""
    return hide_highest(guides["motion"], guides["noise"], ratio)


@register("motion_compensated", needs=("motion_compensated",))
def motion_compensated(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens with the least motion relative to the camera in each slot: int64 [B, K]."""
    return hide_highest(guides["motion_compensated"], guides["noise"], ratio)
