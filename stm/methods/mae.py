"""Masked autoencoding (VideoMAE): hide tokens, encode the rest, predict the pixels of the hidden ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stm.config import PretrainRun
from stm.data.pixels import join_tubelets, split_tubelets, to_unit
from stm.masking import Strategy, complement, count_masked, get_strategy, to_boolean
from stm.models import zoo
from stm.models.vit import VideoMAE
from stm.objectives.reconstruction import (
    gather_pixels,
    pixel_statistics,
    reconstruction_loss,
    reconstruction_targets,
)


class MAE(nn.Module):
    """VideoMAE with any masking strategy."""

    def __init__(self, model: VideoMAE, strategy: Strategy, ratio: float, decode_ratio: float = 1.0) -> None:
        """
        Args:
            ratio: share of each slot's tokens to hide.
            decode_ratio: share of the hidden tokens that is predicted; 1 is VideoMAE.
        """
        super().__init__()
        self.model, self.strategy, self.ratio, self.decode_ratio = model, strategy, ratio, decode_ratio
        tokens = model.architecture.slot_tokens
        if count_masked(tokens, ratio) == 0:
            raise ValueError(
                f"mask.ratio {ratio} hides none of a slot's {tokens} tokens; the least is {1 / tokens:.4f}"
            )

    @classmethod
    def of(cls, run: PretrainRun) -> "MAE":
        return cls(zoo.build(run), get_strategy(run.mask.strategy), run.mask.ratio, run.decode_ratio)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """One step's losses.

        Args:
            batch: "video" uint8 [B, T, 3, S, S] and "guides" (see stm/masking), on the model's device.

        Returns:
            {"loss": float32 scalar}.
        """
        kept, masked = self.mask(batch["guides"])
        decoded = self.choose_decoded(masked, batch["guides"]["noise"])
        predictions = self.model(batch["video"], kept, decoded)
        return {"loss": self.compare(predictions, batch["video"], decoded)}

    def mask(self, guides: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Kept tokens, int64 [B, K], and masked tokens, int64 [B, L - K], both sorted."""
        kept = self.strategy(guides, self.ratio)
        return kept, complement(kept, self.model.architecture.tokens)

    def choose_decoded(self, masked: Tensor, noise: Tensor) -> Tensor:
        """A random subset, int64 [B, M], sorted, of the masked tokens [B, L - K]; all when decode_ratio is 1.

        The samples' own noise draws it, by bits that the strategy hardly looks at: its leading 12 bits have
        decided what is masked, so that the noise of masked tokens is not uniform any more, but the 12 bits
        after them are.
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
            targets = reconstruction_targets(video, decoded, shape.tubelet, shape.patch_size)
        return reconstruction_loss(predictions, targets)

    @torch.no_grad()
    def reconstruct(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pictures of what the model predicts; all masked tokens, whatever decode_ratio says.

        Returns:
            "video": float32 [B, T, 3, S, S] in [0, 1]: kept tokens as they are, masked ones predicted and
            scaled back with the mean and deviation of the true pixels, as VideoMAE shows them. "masked": bool
            [B, slots, N].
        """
        video, shape = batch["video"], self.model.architecture
        kept, masked = self.mask(batch["guides"])
        predictions = self.model(video, kept, masked).float()
        mean, deviation = pixel_statistics(gather_pixels(video, masked, shape.tubelet, shape.patch_size))
        pixels = predictions.unflatten(2, (-1, 3)) * deviation + mean  # [B, M, tubelet * patch^2, 3]
        tubelets = split_tubelets(video, shape.tubelet, shape.patch_size)
        tubelets = to_unit(tubelets) if video.dtype == torch.uint8 else tubelets.float()
        where = masked[:, :, None, None].expand(-1, -1, *tubelets.shape[2:])
        tubelets = tubelets.scatter(1, where, pixels.transpose(2, 3))
        side = shape.image_size // shape.patch_size
        pasted = join_tubelets(tubelets, shape.tubelet, shape.patch_size, side).clamp(0, 1)
        return {"video": pasted, "masked": to_boolean(kept, shape.slots, shape.slot_tokens)}
