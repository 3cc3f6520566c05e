"""What the tests of weights share: a small architecture, a classifier, clips and masks."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from stm.models.vit import Architecture, VideoEncoder
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

Model = TypeVar("Model", bound=nn.Module)
TINY = Architecture(32, 8, 2, 4, width=48, depth=2, heads=3, decoder_width=24, decoder_depth=1, decoder_heads=2)


class Head(nn.Module):
    """What stm.evaluation's classifier is, which this room may not import."""

    def __init__(self, encoder: VideoEncoder, classes: int) -> None:
        super().__init__()
        width = encoder.architecture.width
        self.encoder, self.fc_norm = encoder, nn.LayerNorm(width, eps=encoder.architecture.norm_eps)
        self.head = nn.Linear(width, classes)

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.fc_norm(self.encoder.forward_features(video, final_norm=False)))


def draw(a: Architecture, batch: int = 2, visible: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Frames uint8 [B, T, 3, S, S], the same normalised as [B, 3, T, S, S] float64, and masked bool [B, L]."""
    generator = torch.Generator().manual_seed(5)
    video = torch.randint(
        0, 256, (batch, a.frames, 3, a.image_size, a.image_size), dtype=torch.uint8, generator=generator
    )
    mean, deviation = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    clip = ((video.double() / 255 - mean) / deviation).transpose(1, 2)
    order = torch.rand(batch, a.tokens, generator=generator).argsort(1)
    return video, clip, order >= visible


def numbers(mask: Tensor) -> Tensor:
    """Places of the true entries, int64 [B, K]."""
    return torch.stack([row.nonzero().flatten() for row in mask])


def double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def disturb(model: Model) -> Model:
    """Moves biases and norms away from their initial 0 and 1, so that swapped ones are noticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
