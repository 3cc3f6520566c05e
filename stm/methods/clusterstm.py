"""ClusterSTM: one token per cluster stays visible, and the relevance of the masked tokens to the caption is predicted.

The paper's text was not available: docs/language.md lists what is known about it and what we inferred. Unlike UMT and
STM, it does not align the student's features with the teacher's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stm.config import Cluster, LanguageRun
from stm.masking import complement
from stm.methods.video_language import BranchOutput, EncodedText, MediaMasks, VideoLanguage, build_video_language
from stm.models.feature_decoders import TokenDecoder
from stm.models.teachers.frame_teacher import FrameTeacher, TeacherOutput
from stm.models.vit import Architecture, VideoEncoder
from stm.objectives.relevance import relevance, relevance_loss
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

    def forward(
        self, encoder: VideoEncoder, batch: Mapping[str, Any], teacher_output: TeacherOutput, text: EncodedText | None
    ) -> BranchOutput:
        """See `stm.methods.video_language.Branch`.

        The batch also contains "text" float32 [B, C]: unit-length caption vectors from the teacher's text tower.
        """
        kept, masked = self.mask(batch, teacher_output)
        encoded = encoder(batch["video"], kept)
        if self.decoder is None:
            return BranchOutput(encoded, {}, {})
        decoded = self.decoder(encoded, kept, masked)
        all_texts = self.settings.texts == "batch"
        target = relevance(gather_tokens(self.pool(teacher_output), masked), batch["text"], all_texts)
        loss = relevance_loss(decoded, target, batch["text"], all_texts)
        return BranchOutput(encoded, {"relevance": loss}, {"relevance_target": target.mean()})

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
