"""STM's decoder: from the visible tokens and the text to the teacher's features of all tokens.

Each of the student's returned layers has its own decoder. Hidden tokens are filled with the text's vector. Adjacent
frames are compared once more, by a network like the mask's, whose output is added in two ways: the tokens weighted by blobs
around its points, and its features of the pairs. Written from the formulas of the released code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from stm.masking.spatiotemporal import average_blobs, merge_pairs
from stm.models.spatiotemporal.pair_predictor import FEATURES, PairPredictor
from stm.models.vit import init_weights, position_table
from stm.tubelets import gather_tokens

SPREAD = 0.2  # of the nine jittered points, in half frames, as in the mask


class FrameAlignment(nn.Module):
    """Compares adjacent frames. Per token: a weighted copy of it, and features of the pairs that its frame belongs to."""

    def __init__(self, width: int, side: int, features: int) -> None:
        super().__init__()
        self.side = side
        self.predictor = PairPredictor(width, side, features)
        # Along time alone; its number of channels is our inference.
        self.temporal = nn.Conv3d(features // 2, features // 2, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, N, width], T of 2 or more -> [B, T, N, width] and [B, T, N, features / 2]."""
        pairs = self.predictor(tokens)
        first, second = (average_blobs(points, self.side, SPREAD) for points in (pairs.former, pairs.latter))
        # The mean of a token weighted by two maps is the token weighted by their mean.
        aligned = tokens * merge_pairs(first, second, last="latter")[..., None].to(tokens.dtype)
        former, latter = pairs.feature.chunk(2, dim=2)
        frames = merge_pairs(former, latter, last="latter")  # [B, T, features / 2, side, side]
        between = self.temporal(frames.transpose(1, 2))
        return aligned, between.flatten(3).movedim(1, -1)


class LayerDecoder(nn.Module):
    """The decoder of one of the student's layers."""

    def __init__(self, width: int, feature_width: int, side: int, features: int) -> None:
        super().__init__()
        self.alignment = FrameAlignment(width, side, features)
        self.from_aligned = nn.Linear(width, width)
        self.from_pairs = nn.Linear(features // 2, width)
        self.head = nn.Linear(width, feature_width)
        self.norm = nn.LayerNorm(feature_width)
        self.apply(init_weights)
        # Both branches start at zero, so that the decoder starts as a linear head. The released code intends the same, but
        # overwrites these zeros by accident when it later initialises all linear layers; here they stay.
        for branch in (self.from_aligned, self.from_pairs):
            nn.init.zeros_(branch.weight)

    def forward(self, empty: Tensor, filled: Tensor | None) -> Tensor:
        """Features of the tokens.

        Args:
            empty: [B, T, N, width], zeros where tokens are hidden, plus positions.
            filled: the same with the text's vector where tokens are hidden; None: an image, or no text.

        Returns:
            [B, T, N, feature_width].
        """
        if filled is None:
            return self.norm(self.head(empty))
        aligned, between = self.alignment(empty)
        return self.norm(self.head(filled + self.from_aligned(aligned) + self.from_pairs(between)))


class SpatioTemporalDecoder(nn.Module):
    """One decoder for each of the student's returned layers."""

    positions: Tensor

    def __init__(
        self,
        width: int,
        text_width: int,
        feature_width: int,
        layers: int,
        slots: int,
        side: int,
        features: int = FEATURES,
    ) -> None:
        """
        Args:
            width: of the student.
            text_width: of the text's vector; where it is not the student's, one projection for all layers maps it (in the
                released models they are equal).
            feature_width: of the teacher's features.
            layers: number of layers that the student returns.
            slots: frames of the longest clip.
            side: tokens on a side of a frame, 2 or more.
            features: channels of the pairs' features, a multiple of 8.
        """
        super().__init__()
        self.slots = slots
        self.side = side
        self.text_entry = nn.Identity() if text_width == width else nn.Linear(text_width, width)
        self.text_entry.apply(init_weights)
        self.layers = nn.ModuleList(LayerDecoder(width, feature_width, side, features) for _ in range(layers))
        self.register_buffer("positions", position_table(slots * side**2, width), persistent=False)

    def forward(self, visible: Tensor, kept: Tensor, text: Tensor | None, frames: int) -> Tensor:
        """Predicts the teacher's features of all tokens.

        Images (one frame) and clips without text are predicted from the tokens and zeros alone, as in the released code: the
        pairs' networks take no part in it, and get no gradient.

        Args:
            visible: the student's features of the visible tokens, float [layers, B, K, width].
            kept: int64 [B, K], the numbers of these tokens.
            text: the text encoder's state of its first token, before any projection, float [B, text_width], or None.
            frames: of the clips, T.

        Returns:
            [layers, B, T * N, feature_width], layers in the order of `visible`.

        Raises:
            ValueError: there are more frames than slots, or the numbers of layers and decoders differ.
        """
        if not 1 <= frames <= self.slots:
            raise ValueError(f"clips of {frames} frames; the decoder has positions for 1 to {self.slots}")
        if len(visible) != len(self.layers):
            raise ValueError(f"features of {len(visible)} layers for {len(self.layers)} decoders: must be equal")
        base = None
        if text is not None and frames > 1:
            base = self.text_entry(text).to(visible.dtype)[:, None]
        predictions = []
        for decoder, layer in zip(self.layers, visible, strict=True):
            empty = self._place(layer, kept, layer.new_zeros(1, 1, 1), frames)
            filled = None if base is None else self._place(layer, kept, base, frames)
            predictions.append(decoder(empty, filled).flatten(1, 2))
        return torch.stack(predictions)

    def _place(self, visible: Tensor, kept: Tensor, base: Tensor, frames: int) -> Tensor:
        """All tokens [B, T, N, width]: the visible ones, `base` in place of the others, plus positions."""
        batch, _, width = visible.shape
        tokens = frames * self.side**2
        index = kept[..., None].expand(-1, -1, width)
        placed = base.expand(batch, tokens, width).scatter(1, index, visible)
        placed = placed + self.positions[:, :tokens].to(placed.dtype)
        return placed.unflatten(1, (frames, self.side**2))


def gather_visible(tokens: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The visible tokens, with a gradient path to the mask.

    STM adds a term whose value is 0: all tokens, the hidden ones as zeros, are pooled along the token number to as many as
    are visible (adaptive max pooling, each feature separately), minus the same without gradient. So the gradient at a
    visible token reaches `weight` at the maximum of its window, and the tokens themselves a second time, as in the released
    code. That the pooling runs along the token number is our inference.

    Args:
        tokens: embedded tokens of the whole clip, float [B, L, W], L = T * N.
        weight: [B, T, N], 1 hidden and 0 visible (`SampledMask.weight`).
        kept: int64 [B, K], the visible tokens.

    Returns:
        [B, K, W] in the dtype of `tokens`, equal to `gather_tokens(tokens, kept)`.
    """
    visible = (1 - weight).flatten(1)[..., None].to(tokens.dtype)
    pooled = functional.adaptive_max_pool1d((tokens * visible).transpose(1, 2), kept.shape[1]).transpose(1, 2)
    return gather_tokens(tokens, kept) + (pooled - pooled.detach())
