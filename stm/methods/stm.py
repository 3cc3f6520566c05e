"""STM: a learned mask that follows motion between adjacent frames, and a decoder that aligns frames and text.

Visible and hidden tokens are encoded separately: the visible tokens predict the teacher's features of all tokens, and
the text is compared with the hidden tokens (as in the release; the setting `text` can select others). Both passes carry a
gradient to the learned mask, so that the text objectives train it too. Images have no adjacent frames, so they are masked by
attention.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stm.config import LanguageRun, SpatioTemporal
from stm.masking import complement
from stm.methods.video_language import (
    BranchOutput,
    EncodedText,
    MediaMasks,
    VideoLanguage,
    build_video_language,
    check_aligned_layers,
)
from stm.models.spatiotemporal.decoder import SpatioTemporalDecoder, gather_visible
from stm.models.spatiotemporal.mask import SampledMask, SpatioTemporalMask
from stm.models.teachers.frame_teacher import FrameTeacher, TeacherOutput
from stm.models.vit import Architecture, VideoEncoder, make_positions
from stm.models.weights import zoo
from stm.models.weights.checks import check_tensors
from stm.objectives.alignment import alignment_loss

_MASK = "predictor."  # prefix of the names of the mask's weights in the branch


def build(run: LanguageRun, text_width: int | None = None) -> VideoLanguage:
    """See `stm.methods.build_method`; caption vectors are not used."""
    return build_video_language(run, SpatioTemporalBranch)


class SpatioTemporalBranch(nn.Module):
    """STM's mask, decoder and alignment over all tokens."""

    def __init__(self, run: LanguageRun, architecture: Architecture, teacher: FrameTeacher) -> None:
        super().__init__()
        check_aligned_layers(run, architecture, teacher)
        self.settings = run.spatio_temporal or SpatioTemporal()
        self.masks = MediaMasks(run)
        self.ratio = run.mask.ratio
        self.layers = teacher.layers
        self.tokens = architecture.slot_tokens
        side = architecture.image_size // architecture.patch_size
        self.predictor: SpatioTemporalMask | None = None
        if run.mask.strategy == "spatiotemporal":
            self.predictor = SpatioTemporalMask(teacher.stem_width, side, self.settings)
        self.decoder = SpatioTemporalDecoder(
            architecture.width,
            architecture.width,  # text width: the BERT has the student's width
            teacher.feature_width,
            teacher.layers,
            architecture.slots,
            side,
            self.settings.features,
            self.settings.decoder == "as_released",
            make_positions(architecture, architecture.width),
        )

    @property
    def learning_rate_factors(self) -> dict[str, float]:
        """Learning-rate factors by parameter name: the mix of the two scores has a separate rate, as in the release."""
        return {} if self.predictor is None else {"predictor.mix": self.settings.mix_learning_rate}

    def forward(
        self, encoder: VideoEncoder, batch: Mapping[str, Any], teacher_output: TeacherOutput, text: EncodedText | None
    ) -> BranchOutput:
        """See `stm.methods.video_language.Branch`."""
        video = batch["video"]
        sampled = self.sample(batch, teacher_output)
        kept, hidden = self._split(batch, teacher_output, sampled)
        weight = None if sampled is None else sampled.weight
        layers = self._encode(encoder, video, kept, weight, self.layers)
        compares = sampled is not None or self.settings.compares == "always"
        sentence = text.states[:, 0] if text is not None and compares else None
        predicted = self.decoder(layers, kept, sentence, video.shape[1])
        losses = {"alignment": alignment_loss(predicted, teacher_output.features)}
        # The visible tokens are already encoded; any other choice needs a second pass through the student.
        if self.settings.text == "visible":
            tokens = layers[-1]
        elif self.settings.text == "all":
            tokens = encoder(video)
        else:
            tokens = self._encode(encoder, video, hidden, None if weight is None else 1 - weight, 1)[0]
        return BranchOutput(tokens, losses, {} if sampled is None or self.predictor is None else self._logged(sampled))

    def _encode(
        self, encoder: VideoEncoder, video: Tensor, kept: Tensor, left_out: Tensor | None, layers: int
    ) -> Tensor:
        """Encodes the tokens `kept`; `left_out`, [B, T, N] or None, is 1 for all others and receives a gradient."""
        if left_out is None:
            return encoder.forward_layers(video, kept, layers)
        selected = gather_visible(encoder.embed(video), left_out, kept, self.settings.mask_gradient)
        return encoder.encode(selected, layers)

    def sample(self, batch: Mapping[str, Any], teacher_output: TeacherOutput) -> SampledMask | None:
        """Samples the learned mask for clips; None for images and for runs with a different mask."""
        if self.predictor is None or batch["video"].shape[1] == 1:
            return None
        return self.predictor(teacher_output.stem, teacher_output.attention, batch["guides"]["noise"], self.ratio)

    def mask(self, batch: Mapping[str, Any], teacher_output: TeacherOutput) -> tuple[Tensor, Tensor]:
        """Kept tokens, int64 [B, K], and masked tokens, int64 [B, L - K], both sorted."""
        return self._split(batch, teacher_output, self.sample(batch, teacher_output))

    def _split(
        self, batch: Mapping[str, Any], teacher_output: TeacherOutput, sampled: SampledMask | None
    ) -> tuple[Tensor, Tensor]:
        # Detached: the mask is trained through `gather_visible`; ranking the scores has no gradient.
        extra = None if sampled is None else {"spatiotemporal": sampled.score.detach()}
        kept = self.masks.keep(batch, teacher_output, extra)
        return kept, complement(kept, batch["video"].shape[1] * self.tokens)

    def _logged(self, sampled: SampledMask) -> dict[str, Tensor]:
        assert self.predictor is not None
        return {"divergence": sampled.divergence.detach(), "mix": self.predictor.mix.detach()}


def load_mask(path: Path, run: LanguageRun, stem_width: int) -> SpatioTemporalMask:
    """Loads the learned mask from a run's weights, in eval mode, for the report.

    Args:
        path: the run's weights.
        run: the run's settings.
        stem_width: width of the teacher's patch embeddings.

    Raises:
        WeightsError: the file cannot be read, contains no mask, or contains a mask whose shape differs from the run's.
    """
    state, _ = zoo.load_extra(path, "branch")
    own = {name.removeprefix(_MASK): tensor for name, tensor in state.items() if name.startswith(_MASK)}
    if not own:
        raise zoo.WeightsError(f"{path} holds no learned mask: the run that wrote it had none; pretrain again")
    mask = SpatioTemporalMask(stem_width, run.image_size // run.patch_size, run.spatio_temporal or SpatioTemporal())
    check_tensors(own, mask.state_dict(), f"{path} has a learned mask")
    mask.load_state_dict(own)
    return mask.eval()
