"""VideoMAE's encoder and decoder (Tong et al. 2022), with integer indices in place of boolean masks.

The encoder processes only the kept tokens; the decoder receives their features and a mask token for each position to
predict. The blocks are timm's, which are equivalent to VideoMAE's (pre-norm, joint space-time attention, no class token),
so published weights can be loaded. All gathers have fixed shapes, so the forward pass compiles to a single graph.
"""

from functools import partial
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stm.models.architecture import Architecture as Architecture
from stm.models.checkpointing import Checkpointed
from stm.tubelets import Normalise, gather_tokens, split_tubelets


def position_table(positions: int, width: int, period: float = 10000.0) -> Tensor:
    """VideoMAE's fixed sine-cosine table over a clip's token indices, float32 [1, positions, width].

    Entry j of position p is sin(p / period^(2 (j // 2) / width)) for even j, and the cosine for odd j.
    """
    # In float64, like VideoMAE's numpy code: at token 1,567, a float32 angle would be off by up to 6e-5 radians.
    exponent = 2 * (torch.arange(width) // 2).to(torch.float64) / width
    angle = torch.arange(positions).to(torch.float64)[:, None] / period**exponent
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.to(torch.float32)[None]


def separable_table(slots: int, side: int, width: int, period: float = 10000.0) -> Tensor:
    """A table whose entries are split between time, row and column, float32 [1, slots * side^2, width].

    Row and column get a third of the entries each, rounded down to an even number; time gets the rest.
    """
    space = width // 3 // 2 * 2
    row = column = position_table(side, space, period)[0]
    time = position_table(slots, width - 2 * space, period)[0]
    grid = (slots, side, side)
    parts = [
        time[:, None, None].expand(*grid, -1),
        row[None, :, None].expand(*grid, -1),
        column[None, None].expand(*grid, -1),
    ]
    return torch.cat(parts, dim=-1).reshape(1, -1, width)


def make_positions(architecture: Architecture, width: int) -> Tensor:
    """The architecture's table for tokens of this width, float32 [1, L, width]."""
    a = architecture
    slots = a.slots if a.position_frames is None else a.position_frames // a.tubelet
    if a.positions == "separable":
        table = separable_table(slots, a.image_size // a.patch_size, width, a.position_period)
    else:
        table = position_table(slots * a.slot_tokens, width, a.position_period)
    return stretch_positions(table, slots, a.slots)


def stretch_positions(table: Tensor, slots: int, new: int) -> Tensor:
    """Interpolate a table linearly along time to a different clip length: UMT's option `ckpt_num_frame`.

    Weights trained with 4 frames per video are thus used for 12 frames with times between those 4, without extrapolation.
    UMT's released configs do not use it: their table is computed for the clip's own length.

    Args:
        table: [1, slots * N, width].
        new: number of slots of the result.

    Returns:
        [1, new * N, width]; `table` itself if `new` equals `slots`.
    """
    if new == slots:
        return table
    places = table[0].unflatten(0, (slots, -1)).permute(1, 2, 0)  # [N, width, slots]
    stretched = interpolate(places, size=new, mode="linear", align_corners=False)
    return stretched.permute(2, 0, 1).flatten(0, 1)[None]


def make_blocks(
    width: int, depth: int, heads: int, mlp_ratio: float, norm_eps: float, drop_path: float = 0.0
) -> nn.ModuleList:
    """timm blocks whose stochastic depth rises linearly to `drop_path` in the last one."""
    # Later blocks are dropped more often, because all blocks depend on the early ones' features (Huang et al. 2016).
    rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
    norm = cast(type[nn.Module], partial(nn.LayerNorm, eps=norm_eps))  # timm calls it like a class
    return nn.ModuleList(
        Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
    )


def init_weights(module: nn.Module) -> None:
    """VideoMAE's initialisation. The tubelet embedding keeps torch's default, like VideoMAE's convolution."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TubeletEmbedding(nn.Module):
    """Linear embedding of each tubelet's normalised pixels: a 3-D convolution with stride equal to its kernel size.

    Implemented as a gather and a Linear, so masked tokens cost nothing. `projection.weight` is the convolution's weight,
    reshaped from [width, 3, tubelet, patch, patch] to [width, 3 * tubelet * patch^2].
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.tubelet = architecture.tubelet
        self.patch = architecture.patch_size
        self.normalise = Normalise((3, 1))
        self.projection = nn.Linear(architecture.token_values, architecture.width)

    def forward(self, video: Tensor, kept: Tensor | None) -> Tensor:
        """Video [B, T, 3, S, S], uint8 or float in [0, 1]; kept tokens [B, K] or None for all -> [B, K or L, width]."""
        tubelets = split_tubelets(video, self.tubelet, self.patch)
        if kept is not None:
            tubelets = gather_tokens(tubelets, kept)  # before the embedding, so hidden tokens cost nothing
        return self.projection(self.normalise(tubelets).flatten(2))


class VideoEncoder(Checkpointed):
    """Computes features from the pixels of all or only the kept tokens; this is the part used after pretraining."""

    side = "video"
    positions: Tensor

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        a = architecture
        self.architecture = a
        self.blocks = make_blocks(a.width, a.depth, a.heads, a.mlp_ratio, a.norm_eps, drop_path)
        self.norm = nn.LayerNorm(a.width, eps=a.norm_eps)
        self.apply(init_weights)
        self.embedding = TubeletEmbedding(a)  # after `apply`, to keep torch's initialisation
        # Not saved: the architecture determines the table, so the same weights work for other clip lengths and image sizes.
        self.register_buffer("positions", make_positions(a, a.width), persistent=False)

    def forward(self, video: Tensor, kept: Tensor | None = None, final_norm: bool = True) -> Tensor:
        """Computes the tokens' features.

        Args:
            video: [B, T, 3, S, S], uint8, or float in [0, 1]; normalised here with ImageNet's statistics. A clip
                shorter than the architecture's uses the first rows of the position table, like images in UMT's second stage.
            kept: int64 [B, K], the tokens to encode; None: all.
            final_norm: whether the last LayerNorm is applied.

        Returns:
            Float [B, K or L, width].
        """
        x = self.embed(video, kept)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.norm(x) if final_norm else x

    def forward_layers(self, video: Tensor, kept: Tensor | None, layers: int) -> Tensor:
        """Returns the last blocks' outputs, each after the same final norm, as UMT aligns them with its teacher's.

        Args:
            video, kept: as in `forward`.
            layers: number of blocks, from 1 to the depth.

        Returns:
            Float [layers, B, K or L, width], in block order; the last entry equals the output of `forward`.

        Raises:
            ValueError: `layers` exceeds the number of blocks.
        """
        return self.encode(self.embed(video, kept), layers)

    def encode(self, x: Tensor, layers: int) -> Tensor:
        """The second half of `forward_layers`: the output of `embed` [B, K, width] -> [layers, B, K, width]."""
        if not 1 <= layers <= len(self.blocks):
            raise ValueError(f"layers {layers} must be 1 to {len(self.blocks)}, the number of the encoder's blocks")
        outputs = []
        for number, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if number >= len(self.blocks) - layers:
                outputs.append(x)
        return self.norm(torch.stack(outputs))

    def embed(self, video: Tensor, kept: Tensor | None = None) -> Tensor:
        """The first block's input: token embeddings plus position embeddings, [B, K or L, width]."""
        x = self.embedding(video, kept)
        # In x's precision: under autocast the residual stream is bfloat16, like VideoMAE's in half precision.
        positions = self.positions.to(x.dtype).expand(x.shape[0], -1, -1)
        return x + (positions[:, : x.shape[1]] if kept is None else gather_tokens(positions, kept))

    def forward_features(self, video: Tensor, final_norm: bool = True) -> Tensor:
        """The mean over all tokens, float [B, width].

        VideoMAE fine-tunes with `final_norm=False` and a newly initialised norm between this mean and the classifier.
        """
        return self.forward(video, None, final_norm).mean(dim=1)


class VideoDecoder(Checkpointed):
    """Predicts the pixels of hidden tokens from the encoder's features of the kept ones."""

    side = "video"
    positions: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        width = a.decoder_width
        # No bias: VideoMAE's `encoder_to_decoder` has none.
        self.entry = nn.Linear(a.width, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = make_blocks(width, a.decoder_depth, a.decoder_heads, a.mlp_ratio, a.norm_eps)
        self.norm = nn.LayerNorm(width, eps=a.decoder_norm_eps)
        self.head = nn.Linear(width, a.token_values)
        for part in (self.blocks, self.head):  # VideoMAE leaves `encoder_to_decoder` at torch's default
            part.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)  # VideoMAE's
        self.register_buffer("positions", make_positions(a, width), persistent=False)

    def forward(self, encoded: Tensor, kept: Tensor, decoded: Tensor) -> Tensor:
        """Predictions for the tokens `decoded`.

        Args:
            encoded: [B, K, encoder's width].
            kept: int64 [B, K], their token indices.
            decoded: int64 [B, M], indices of the tokens to predict: all masked tokens, as in VideoMAE, or some of them.

        Returns:
            Float [B, M, tubelet * patch^2 * 3], ordered frame, row, column, colour.
        """
        visible = self.entry(encoded)
        positions = self.positions.to(visible.dtype).expand(encoded.shape[0], -1, -1)
        visible = visible + gather_tokens(positions, kept)
        hidden = self.mask_token.to(visible.dtype) + gather_tokens(positions, decoded)
        # Attention is permutation-equivariant, so no unshuffling is needed, and the last M outputs are the predictions.
        x = torch.cat([visible, hidden], dim=1)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.head(self.norm(x[:, kept.shape[1] :]))


class VideoMAE(nn.Module):
    """VideoMAE's encoder and decoder."""

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = VideoEncoder(architecture, drop_path)
        self.decoder = VideoDecoder(architecture)

    def forward(self, video: Tensor, kept: Tensor, decoded: Tensor) -> Tensor:
        """Video [B, T, 3, S, S], kept [B, K] and tokens to predict [B, M] -> predictions [B, M, values]."""
        return self.decoder(self.encoder(video, kept), kept, decoded)
