"""A fine-tuned classifier as one module: clips in, logits out."""

from torch import Tensor, nn

from stm.models.weights.checks import Weights, build_encoder


class VideoClassifier(nn.Module):
    """An encoder with VideoMAE's head: the mean of all tokens, a norm and a linear layer."""

    def __init__(self, weights: Weights) -> None:
        """
        Args:
            weights: of kind "classifier".
        """
        super().__init__()
        a = weights.architecture
        self.labels = weights.labels  # in the order of the logits; None: unknown
        self.encoder = build_encoder(weights)
        self.fc_norm = nn.LayerNorm(a.width, eps=a.norm_eps)
        self.head = nn.Linear(a.width, weights.classes)
        self.load_state_dict(dict(weights.tensors))

    def forward(self, video: Tensor) -> Tensor:
        """Video [B, T, 3, S, S], uint8 or float in [0, 1] -> logits [B, classes]."""
        return self.head(self.forward_features(video))

    def forward_features(self, video: Tensor) -> Tensor:
        """Return what the head sees, [B, width]: the mean of the tokens, without the encoder's norm and after the head's."""
        return self.fc_norm(self.encoder.forward_features(video, final_norm=False))
