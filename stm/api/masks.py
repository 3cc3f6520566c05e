"""Masks for a batch, from any registered strategy or a user's file."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stm.config import Teacher
from stm.config.strategies import find_strategy, strategy_names
from stm.data.geometry import Geometry
from stm.data.guides.window import COMPUTED
from stm.masking import find_side, get_strategy, to_boolean
from stm.report.clips.cuts import compute_guides
from stm.report.clips.gallery import usual_ratio

LEARNED = "spatiotemporal"  # the guide that only a trained run computes


class GuideError(ValueError):
    """A batch without the guides of a strategy, or without any; the message contains what is missing and what is possible."""


def mask(
    batch: Mapping[str, Any], strategy: str, ratio: float | None = None, *, teacher: Teacher | str | None = None
) -> Tensor:
    """Compute which tokens of a batch stay visible.

    Args:
        batch: "guides" {name: float [B, slots, N]}, with "noise"; for a teacher, also "video" uint8 [B, T, 3, S, S].
        strategy: a name, such as "text_top", or "path/to/file.py:name" for one of your own.
        ratio: share of each slot's tokens to hide, from 0 up to, but not including, 1; by default that of the paper which
            introduced the strategy's guide.
        teacher: the model whose attention or features some strategies need, in the syntax of the config's
            `similarity.model`.

    Returns:
        The kept tokens, int64 [B, K], ascending, as encoders take them; `hidden` turns them into a boolean mask.

    Raises:
        GuideError: the batch lacks a guide; the message lists the strategies that it allows.
        StrategyError: there is no such strategy.
        MaskError: a strategy of your own returns no valid mask.
        ModelError: the teacher cannot be loaded.
        ValueError: the ratio is not from 0 up to 1.
    """
    check_batch(batch)
    chosen = get_strategy(strategy)
    share = usual_ratio(strategy) if ratio is None else float(ratio)
    if not 0 <= share < 1:
        raise ValueError(f"the mask ratio must be from 0 up to, but not including, 1, is {share:g}")
    missing = [guide for guide in chosen.needs if guide not in batch["guides"]]
    if missing and (teacher is None or not set(missing) <= set(COMPUTED) - {LEARNED}):
        raise GuideError(_explain_missing(strategy, missing, batch["guides"]))
    settings = Teacher(model=teacher) if isinstance(teacher, str) else teacher
    guides = dict(batch["guides"])
    if missing:
        computed = compute_guides(
            {**batch, "video": batch["video"].cpu()}, missing, settings
        )  # the teacher is on the CPU
        assert computed is not None
        guides |= {guide: computed[guide].to(guides["noise"].device) for guide in missing}
    return chosen(guides, share)


def hidden(batch: Mapping[str, Any], kept: Tensor) -> Tensor:
    """Turn kept tokens into a boolean mask.

    Args:
        batch: the batch that they belong to.
        kept: int64 [B, K], as `mask` returns them.

    Returns:
        bool [B, slots, side, side], True where a token is hidden.

    Raises:
        ValueError: they cannot belong to the batch.
    """
    shape = geometry_of(batch)
    check_kept(kept, len(batch["video"]), shape.slots * shape.tokens)
    return to_boolean(kept, shape.slots, shape.tokens).unflatten(-1, (shape.side, shape.side))


def check_kept(kept: Any, clips: int, tokens: int) -> None:
    """Reject what cannot be kept tokens, int64 [B, K], of B clips of some tokens each.

    Raises:
        ValueError: it is not.
    """
    whole = isinstance(kept, Tensor) and kept.dtype == torch.int64 and kept.dim() == 2 and len(kept) == clips
    if whole and (not kept.numel() or 0 <= kept.min() <= kept.max() < tokens):
        return
    found = f"{str(kept.dtype).removeprefix('torch.')} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept)
    raise ValueError(
        f"{found} is not a mask of this batch. Kept tokens are int64 [{clips}, K] with numbers from 0 to {tokens - 1}"
    )


def check_batch(batch: Mapping[str, Any]) -> None:
    """Reject what is not a batch of clips with guides.

    Raises:
        GuideError: it lacks "video" or the noise.
    """
    if not isinstance(batch, Mapping) or "video" not in batch or "noise" not in batch.get("guides", ()):
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise GuideError(
            'a batch with "video" and "guides", among them "noise", is needed, as open_shards(...).batch() and its loaders '
            f"return it; got {found or 'an empty one'}"
        )


def geometry_of(batch: Mapping[str, Any]) -> Geometry:
    """Return the sizes of a batch's clips in pixels, frames and tokens.

    Args:
        batch: "video" [B, T, 3, S, S] and "guides", of which "noise" is [B, slots, N].
    """
    check_batch(batch)
    frames, _, _, size = batch["video"].shape[1:]
    slots, tokens = batch["guides"]["noise"].shape[1:]
    return Geometry(size, size // find_side(tokens), frames // slots, frames)


def _explain_missing(strategy: str, missing: Iterable[str], guides: Iterable[str]) -> str:
    present = set(guides)
    allowed = [name for name in strategy_names() if present.issuperset(find_strategy(name).needs)]
    wanted = [guide for guide in missing if guide not in present]
    if LEARNED in wanted:
        remedy = "it is learned by a run of the method stm, whose masks the report shows"
    elif set(wanted) <= set(COMPUTED):
        remedy = 'it is computed by a model: pass teacher="ViT-B-16@openai", "local-dir:FOLDER" or another CLIP'
    else:
        remedy = "read it with open_shards(..., guides=None), or pack it (config: pack) if the shards do not have it"
    return (
        f"the masking strategy {strategy!r} needs the guide {' and '.join(map(repr, wanted))}, and this batch has "
        f"{', '.join(sorted(present))}; {remedy}. Without it, this batch allows: {', '.join(allowed)}"
    )
