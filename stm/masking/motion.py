"""Motion-guided masking (MGM): hide what moves most, by the magnitude of the video's motion vectors.

No code of MGM is public, and whether its mask is a box or a top-k set cannot be told from what is. This is
the top-k set of TGM's description of it: "mask the patches with highest motion over time" (TGM, section 4;
its best ratio is 0.75).
"""

from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("motion", needs=("motion",))
def motion(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: in each slot those that move least."""
    return hide_highest(guides["motion"], guides["noise"], ratio)
