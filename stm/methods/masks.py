"""The masks of a run whose steps see clips or images: each has its own strategy and ratio."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from stm.config import LanguageRun, Mask
from stm.masking import Guides, get_strategy
from stm.masking.cluster import make_cluster_strategy
from stm.models.teachers.frame_teacher import Seen


class MediaMasks:
    """Keeps tokens of clips and of images, each by its own rule."""

    def __init__(self, run: LanguageRun) -> None:
        self.video, self.image = run.mask, run.images.mask if run.images else run.mask
        self._cluster = run.cluster

    def keep(self, batch: Mapping[str, Any], seen: Seen, more: Guides | None = None) -> Tensor:
        """The visible tokens.

        Args:
            batch: "video" [B, T, 3, S, S] and "guides".
            seen: what the teacher says of it.
            more: guides that the method itself made.

        Returns:
            int64 [B, K], sorted ascending.
        """
        mask = self.image if batch["video"].shape[1] == 1 else self.video
        guides: dict[str, Tensor] = {**batch["guides"], "attention": seen.attention, **(more or {})}
        if "features" in get_strategy(mask.strategy).needs:
            guides["features"] = normalize(seen.tokens, dim=-1)
        return self._find(mask)(guides, mask.ratio)

    def _find(self, mask: Mask) -> Callable[[Guides, float], Tensor]:
        if mask.strategy == "cluster" and self._cluster is not None:
            return make_cluster_strategy(self._cluster)
        return get_strategy(mask.strategy)
