"""Motion-guided masking (MGM) as a set: hide what moves most, by the video's motion vectors.

No code of MGM is public, and whether its mask is a box or a top-k set cannot be told from what is. This is
the top-k set of TGM's description of it: "mask the patches with highest motion over time" (TGM, section 4;
its best ratio is 0.75). The box is in box.py.

`motion_compensated` takes off the camera first: its guide is the length of the vectors less the median
vector of their frame. Neither paper does that; TGM only notes that background motion may exceed the object's.
"""

from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("motion", needs=("motion",))
def motion(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: in each slot those that move least."""
    return hide_highest(guides["motion"], guides["noise"], ratio)


@register("motion_compensated", needs=("motion_compensated",))
def motion_compensated(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: in each slot those that move least against the camera."""
    return hide_highest(guides["motion_compensated"], guides["noise"], ratio)
