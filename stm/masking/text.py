"""Text-guided masking (TGM, section 3.3): hide what the caption describes.

`text_top` hides the tokens that are most similar to the caption. `text_bottom` hides the least similar ones, as in the
paper's ablation (67.2 against 67.5 top-1 on Something-Something v2). The paper hides the top k tokens of each
frame; a slot here is a tubelet of several frames, and its similarity is the mean over its frames.
"""

from torch import Tensor

from stm.masking import Guides, hide_highest, register


@register("text_top", needs=("similarity",))
def text_top(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens that are least similar to the caption in each slot: int64 [B, K]."""
    return hide_highest(guides["similarity"], guides["noise"], ratio)


@register("text_bottom", needs=("similarity",))
def text_bottom(guides: Guides, ratio: float) -> Tensor:
    """Keep the tokens that are most similar to the caption in each slot: int64 [B, K]."""
    return hide_highest(-guides["similarity"], guides["noise"], ratio)
