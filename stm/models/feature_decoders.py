"""Decoders from the student's features to the teacher's joint space: UMT's linear heads, ClusterSTM's blocks."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from stm.models.vit import Architecture, VideoDecoder, init_weights, make_positions
from stm.tubelets import gather_tokens


class LinearDecoders(nn.Module):
    """UMT's decoders, one per layer: add the fixed sine-cosine position embedding, then Linear and LayerNorm.

    The loss normalises the output.
    """

    positions: Tensor

    def __init__(self, architecture: Architecture, feature_width: int, layers: int, norm_eps: float = 1e-6) -> None:
        """
        Args:
            architecture: of the student; determines the feature width and the position embeddings.
            feature_width: C, dimension of the teacher's joint space.
            layers: number of the student's last layers to align.
            norm_eps: epsilon of the LayerNorms; UMT: 1e-6 in its first stage, 1e-5 in its second.
        """
        super().__init__()
        width = architecture.width
        self.heads = nn.ModuleList(nn.Linear(width, feature_width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(feature_width, eps=norm_eps) for _ in range(layers))
        self.apply(init_weights)
        self.register_buffer("positions", make_positions(architecture, width), persistent=False)

    def forward(self, features: Tensor, kept: Tensor) -> Tensor:
        """The student's features in the teacher's space, layer by layer.

        Args:
            features: [layers, B, K, W], outputs of the student's last layers, in ascending order.
            kept: int64 [B, K], their token indices; a clip may have fewer frames than the architecture.

        Returns:
            Float [layers, B, K, C].

        Raises:
            ValueError: the numbers of layers and decoders differ.
        """
        if features.shape[0] != len(self.heads):
            raise ValueError(
                f"features of {features.shape[0]} layers for {len(self.heads)} linear decoders: must be equal"
            )
        positions = gather_tokens(self.positions.to(features.dtype).expand(kept.shape[0], -1, -1), kept)
        parts = zip(self.heads, self.norms, features, strict=True)
        return torch.stack([norm(head(layer + positions)) for head, norm, layer in parts])


class TokenDecoder(VideoDecoder):
    """ClusterSTM's decoder: blocks over visible tokens and mask tokens, then a projection to the teacher's joint space.

    It is VideoMAE's decoder with a different output layer. The paper calls it spatio-temporal but does not state its size;
    joint attention and the architecture's decoder width and heads are our inference [INF].
    """

    def __init__(self, architecture: Architecture, feature_width: int, depth: int) -> None:
        """
        Args:
            architecture: of the student; determines the widths, the heads and the position embeddings.
            feature_width: C, dimension of the teacher's joint space.
            depth: number of decoder blocks; overrides the architecture's.
        """
        super().__init__(replace(architecture, decoder_depth=depth))
        # Replaces VideoMAE's output layer, which predicts pixels.
        self.head = nn.Linear(architecture.decoder_width, feature_width)
        init_weights(self.head)

    def forward(self, encoded: Tensor, kept: Tensor, decoded: Tensor) -> Tensor:
        """Predicts the hidden tokens in the teacher's joint space.

        Args:
            encoded: [B, K, W], the student's features of the visible tokens.
            kept: int64 [B, K], their token indices.
            decoded: int64 [B, M], indices of the tokens to predict.

        Returns:
            Float [B, M, C].
        """
        return super().forward(encoded, kept, decoded)
