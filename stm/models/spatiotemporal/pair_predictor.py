"""Locates the moving object in two adjacent frames (STM): a small convolutional network over pairs of frames.

The mask and each decoder layer have separate instances.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

FEATURES = 256  # channels of a pair's feature map, as in the released code
REACH = 0.75  # maximum distance of a point from the centre along each axis, in units of half a frame


class Pairs(NamedTuple):
    """Predictions for all pairs of adjacent frames."""

    points: Tensor  # float32 [B, T - 1, 2, 2]: in the first and second frame; x and y in [-0.75, 0.75]
    feature: Tensor  # [B, T - 1, features, side, side], non-negative

    @property
    def former(self) -> Tensor:
        """The points in the first frame of each pair, [B, T - 1, 2]."""
        return self.points[:, :, 0]

    @property
    def latter(self) -> Tensor:
        """The points in the second frame of each pair, [B, T - 1, 2]."""
        return self.points[:, :, 1]


class PairPredictor(nn.Module):
    """Predicts a point in each frame of each pair, and a feature map of the pair.

    Batch norm computes its statistics over all pairs in the batch, as in the released code. Convolutions before a batch norm
    have no bias, since the norm would subtract it. All points are initialised at the centre.
    """

    def __init__(self, width: int, side: int, features: int = FEATURES) -> None:
        """
        Args:
            width: channels per token; a pair has twice as many.
            side: tokens per side of a frame, at least 2. The two pooling layers halve it, rounding down as in the released
                code; on grids below 4 they round up, so that one token remains: 2 -> 1 -> 1 and 3 -> 2 -> 1.
                On such grids, batch norm needs at least two pairs in a training batch.
            features: channels of the pair's feature map, a multiple of 8.

        Raises:
            ValueError: the grid is too small, or `features` is not a multiple of 8.
        """
        super().__init__()
        if side < 2:
            raise ValueError(f"frames of {side} x {side} tokens are too small to compare: at least 2 x 2 are needed")
        if features % 8:
            raise ValueError(f"features {features} must be a multiple of 8: they are halved twice, in two groups")
        self.side = side
        pair, half, quarter = 2 * width, features // 2, features // 4
        self.join = nn.Sequential(
            nn.Conv2d(pair, pair, 3, padding=1, groups=pair, bias=False),
            nn.BatchNorm2d(pair),
            nn.ReLU(),
            nn.Conv2d(pair, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
        )
        self.shrink = nn.Sequential(
            nn.Conv2d(features, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.MaxPool2d(2, ceil_mode=side < 4),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.MaxPool2d(2, ceil_mode=side < 4),
            nn.ReLU(),
        )
        # Two groups: half of the channels predict the point in the first frame, half that in the second.
        self.point = nn.Sequential(nn.Conv1d(half, quarter, 1, groups=2), nn.ReLU(), nn.Conv1d(quarter, 4, 1, groups=2))
        last = self.point[-1]
        assert isinstance(last, nn.Conv1d) and last.bias is not None
        # tanh(0) = 0, so all points start at the centre.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor) -> Pairs:
        """Clip tokens [B, T, N, width], T >= 2 -> predictions for the T - 1 pairs of each clip."""
        maps = tokens.unflatten(2, (self.side, self.side)).movedim(-1, 2)  # [B, T, width, side, side]
        pairs = torch.cat([maps[:, :-1], maps[:, 1:]], dim=2)
        feature = self.join(pairs.flatten(0, 1))
        pooled = self.shrink(feature).amax(dim=(2, 3))
        points = self.point(pooled[:, :, None]).reshape(*pairs.shape[:2], 2, 2)
        # Points are compared with token positions a few hundredths apart, so stay in float32 even under autocast.
        points = REACH * torch.tanh(points.to(torch.promote_types(points.dtype, torch.float32)))
        return Pairs(points, feature.unflatten(0, pairs.shape[:2]))
