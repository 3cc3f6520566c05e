"""VideoMAE's encoder and decoder (Tong et al. 2022), with integer indices in place of boolean masks.

The encoder sees the kept tokens only; the decoder gets them back with a mask token at each position to
predict. Blocks are timm's, which equal VideoMAE's (pre-norm, joint space-time attention, no class token), so
that published weights load. Everything is a gather of fixed shape: the forward pass compiles to one graph.
"""

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stm.tubelets import Normalise, gather_tokens, split_tubelets


@dataclass(frozen=True)
class Architecture:
    """Everything that determines a model's shapes and positions; stored in the metadata of its weights."""

    image_size: int  # pixels
    patch_size: int  # pixels
    tubelet: int  # frames
    frames: int
    width: int
    depth: int  # blocks
    heads: int
    decoder_width: int
    decoder_depth: int  # blocks
    decoder_heads: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6  # VideoMAE's; transformers' configs say 1e-12
    decoder_norm_eps: float = 1e-6  # of the decoder's last norm; transformers has 1e-5 there
    positions: str = "joint"  # joint: one table over a clip's token numbers, VideoMAE's; separable: time, row, column
    position_period: float = 10000.0  # VideoMAE's
    position_frames: int | None = None  # length of the clips that the table is made for; it is stretched to `frames`

    @property
    def slots(self) -> int:
        return self.frames // self.tubelet

    @property
    def slot_tokens(self) -> int:
        """Tokens of a time slot, N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of a clip, L = slots x N."""
        return self.slots * self.slot_tokens

    @property
    def token_values(self) -> int:
        """Values in a token's tubelet: 3 colours x frames x pixels."""
        return 3 * self.tubelet * self.patch_size**2


def position_table(positions: int, width: int, period: float = 10000.0) -> Tensor:
    """Fixed sine-cosine table over a clip's token numbers, float32 [1, positions, width], as VideoMAE's.

    Entry j of position p is sin(p / period^(2 (j // 2) / width)) for even j, and the cosine for odd j.
    """
    # In float64, as VideoMAE's numpy code: at token 1,567 an angle in float32 would be off by up to 6e-5 radians.
    exponent = 2 * (torch.arange(width) // 2).to(torch.float64) / width
    angle = torch.arange(positions).to(torch.float64)[:, None] / period**exponent
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.to(torch.float32)[None]


def separable_table(slots: int, side: int, width: int, period: float = 10000.0) -> Tensor:
    """A table whose entries are split between time, row and column, float32 [1, slots * side^2, width].

    Row and column have a third of the entries each, rounded down to an even number; time has the rest.
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
    """A table for clips of a different length, interpolated linearly along time at each place, as in UMT's release.

    So weights that were trained with 4 frames per video get times between those 4 for 12 frames, and none beyond them.

    Args:
        table: [1, slots * N, width].
        new: slots of the result.

    Returns:
        [1, new * N, width]; the table itself where the numbers are equal.
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
    # Later blocks are dropped more often: the others build on what the first ones compute (Huang et al. 2016).
    rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
    norm = cast(type[nn.Module], partial(nn.LayerNorm, eps=norm_eps))  # timm calls it like a class
    return nn.ModuleList(
        Block(width, heads, mlp_ratio=mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
    )


def init_weights(module: nn.Module) -> None:
    """VideoMAE's initialisation. The tubelet embedding keeps torch's, as VideoMAE's convolution does."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TubeletEmbedding(nn.Module):
    """The linear map of each tubelet's normalised pixels: a 3-D convolution whose stride is its kernel.

    Written as a gather and a Linear, it costs nothing for masked tokens. `projection.weight` is the convolution's,
    reshaped from [width, 3, tubelet, patch, patch] to [width, 3 * tubelet * patch^2].
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.tubelet = architecture.tubelet
        self.patch = architecture.patch_size
        self.normalise = Normalise((3, 1))
        self.projection = nn.Linear(architecture.token_values, architecture.width)

    def forward(self, video: Tensor, kept: Tensor | None) -> Tensor:
        """Video [B, T, 3, S, S], uint8 or float in [0, 1]; kept tokens [B, K], None: all -> [B, K, width]."""
        tubelets = split_tubelets(video, self.tubelet, self.patch)
        if kept is not None:
            tubelets = gather_tokens(tubelets, kept)  # before the embedding: hidden tokens cost nothing
        return self.projection(self.normalise(tubelets).flatten(2))


class VideoEncoder(nn.Module):
    """From pixels of all tokens, or of the kept ones, to features; the part that is used after pretraining."""

    positions: Tensor

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        a = architecture
        self.architecture = a
        self.blocks = make_blocks(a.width, a.depth, a.heads, a.mlp_ratio, a.norm_eps, drop_path)
        self.norm = nn.LayerNorm(a.width, eps=a.norm_eps)
        self.apply(init_weights)
        self.embedding = TubeletEmbedding(a)  # after `apply`: it keeps torch's initialisation
        # Not saved: the table follows from the architecture, so the same weights serve clips of other lengths and sizes.
        self.register_buffer("positions", make_positions(a, a.width), persistent=False)

    def forward(self, video: Tensor, kept: Tensor | None = None, final_norm: bool = True) -> Tensor:
        """Features of tokens.

        Args:
            video: [B, T, 3, S, S], uint8, or float in [0, 1]; normalised here with ImageNet's statistics. A clip shorter
                than the architecture's gets the first positions of its table, as images do in UMT's second stage.
            kept: int64 [B, K], the tokens to encode; None: all.
            final_norm: whether the last LayerNorm is applied.

        Returns:
            Float [B, K or L, width].
        """
        x = self.embed(video, kept)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) if final_norm else x

    def forward_layers(self, video: Tensor, kept: Tensor | None, layers: int) -> Tensor:
        """Outputs of the last blocks, each through the same final norm, as UMT aligns them with its teacher's.

        Args:
            video, kept: as `forward` takes them.
            layers: how many blocks, 1 to the depth.

        Returns:
            Float [layers, B, K or L, width], in the order of the blocks; the last entry is what `forward` returns.

        Raises:
            ValueError: the encoder has fewer blocks.
        """
        return self.encode(self.embed(video, kept), layers)

    def encode(self, x: Tensor, layers: int) -> Tensor:
        """The second half of `forward_layers`: the output of `embed` [B, K, width] -> [layers, B, K, width]."""
        if not 1 <= layers <= len(self.blocks):
            raise ValueError(f"layers {layers} must be 1 to {len(self.blocks)}, the number of the encoder's blocks")
        outputs = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number >= len(self.blocks) - layers:
                outputs.append(x)
        return self.norm(torch.stack(outputs))

    def embed(self, video: Tensor, kept: Tensor | None = None) -> Tensor:
        """The first block's input: embedded tokens plus their positions, [B, K or L, width]."""
        x = self.embedding(video, kept)
        # In the precision of x: under autocast the residual stream is bfloat16, as with VideoMAE's half precision.
        positions = self.positions.to(x.dtype).expand(x.shape[0], -1, -1)
        return x + (positions[:, : x.shape[1]] if kept is None else gather_tokens(positions, kept))

    def forward_features(self, video: Tensor, final_norm: bool = True) -> Tensor:
        """The mean over all tokens, float [B, width].

        VideoMAE fine-tunes with `final_norm=False` and a fresh norm between this mean and the classifier.
        """
        return self.forward(video, None, final_norm).mean(dim=1)


class VideoDecoder(nn.Module):
    """Predicts the pixels of hidden tokens from the encoder's features of the kept ones."""

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
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)  # VideoMAE's
        self.register_buffer("positions", make_positions(a, width), persistent=False)

    def forward(self, encoded: Tensor, kept: Tensor, decoded: Tensor) -> Tensor:
        """Predictions for the tokens `decoded`.

        Args:
            encoded: [B, K, encoder's width].
            kept: int64 [B, K], the numbers of these tokens.
            decoded: int64 [B, M], tokens to predict: all masked ones in VideoMAE, or some of them.

        Returns:
            Float [B, M, tubelet * patch^2 * 3], ordered frame, row, column, colour.
        """
        visible = self.entry(encoded)
        positions = self.positions.to(visible.dtype).expand(encoded.shape[0], -1, -1)
        visible = visible + gather_tokens(positions, kept)
        hidden = self.mask_token.to(visible.dtype) + gather_tokens(positions, decoded)
        # Attention does not depend on the order of tokens: no unshuffling is needed, and the last M outputs are the
        # predictions.
        x = torch.cat([visible, hidden], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, kept.shape[1] :]))


class VideoMAE(nn.Module):
    """Encoder and decoder."""

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = VideoEncoder(architecture, drop_path)
        self.decoder = VideoDecoder(architecture)

    def forward(self, video: Tensor, kept: Tensor, decoded: Tensor) -> Tensor:
        """Video [B, T, 3, S, S], kept [B, K] and tokens to predict [B, M] -> predictions [B, M, values]."""
        return self.decoder(self.encoder(video, kept), kept, decoded)
