"""Hides what a teacher looks at, by chance: the opposite of UMT's mask, and what STM's release does with images."""

from torch import Tensor

from stm.masking import Guides, hide_highest, register
from stm.masking.attention import ring_times


@register("attention_hidden", needs=("attention",))
def attention_hidden(guides: Guides, ratio: float) -> Tensor:
    """Kept tokens, int64 [B, K]: hidden ones are drawn without replacement in proportion to the teacher's attention."""
    return hide_highest(-ring_times(guides["attention"], guides["noise"]), guides["noise"], ratio)
