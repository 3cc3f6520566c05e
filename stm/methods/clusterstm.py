"""ClusterSTM: one token a cluster stays visible, and the others' relevance to the caption is predicted.

The paper's text is not to be had: docs/language.md says what is known of it and what is our inference. Alignment with the
teacher's features, which UMT and STM have and this has not, plays no part.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stm.config import Cluster, LanguageRun
from stm.masking import complement
from stm.methods.video_language import BranchOutput, MediaMasks, Text
from stm.models.feature_decoders import TokenDecoder
from stm.models.teachers.frame_teacher import FrameTeacher, Seen
from stm.models.vit import Architecture, VideoEncoder
from stm.objectives.relevance import relevance, relevance_loss
from stm.tubelets import gather_tokens


class ClusterWise(nn.Module):
    """Cluster-wise mask, decoder and masked relevance. The text meets the visible tokens."""

    teacher: FrameTeacher

    def __init__(self, run: LanguageRun, architecture: Architecture, teacher: FrameTeacher) -> None:
        super().__init__()
        self.settings, self.masks = run.cluster or Cluster(), MediaMasks(run)
        self.tokens = architecture.slot_tokens
        # Not a part of this module; see `VideoLanguage`.
        self.__dict__["teacher"] = teacher
        self.decoder: TokenDecoder | None = None
        if run.objectives.relevance:
            self.decoder = TokenDecoder(architecture, teacher.feature_width, self.settings.decoder_depth)

    def forward(self, encoder: VideoEncoder, batch: Mapping[str, Any], seen: Seen, text: Text | None) -> BranchOutput:
        """See `stm.methods.video_language.Branch`; the batch also has "text" float32 [B, C], the teacher's own vectors of
        the captions, of unit length."""
        kept, masked = self.mask(batch, seen)
        encoded = encoder(batch["video"], kept)
        if self.decoder is None:
            return BranchOutput(encoded, {}, {})
        decoded = self.decoder(encoded, kept, masked)
        everything = self.settings.texts == "batch"
        target = relevance(gather_tokens(self.pool(seen), masked), batch["text"], everything)
        loss = relevance_loss(decoded, target, batch["text"], everything)
        return BranchOutput(encoded, {"relevance": loss}, {"relevance_target": target.mean()})

    def mask(self, batch: Mapping[str, Any], seen: Seen) -> tuple[Tensor, Tensor]:
        """Kept tokens, int64 [B, K], and masked tokens, int64 [B, L - K], both sorted."""
        kept = self.masks.keep(batch, seen)
        return kept, complement(kept, batch["video"].shape[1] * self.tokens)

    @torch.no_grad()
    def pool(self, seen: Seen) -> Tensor:
        """Each token with its neighbours, as the teacher pools them, float32 [B, L, C]."""
        if self.settings.pooling == "mean":
            return self.teacher.pool_means(seen, self.settings.window).flatten(1, 2)
        return self.teacher.pool_windows(seen, self.settings.window).flatten(1, 2)
