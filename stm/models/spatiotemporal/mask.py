"""STM's learned mask: hides a clip's tokens based on the motion between frames and a teacher's attention.

The mask is trained with the student. Sampling is not differentiable, so `SampledMask.weight` represents the mask: its value
is the mask, its gradient that of a softmax (a straight-through estimator). `gather_visible` in `decoder.py` propagates the
student's gradient to it. The formulas are in stm/masking/spatiotemporal.py, reimplemented from the released code.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stm.config import SpatioTemporal
from stm.masking.spatiotemporal import (
    average_blobs,
    divergence,
    merge_pairs,
    mixture_probability,
    perturb,
    rank_as_released,
    straight_through,
)
from stm.models.spatiotemporal.pair_predictor import PairPredictor, Pairs


class SampledMask(NamedTuple):
    """A sampled mask and the scores it was sampled from; all in float32 or wider."""

    score: Tensor  # [B, T, N], finite: the guide "spatiotemporal"; the highest-scoring tokens are hidden
    probability: Tensor  # [B, T, N], sums to 1 in each frame (`mixture_probability`)
    weight: Tensor  # [B, T, N], exactly 1 if hidden and 0 if visible; carries the gradient
    points: Tensor  # [B, T, 2], x and y in [-0.75, 0.75]: mean centre of the frame's blobs
    blobs: Tensor  # [B, T, N], the temporal score, sums to 1 in each frame
    divergence: Tensor  # scalar, without gradient: distance of the probabilities from uniform, in nats (`divergence`)


class SpatioTemporalMask(nn.Module):
    """From pairs of adjacent frames to points, from points to blobs, from blobs and attention to a mask."""

    def __init__(self, stem_width: int, side: int, settings: SpatioTemporal) -> None:
        """
        Args:
            stem_width: width of the teacher's patch embeddings.
            side: tokens per side of a frame, at least 2.
            settings: the mask's settings.
        """
        super().__init__()
        self.side = side
        self.settings = settings
        self.entry = nn.Linear(stem_width, settings.width)
        self.norm = nn.LayerNorm(settings.width)
        self.predictor = PairPredictor(settings.width, side, settings.features)
        self.mix = nn.Parameter(torch.tensor(settings.mix))
        self.learning_rate_factors = {"mix": settings.mix_learning_rate}

    def forward(self, stem: Tensor, attention: Tensor, noise: Tensor, ratio: float) -> SampledMask:
        """Samples a mask for each clip.

        With `log_probability`, the mix is clamped in place to [0, 1] before each training step, since the last optimiser step
        may have moved it outside: a negative mixture has no logarithm, and a differentiable clamp has zero gradient outside
        the range, so the mix would never return. The released code does not bound it, nor does `as_released`.

        Args:
            stem: the teacher's patch embeddings before position embeddings, float [B, T * N, stem_width].
            attention: the teacher's attention from the class token, float [B, T, N], non-negative.
            noise: float [B, T, N], uniform in [0, 1).
            ratio: fraction of each frame's tokens to hide.

        Raises:
            ValueError: there is only one frame, or the shapes do not match.
        """
        frames, tokens = attention.shape[1:]
        if frames < 2 or tokens != self.side**2 or stem.shape[1] != frames * tokens:
            raise ValueError(
                f"attention [B, {frames}, {tokens}] and stem [B, {stem.shape[1]}, width] must have at least 2 frames, "
                f"each of {self.side} x {self.side} tokens"
            )
        if self.training and self.settings.sampling == "log_probability":
            with torch.no_grad():
                self.mix.clamp_(0, 1)
        pairs = self.compare(stem, frames)
        # Probabilities over hundreds of tokens differ by less than bfloat16 can resolve.
        with torch.autocast(stem.device.type, enabled=False):
            dtype = torch.promote_types(attention.dtype, torch.float32)
            return self.sample(
                pairs.former.to(dtype), pairs.latter.to(dtype), attention.to(dtype), noise.to(dtype), ratio
            )

    def compare(self, stem: Tensor, frames: int) -> Pairs:
        """Predicts the points in the frames of each adjacent pair; `stem` as in `forward`."""
        pairs: Pairs = self.predictor(self.norm(self.entry(stem)).unflatten(1, (frames, -1)))
        return pairs

    def sample(self, former: Tensor, latter: Tensor, attention: Tensor, noise: Tensor, ratio: float) -> SampledMask:
        """Samples masks from the points of each pair, [B, T - 1, 2] each; the other arguments are as in `forward`."""
        sampling, spread = self.settings.sampling, self.settings.points_spread
        first, second = (average_blobs(points, self.side, spread) for points in (former, latter))
        # Blob values are 1 to 4 per token; the softmax brings them to the scale of the attention, which sums to about 1.
        blobs = merge_pairs(first, second, last="former").softmax(dim=-1)
        mix = self.mix if sampling == "as_released" else self.mix.clamp(0, 1)
        probability = mixture_probability(mix * blobs + (1 - mix) * attention, sampling)
        score = perturb(probability, noise, sampling)
        if sampling == "as_released":
            score = rank_as_released(score, self.settings.temperature)
        return SampledMask(
            score=score,
            probability=probability,
            weight=straight_through(score, noise, ratio, self.settings.temperature),
            points=merge_pairs(former, latter, last="former"),
            blobs=blobs,
            divergence=divergence(probability, sampling),
        )
