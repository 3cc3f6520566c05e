"""Masked autoencoding (VideoMAE): hide tokens, encode the rest, predict the pixels of the hidden ones.

TGM adds a contrastive loss (sections 3.4 and 3.5) that matches the mean of the encoded tokens with the clip's caption.
"""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stm.config import PretrainRun, Reconstruction
from stm.masking import Strategy, complement, count_masked, get_strategy, to_boolean
from stm.methods.base import TEACHER_GUIDE, Method, Part
from stm.methods.contrast_head import EXTRA, ContrastHead, load_contrast_head
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.vit import VideoMAE
from stm.models.weights import zoo
from stm.objectives.reconstruction import (
    gather_pixels,
    pixel_statistics,
    reconstruction_loss,
    reconstruction_targets,
)
from stm.tubelets import join_tubelets, split_tubelets, to_unit


class MAE(Method):
    """VideoMAE with any masking strategy, and an optional contrastive loss with captions."""

    teacher: FrameTeacher | None

    def __init__(
        self,
        model: VideoMAE,
        strategy: Strategy,
        ratio: float,
        decode_ratio: float = 1.0,
        reconstruction: Reconstruction | None = None,
        contrast: ContrastHead | None = None,
        teacher: FrameTeacher | None = None,
    ) -> None:
        """
        Args:
            model: encoder and decoder. With a reconstruction weight of 0, the decoder is frozen and does not run; if the
                contrast has weight 0 as well, the encoder is frozen too, and only the contrastive head is trained.
            strategy: selects the tokens to hide.
            ratio: share of each slot's tokens to hide.
            decode_ratio: share of the hidden tokens to predict; 1 as in VideoMAE.
            reconstruction: loss weight and target; VideoMAE's by default.
            contrast: the contrastive branch.
            teacher: the frozen teacher, whose `attend` computes the guide "attention".
        """
        super().__init__(teacher)
        self.model = model
        self.strategy = strategy
        self.ratio = ratio
        self.decode_ratio = decode_ratio
        self.reconstruction = reconstruction or Reconstruction()
        self.contrast = contrast
        tokens = model.architecture.slot_tokens
        if count_masked(tokens, ratio) == 0:
            raise ValueError(
                f"mask.ratio {ratio} hides none of a slot's {tokens} tokens; the minimum is {1 / tokens:.4f}"
            )
        if not self.reconstruction.weight:
            frozen = model if contrast is not None and contrast.observes else model.decoder
            frozen.requires_grad_(False)

    @property
    def student(self) -> VideoMAE:
        return self.model

    def accept_text_model(self, text_model: dict[str, str] | None) -> None:
        """Records the text model in the contrastive head: evaluation must encode texts with the same model."""
        if self.contrast is not None:
            self.contrast.text_model = text_model

    def parts(self) -> dict[str, Part]:
        """The contrastive head, if the run has one."""
        if self.contrast is None:
            return {}
        return {EXTRA: Part(self.contrast.state_dict(), self.contrast.describe())}

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Computes the losses of one step.

        Args:
            batch: "video" uint8 [B, T, 3, S, S] and "guides" (see stm/masking), on the model's device; with a
                contrastive branch also "text" float32 [B, D] and "caption_index" int64 [B] (-1: the clip has no
                caption).

        Returns:
            Float32 scalars: "reconstruction" and "contrast", if the run has them; "loss", their weighted sum; and the
            other values of `ContrastHead`.
        """
        guides = self.guide(batch)
        kept, masked = self.mask(guides)
        encoded = self.model.encoder(batch["video"], kept)
        values: dict[str, Tensor] = {}
        if self.reconstruction.weight:
            # Predicting a subset makes the decoder cheaper; the encoder sees the same tokens either way.
            decoded = self.choose_decoded(masked, guides["noise"])
            predictions = self.model.decoder(encoded, kept, decoded)
            values["reconstruction"] = self.compare(predictions, batch["video"], decoded)
        if self.contrast is not None:
            # With detached tokens, the head is trained without affecting the encoder (TGM, Figure 4).
            tokens = encoded.detach() if self.contrast.observes else encoded
            values |= self.contrast(tokens, batch["text"], batch["caption_index"] >= 0)
        return {"loss": self.weigh(values), **values}

    def guide(self, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The batch's guides, plus the teacher's if the strategy needs it."""
        guides: Mapping[str, Tensor] = batch["guides"]
        if self.teacher is None:
            return guides
        with torch.no_grad():
            return {**guides, TEACHER_GUIDE: self.teacher.attend(batch["video"], self.model.architecture.tubelet)}

    def mask(self, guides: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Kept tokens, int64 [B, K], and masked tokens, int64 [B, L - K], both sorted."""
        kept = self.strategy(guides, self.ratio)
        return kept, complement(kept, self.model.architecture.tokens)

    def choose_decoded(self, masked: Tensor, noise: Tensor) -> Tensor:
        """A sorted random subset, int64 [B, M], of the masked tokens [B, L - K]; all of them if `decode_ratio` is 1.

        The subset depends only on the clip's noise. The leading 12 bits of the noise already determined which tokens
        are masked, so they are not uniform among the masked tokens; the next 12 bits are.
        """
        if self.decode_ratio == 1:
            return masked
        count = max(1, int(self.decode_ratio * masked.shape[1]))
        order = (noise * 4096).frac().flatten(1).gather(1, masked).argsort(dim=1, stable=True)[:, :count]
        return masked.gather(1, order).sort(dim=1).values

    def compare(self, predictions: Tensor, video: Tensor, decoded: Tensor) -> Tensor:
        """Mean squared error of predictions [B, M, values] for the tokens [B, M] of the video."""
        shape = self.model.architecture
        with torch.no_grad():
            targets = reconstruction_targets(video, decoded, shape.tubelet, shape.patch_size, self._normalised)
        return reconstruction_loss(predictions, targets)

    @property
    def _normalised(self) -> bool:
        return self.reconstruction.target == "normalised"

    def weigh(self, values: Mapping[str, Tensor]) -> Tensor:
        """The loss to minimise (TGM, section 3.5)."""
        terms = []
        if self.reconstruction.weight:
            terms.append(self.reconstruction.weight * values["reconstruction"])
        if self.contrast is not None and self.contrast.observes:
            # The value is zero, but the gradient still trains the head.
            terms.append(values["contrast"] - values["contrast"].detach())
        elif self.contrast is not None:
            terms.append(self.contrast.settings.weight * values["contrast"])
        return reduce(torch.add, terms)

    def observers(self) -> list[nn.Parameter]:
        """Parameters of a contrastive branch with weight 0.

        They do not train the other parameters, so their gradients must not count towards the norm for gradient
        clipping. If the encoder is frozen, there are no other parameters, and the list is empty.
        """
        if self.contrast is None or not self.contrast.observes or not self.reconstruction.weight:
            return []
        return list(self.contrast.parameters())

    def embed_video(self, video: Tensor, kept: Tensor | None = None) -> Tensor:
        """Embeds clips, from all or the kept tokens, as unit vectors in the text space: float32 [B, text_width].

        Raises:
            ValueError: the run has no `contrast`.
        """
        if self.contrast is None:
            raise ValueError("no contrastive head (`contrast`): cannot embed clips")
        return self.contrast.embed(self.model.encoder(video, kept))

    @torch.no_grad()
    def reconstruct(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Reconstructs frames from predictions of all masked tokens, regardless of `decode_ratio`.

        Returns:
            "video": float32 [B, T, 3, S, S] in [0, 1]: kept tokens are unchanged; masked tokens are predicted and, if
            the target is normalised, rescaled with the mean and standard deviation of the true pixels, as in VideoMAE's
            figures. "masked": bool [B, slots, N].
        """
        video = batch["video"]
        shape = self.model.architecture
        kept, masked = self.mask(self.guide(batch))
        pixels = self.model(video, kept, masked).float().unflatten(2, (-1, 3))  # [B, M, tubelet * patch^2, 3]
        if self._normalised:
            mean, deviation = pixel_statistics(gather_pixels(video, masked, shape.tubelet, shape.patch_size))
            pixels = pixels * deviation + mean
        tubelets = split_tubelets(video, shape.tubelet, shape.patch_size)
        tubelets = to_unit(tubelets) if video.dtype == torch.uint8 else tubelets.float()
        where = masked[:, :, None, None].expand(-1, -1, *tubelets.shape[2:])
        tubelets = tubelets.scatter(1, where, pixels.transpose(2, 3))
        side = shape.image_size // shape.patch_size
        pasted = join_tubelets(tubelets, shape.tubelet, shape.patch_size, side).clamp(0, 1)
        return {"video": pasted, "masked": to_boolean(kept, shape.slots, shape.slot_tokens)}


def build(run: PretrainRun, text_width: int | None = None) -> MAE:
    """See `stm.methods.build_method`."""
    # The model is initialised first, so that a run with `contrast` starts from the same encoder and decoder as one without.
    model = zoo.build(run)
    strategy = get_strategy(run.mask.strategy)
    contrast = None
    if run.contrast is not None:
        if text_width is None:
            raise ValueError("a run with `contrast` needs the width of the captions' vectors (text_width)")
        contrast = ContrastHead(model.architecture.width, text_width, run.contrast)
    teacher = _load_teacher(run, model) if TEACHER_GUIDE in strategy.needs else None
    return MAE(model, strategy, run.mask.ratio, run.decode_ratio, run.reconstruction, contrast, teacher)


def load(run: PretrainRun, weights: Path) -> MAE:
    """See `stm.methods.load_method`."""
    contrast = load_contrast_head(weights) if run.contrast is not None else None
    method = build(run, contrast.text_width if contrast is not None else None)
    method.model.load_state_dict(zoo.load(weights).state_dict())
    method.contrast = contrast
    return method.eval()


def _load_teacher(run: PretrainRun, model: VideoMAE) -> FrameTeacher:
    if run.teacher is None:
        raise ValueError(f"mask.strategy {run.mask.strategy!r} needs a teacher; give `teacher: {{model: ...}}`")
    return FrameTeacher.load(run.teacher, model.architecture.image_size // model.architecture.patch_size)
