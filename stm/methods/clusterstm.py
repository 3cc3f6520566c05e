"""ClusterSTM: one token per cluster stays visible, and the relevance of the masked tokens to the caption is predicted.

The paper's text was not available: docs/language.md lists what is known about it and what we inferred. Optionally, the
student's features of the visible tokens are also aligned with the teacher's, as in UMT.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stm.config import Cluster, LanguageRun
from stm.masking import complement
from stm.methods.umt import gather_layers, make_decoders
from stm.methods.video_language import (
    BranchOutput,
    EncodedText,
    MediaMasks,
    VideoLanguage,
    build_video_language,
    check_aligned_layers,
)
from stm.models.feature_decoders import LinearDecoders, TokenDecoder
from stm.models.teachers.frame_teacher import FrameTeacher, TeacherOutput
from stm.models.vit import Architecture, VideoEncoder
from stm.objectives.alignment import alignment_loss
from stm.objectives.relevance import Scale, relevance, relevance_loss
from stm.tubelets import gather_tokens


def build(run: LanguageRun, text_width: int | None = None) -> VideoLanguage:
    """See `stm.methods.build_method`.

    Raises:
        ValueError: also if the caption vectors and the teacher's features have different widths.
    """
    method = build_video_language(run, ClusterWise)
    width = method.teacher.feature_width
    if text_width not in (None, width):
        raise ValueError(
            f"the captions' vectors have {text_width} dimensions and the features of the teacher {run.teacher.model} {width}: "
            "encode the captions with the teacher's own text tower (config: text.model)"
        )
    return method


class ClusterWise(nn.Module):
    """Cluster-wise masking, decoder and masked relevance prediction. The text is compared with the visible tokens."""

    teacher: FrameTeacher

    def __init__(self, run: LanguageRun, architecture: Architecture, teacher: FrameTeacher) -> None:
        super().__init__()
        self.settings = run.cluster or Cluster()
        self.masks = MediaMasks(run)
        self.tokens = architecture.slot_tokens
        # Bypass submodule registration: the teacher is frozen and not saved with the branch; see
        # `stm.methods.base.Method`.
        self.__dict__["teacher"] = teacher
        self.decoder: TokenDecoder | None = None
        if run.objectives.relevance:
            self.decoder = TokenDecoder(architecture, teacher.feature_width, self.settings.decoder_depth)
        self.logit_scale = _find_logit_scale(teacher) if self.settings.scaling == "logit_scale" else 1.0
        self.layers = 1
        self.alignment: LinearDecoders | None = None
        if run.objectives.alignment:
            check_aligned_layers(run, architecture, teacher)
            self.layers = teacher.layers
            self.alignment = make_decoders(run, architecture, teacher)

    def forward(
        self, encoder: VideoEncoder, batch: Mapping[str, Any], teacher_output: TeacherOutput, text: EncodedText | None
    ) -> BranchOutput:
        """See `stm.methods.video_language.Branch`.

        The batch also contains "text" float32 [B, C]: unit-length caption vectors from the teacher's text tower.
        """
        kept, masked = self.mask(batch, teacher_output)
        layers = encoder.forward_layers(batch["video"], kept, self.layers)
        losses: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        if self.decoder is not None:
            scale = self._scale(masked, batch["video"].shape[1])
            decoded, all_texts = self.decoder(layers[-1], kept, masked), self.settings.texts == "batch"
            target = relevance(gather_tokens(self.pool(teacher_output), masked), batch["text"], all_texts, scale)
            losses["relevance"] = relevance_loss(decoded, target, batch["text"], all_texts, scale)
            # What a constant per clip leaves of the objective.
            values["relevance_deviation"] = target.std(dim=1, correction=0).mean()
        if self.alignment is not None:
            predicted = self.alignment(layers, kept)
            losses["alignment"] = alignment_loss(predicted, gather_layers(teacher_output.features, kept))
        return BranchOutput(layers[-1], losses, values)

    def _scale(self, masked: Tensor, frames: int) -> Scale:
        """The scale of the relevance of the masked tokens [B, M] of clips of `frames` frames."""
        members = None
        if self.settings.scaling == "frame":
            members = (masked // self.tokens)[..., None] == torch.arange(frames, device=masked.device)
        return Scale(self.settings.scaling, self.logit_scale, members)

    def accept_text_model(self, text_model: dict[str, str] | None) -> None:
        """Rejects caption vectors from a model other than the teacher: cosines between the two would be meaningless.

        Raises:
            ValueError: both models are identified and differ.
        """
        teacher = self.teacher.identity
        if teacher is None or text_model is None:
            return
        if teacher.get("weights_sha256") != text_model.get("weights_sha256"):
            raise ValueError(
                f"the captions' vectors were made by {text_model.get('model')}, and the teacher is {teacher.get('model')}: "
                "relevance compares the two. Set text.model to the teacher and run the stages `text` and `shards` again"
            )

    def mask(self, batch: Mapping[str, Any], teacher_output: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Kept tokens, int64 [B, K], and masked tokens, int64 [B, L - K], both sorted."""
        kept = self.masks.keep(batch, teacher_output)
        return kept, complement(kept, batch["video"].shape[1] * self.tokens)

    @torch.no_grad()
    def pool(self, teacher_output: TeacherOutput) -> Tensor:
        """Pools each token with its neighbours, using the teacher: float32 [B, L, C]."""
        if self.settings.pooling == "mean":
            return self.teacher.pool_means(teacher_output, self.settings.window).flatten(1, 2)
        return self.teacher.pool_windows(teacher_output, self.settings.window).flatten(1, 2)


def _find_logit_scale(teacher: FrameTeacher) -> float:
    if teacher.logit_scale is None:
        raise ValueError(
            "cluster.scaling `logit_scale`: the teacher has no logit scale, because it was loaded without its text tower; "
            "choose another scaling or a CLIP or SigLIP as teacher.model"
        )
    return teacher.logit_scale
