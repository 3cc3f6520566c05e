"""FLOPs per step, computed from the shapes. A multiply-add counts as two operations.

Only matrix products are counted; everything else is a few thousandths of the total. torch's own counter misses fused
attention on the CPU, so the benchmarks and the plan use this formula; a test compares it with that counter.
"""

from typing import NamedTuple

from stm.models.architecture import Architecture


class ClipFlops(NamedTuple):
    """FLOPs per clip."""

    encoder: int  # forward
    decoder: int  # forward
    step: int  # forward and backward; backward has two products per forward product: for the input and the weights

    @property
    def forward(self) -> int:
        return self.encoder + self.decoder


def blocks_cost(tokens: int, width: int, depth: int, mlp_ratio: float) -> int:
    """FLOPs of `depth` transformer blocks for one sequence.

    A block multiplies each token by 3 + 1 matrices of width^2 (attention) and 2 of width x hidden (MLP), and all pairs
    of tokens twice (attention scores and weighted values).
    """
    hidden = int(width * mlp_ratio)
    return depth * 2 * (tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width)


def pretraining_cost(architecture: Architecture, kept: int, decoded: int) -> ClipFlops:
    """FLOPs per clip in pretraining, with `kept` visible tokens and `decoded` predicted ones."""
    a = architecture
    embedding = 2 * kept * a.token_values * a.width
    encoder = embedding + blocks_cost(kept, a.width, a.depth, a.mlp_ratio)
    # Mask tokens are learned vectors, so only the kept tokens pass through the decoder's input projection.
    entry = 2 * kept * a.width * a.decoder_width
    head = 2 * decoded * a.decoder_width * a.token_values
    decoder = entry + head + blocks_cost(kept + decoded, a.decoder_width, a.decoder_depth, a.mlp_ratio)
    # The pixels need no gradient, so the embedding's backward pass is a single product.
    return ClipFlops(encoder, decoder, 3 * (encoder + decoder) - embedding)


def encoding_cost(architecture: Architecture) -> int:
    """FLOPs of the encoder's forward pass on all tokens of one clip, as in evaluation."""
    return pretraining_cost(architecture, architecture.tokens, 0).encoder
