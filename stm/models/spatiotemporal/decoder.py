"""STM's decoder: from the visible tokens and the text to the teacher's features of all tokens.

Each layer that the student returns has its own decoder. Hidden tokens are filled with the text embedding. Adjacent frames
are compared a second time, by a network like the mask's, whose output is added in two ways: as tokens weighted by blobs
around the predicted points, and as pair features. Reimplemented from the formulas of the released code.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from stm.masking.spatiotemporal import average_blobs, merge_pairs
from stm.models.spatiotemporal.pair_predictor import FEATURES, PairPredictor
from stm.models.vit import init_weights, position_table
from stm.tubelets import gather_tokens

MaskGradient = Literal["by_token", "as_released"]
SPREAD = 0.2  # of the nine jittered points, in units of half a frame, as in the mask


class FrameAlignment(nn.Module):
    """Compares adjacent frames. Returns, per token, a weighted copy and the features of the pairs that contain its frame."""

    def __init__(self, width: int, side: int, features: int) -> None:
        super().__init__()
        self.side = side
        self.predictor = PairPredictor(width, side, features)
        # Convolves along time only.
        self.temporal = nn.Conv3d(features // 2, features // 2, (3, 1, 1), padding=(1, 0, 0))
        self.widen = nn.Linear(features // 2, width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, N, width], T of 2 or more -> two tensors of the same shape."""
        pairs = self.predictor(tokens)
        first, second = (average_blobs(points, self.side, SPREAD) for points in (pairs.former, pairs.latter))
        # Averaging a token weighted by two maps equals weighting it by their mean.
        aligned = tokens * merge_pairs(first, second, last="latter")[..., None].to(tokens.dtype)
        former, latter = pairs.feature.chunk(2, dim=2)
        frames = merge_pairs(former, latter, last="latter")  # [B, T, features / 2, side, side]
        between = self.temporal(frames.transpose(1, 2))
        return aligned, self.widen(between.flatten(3).movedim(1, -1))


class LayerDecoder(nn.Module):
    """The decoder for one student layer."""

    def __init__(self, width: int, feature_width: int, side: int, features: int, as_released: bool) -> None:
        super().__init__()
        self.alignment = FrameAlignment(width, side, features)
        self.from_aligned = nn.Linear(width, width)
        self.from_pairs = nn.Linear(width, width)
        self.head = nn.Linear(width, feature_width)
        self.norm = nn.LayerNorm(feature_width)
        self.apply(init_weights)
        # Both branches are initialised to zero, so that the decoder starts as a linear head. The released code intends the
        # same, but accidentally overwrites these zeros when it later initialises all linear layers.
        if not as_released:
            for branch in (self.from_aligned, self.from_pairs):
                nn.init.zeros_(branch.weight)

    def forward(self, empty: Tensor, filled: Tensor | None) -> Tensor:
        """Predicts the features of the tokens.

        Args:
            empty: [B, T, N, width], zeros where tokens are hidden, plus position embeddings.
            filled: the same with the text embedding where tokens are hidden; None for images and without text.

        Returns:
            [B, T, N, feature_width].
        """
        if filled is None:
            return self.norm(self.head(empty))
        aligned, between = self.alignment(empty)
        return self.norm(self.head(filled + self.from_aligned(aligned) + self.from_pairs(between)))


class SpatioTemporalDecoder(nn.Module):
    """One decoder per layer that the student returns."""

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
        as_released: bool = False,
        positions: Tensor | None = None,
    ) -> None:
        """
        Args:
            width: width of the student.
            text_width: width of the text embedding; if it differs from the student's, a projection shared by all layers
                maps it (in the released models they are equal).
            feature_width: width of the teacher's features.
            layers: number of layers that the student returns.
            slots: number of frames of the longest clip.
            side: tokens per side of a frame, at least 2.
            features: channels of the pair features, a multiple of 8.
            as_released: whether to reproduce two slips of the released code, see `stm.config.SpatioTemporal.decoder`.
            positions: the student's position table, float32 [1, slots * side^2, width]; None: the released one.
        """
        super().__init__()
        self.slots = slots
        self.as_released = as_released
        self.side = side
        self.text_entry = nn.Identity() if text_width == width else nn.Linear(text_width, width)
        self.text_entry.apply(init_weights)
        self.layers = nn.ModuleList(
            LayerDecoder(width, feature_width, side, features, as_released) for _ in range(layers)
        )
        table = position_table(slots * side**2, width) if positions is None else positions
        self.register_buffer("positions", table, persistent=False)

    def forward(self, visible: Tensor, kept: Tensor, text: Tensor | None, frames: int) -> Tensor:
        """Predicts the teacher's features of all tokens.

        Images (one frame) and clips without text are predicted from the tokens and zeros alone, as in the released code: the
        pair networks are not used and get no gradient.

        Args:
            visible: the student's features of the visible tokens, float [layers, B, K, width].
            kept: int64 [B, K], their token indices.
            text: the text encoder's hidden state of the first token, before any projection, float [B, text_width], or None.
            frames: T, frames per clip.

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
            joined = self.as_released and base is not None
            empty = self._place(layer, kept, layer.new_zeros(1, 1, 1), frames, joined)
            filled = None if base is None else self._place(layer, kept, base, frames, joined)
            predictions.append(decoder(empty, filled).flatten(1, 2))
        return torch.stack(predictions)

    def _place(self, visible: Tensor, kept: Tensor, base: Tensor, frames: int, joined: bool) -> Tensor:
        """All tokens [B, T, N, width]: the visible ones, `base` for the others, plus position embeddings.

        With `joined`, the gradient also reaches the tokens as if the visible ones came first and the others after them.
        """
        batch, _, width = visible.shape
        tokens = frames * self.side**2
        index = kept[..., None].expand(-1, -1, width)
        filled = base.expand(batch, tokens, width)
        placed = filled.scatter(1, index, visible) + self.positions[:, :tokens].to(visible.dtype)
        if joined:
            order = torch.cat([visible, filled[:, visible.shape[1] :]], dim=1)
            placed = placed + (order - order.detach())
        return placed.unflatten(1, (frames, self.side**2))


def gather_visible(tokens: Tensor, hidden: Tensor, kept: Tensor, pooling: MaskGradient) -> Tensor:
    """Select the tokens that a pass encodes, with a gradient path to the mask.

    As in STM, all tokens are multiplied by their visibility, which is 1 for the selected ones, and a term whose value is 0 is
    added: adaptive max pooling of the multiplied tokens to the number of selected ones, minus the same value detached. The
    gradient at a selected token therefore reaches its own visibility, and once more that at the maximum of a pooling window.

    Args:
        tokens: embedded tokens of the whole clip, float [B, L, W], L = T * N.
        hidden: [B, T, N], 1 for tokens that are left out and 0 for those in `kept`: `SampledMask.weight` for the visible
            tokens, 1 - `SampledMask.weight` for the hidden ones, which STM compares with the text.
        kept: int64 [B, K], the selected tokens.
        pooling: `by_token` pools each feature along the token index [INF: the released code intends it]. `as_released` views
            the memory of [B, L, W] as [B, W, L], so that a window covers features of one or two tokens, and views the result
            [B, W, K] as [B, K, W].

    Returns:
        [B, K, W] in the dtype of `tokens`, equal to `gather_tokens(tokens, kept)`.
    """
    visible = tokens * (1 - hidden).flatten(1)[..., None].to(tokens.dtype)
    batch, length, width = visible.shape
    count = kept.shape[1]
    if pooling == "as_released":
        pooled = functional.adaptive_max_pool1d(visible.reshape(batch, width, length), count)
        pooled = pooled.reshape(batch, count, width)
    else:
        pooled = functional.adaptive_max_pool1d(visible.transpose(1, 2), count).transpose(1, 2)
    return gather_tokens(visible, kept) + (pooled - pooled.detach())
