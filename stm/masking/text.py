"""Text-guided masking (TGM, section 3.3): hide what the caption speaks of.

`text_top` hides the tokens that are most similar to the caption. `text_bottom` hides the least similar ones,
the counterpart of the paper's ablation (67.2 against 67.5 top-1 on Something-Something v2). The paper takes
the top-k of each frame; a slot is a tubelet of several frames here, and its similarity is the mean of its
frames'.
"""

from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("text_top", needs=("similarity",))
def text_top(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: in each slot those least similar to the caption."""
    return hide_highest(guides["similarity"], guides["noise"], ratio)


@register("text_bottom", needs=("similarity",))
def text_bottom(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: in each slot those most similar to the caption."""
    return hide_highest(-guides["similarity"], guides["noise"], ratio)
