"""Masking strategies: functions from guides (scores per token) to the tokens that stay visible.

A strategy is one decorated function in a module of this package, in an installed package or in a user's file:

    @register("motion", needs=("motion",))
    def motion(guides, ratio):
        return hide_highest(guides["motion"], guides["noise"], ratio)

The config refers to it by its name, or by `path/to/file.py:name`; no other file has to be edited. `guides` maps names to float
tensors [B, slots, N]. It always contains "noise" (uniform in [0, 1), from the sample's own seed) and the guides that the
strategy `needs`; "flow" and "features" have different shapes, see flow.py and cluster.py. A strategy returns the kept tokens,
int64 [B, K], strictly ascending, where a token's index is `slot * N + row * side + column`. Each slot hides exactly
`int(ratio * N)` tokens, so that shapes are fixed and the model only has to gather the kept tokens. Strategies are pure: they
keep no state, load no model, use no randomness except the noise, and never wait for the device.
"""

from stm.masking.checks import MaskError
from stm.masking.registry import (
    Guides,
    Strategy,
    get_strategy,
    register,
    start_checks,
    strategy_digests,
    strategy_names,
)
from stm.masking.tokens import (
    complement,
    count_masked,
    find_side,
    hide_highest,
    keep_first,
    number_tokens,
    sort_by,
    to_boolean,
)

__all__ = [
    "Guides",
    "MaskError",
    "Strategy",
    "complement",
    "count_masked",
    "find_side",
    "get_strategy",
    "hide_highest",
    "keep_first",
    "number_tokens",
    "register",
    "sort_by",
    "start_checks",
    "strategy_digests",
    "strategy_names",
    "to_boolean",
]
