"""Unmasked teacher (UMT, section 3): the student sees tokens that the teacher attends to and is aligned with it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stm.config import LanguageRun
from stm.masking import complement
from stm.methods.video_language import (
    BranchOutput,
    EncodedText,
    MediaMasks,
    VideoLanguage,
    build_video_language,
    check_aligned_layers,
)
from stm.models.feature_decoders import LinearDecoders
from stm.models.teachers.frame_teacher import FrameTeacher, TeacherOutput
from stm.models.vit import Architecture, VideoEncoder
from stm.objectives.alignment import alignment_loss
from stm.tubelets import gather_tokens


def build(run: LanguageRun, text_width: int | None = None) -> VideoLanguage:
    """See `stm.methods.build_method`; caption vectors are not used."""
    return build_video_language(run, UnmaskedTeacher)


class UnmaskedTeacher(nn.Module):
    """UMT's mask, linear decoders and alignment. The text is compared with the visible tokens."""

    def __init__(self, run: LanguageRun, architecture: Architecture, teacher: FrameTeacher) -> None:
        super().__init__()
        check_aligned_layers(run, architecture, teacher)
        self.masks = MediaMasks(run)
        self.layers = teacher.layers
        self.tokens = architecture.slot_tokens
        self.decoders: LinearDecoders | None = None
        if run.objectives.alignment:
            self.decoders = make_decoders(run, architecture, teacher)

    def forward(
        self, encoder: VideoEncoder, batch: Mapping[str, Any], teacher_output: TeacherOutput, text: EncodedText | None
    ) -> BranchOutput:
        """See `stm.methods.video_language.Branch`."""
        kept = self.masks.keep(batch, teacher_output)
        if self.decoders is None:
            return BranchOutput(encoder(batch["video"], kept), {}, {})
        layers = encoder.forward_layers(batch["video"], kept, self.layers)
        loss = alignment_loss(self.decoders(layers, kept), gather_layers(teacher_output.features, kept))
        return BranchOutput(layers[-1], {"alignment": loss}, {})

    def mask(self, batch: Mapping[str, Any], teacher_output: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Kept tokens, int64 [B, K], and masked tokens, int64 [B, L - K], both sorted."""
        kept = self.masks.keep(batch, teacher_output)
        return kept, complement(kept, batch["video"].shape[1] * self.tokens)


def make_decoders(run: LanguageRun, architecture: Architecture, teacher: FrameTeacher) -> LinearDecoders:
    """The linear decoders of the teacher's layers, with the epsilon of the run's stage: UMT's first stage, without text, passes
    1e-6, and its second leaves torch's default."""
    norm_eps = 1e-6 if run.language is None else 1e-5
    return LinearDecoders(architecture, teacher.feature_width, teacher.layers, norm_eps)


def gather_layers(features: Tensor, index: Tensor) -> Tensor:
    """Gathers the same tokens from each layer: [layers, B, L, C] and int64 [B, K] -> [layers, B, K, C]."""
    return torch.stack([gather_tokens(layer, index) for layer in features])
