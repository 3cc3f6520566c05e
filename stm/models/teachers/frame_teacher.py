"""A frozen CLIP or SigLIP whose features of every frame are learned from (UMT, STM, ClusterSTM).

Each frame of a clip is an image to it. ActionCLIP's temporal transformer may follow, which lets the frames of a clip
know of each other (STM).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stm.config import FrameTeacher as Settings
from stm.models.teachers.frozen import FrozenTeacher
from stm.models.teachers.temporal_fusion import TemporalFusion
from stm.models.teachers.tower import LoadedTower, Tower
from stm.models.weights.checks import WeightsError
from stm.pretrained.hub import ModelError
from stm.storage.files import sha256_file
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

TRANSFORMERS = "transformers:"


class Seen(NamedTuple):
    """What a teacher says of B clips of T frames of N patches, L = T * N. All are float32."""

    features: Tensor  # [layers, B, L, C], last blocks' tokens in the joint space, in the blocks' order; not normalised
    attention: Tensor  # [B, T, N], what the image's embedding is read from; the mean of the heads, not negative
    tokens: Tensor  # [B, T, N, D], what the pooling reads: CLIP's last block's input, SigLIP's normalised last tokens
    stem: Tensor  # [B, L, S], patch embeddings before positions are added
    class_token: Tensor | None = None  # [B, T, D], CLIP's last block's input; a SigLIP has none


class FrameTeacher(FrozenTeacher):
    """A frozen image tower, with temporal fusion if wanted, on the student's grid of tokens.

    It never trains and stays in evaluation mode. It computes in the precision of its weights, or in that of the
    autocast around it; what it returns is float32.
    """

    def __init__(
        self,
        tower: Tower,
        side: int,
        layers: int = 6,
        image_size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        deviation: Sequence[float] = IMAGENET_STD,
        fusion: TemporalFusion | None = None,
    ) -> None:
        """
        Args:
            tower: taken over: frozen, its position embedding resized to side x side patches.
            side: the student's tokens on a side of a frame.
            layers: its last blocks, which it returns features of; UMT and STM: 6.
            image_size, mean, deviation: as `FrozenTeacher` has them.
            fusion: on top of the features of clips; images, T = 1, are left as they are (STM).

        Raises:
            ModelError: fewer blocks than layers, another grid than the student's, or a fusion of another width.
        """
        super().__init__(tower.patch, side, image_size, mean, deviation)
        if self.cells != side:
            raise ModelError(
                f"teacher.image_size {self.image_size} gives the teacher {self.cells} patches on a side and the student has "
                f"{side} tokens: its features would belong to other places. Leave it out, or set it to {side * tower.patch}"
            )
        if layers > tower.depth:
            raise ModelError(
                f"teacher.layers {layers} is more than the {tower.depth} blocks that the teacher has; set it to {tower.depth} "
                "or less"
            )
        if fusion is not None and fusion.width != tower.feature_width:
            raise ModelError(
                f"teacher.temporal_fusion is {fusion.width} wide, and the teacher's features are {tower.feature_width}"
            )
        self.layers, self.side, self.feature_width = layers, side, tower.feature_width
        self.token_width, self.stem_width = tower.token_width, tower.stem_width
        tower.resize(side)
        self.tower, self.fusion = tower, fusion
        self.freeze()

    @classmethod
    def load(cls, settings: Settings, side: int) -> "FrameTeacher":
        """The teacher that a run's settings name, on the CPU, for a student of side x side tokens a frame.

        Raises:
            ModelError: it cannot be loaded or used; the message says why.
        """
        loaded, fusion = _load_tower(settings.model), None
        identity = dict(loaded.identity)
        if settings.temporal_fusion is not None:
            path = Path(settings.temporal_fusion).expanduser()
            try:
                fusion = TemporalFusion.load(path)
            except WeightsError as error:
                raise ModelError(f"teacher.temporal_fusion: {error}") from error
            identity["temporal_fusion_sha256"] = sha256_file(path)
        mean: Sequence[float] = IMAGENET_MEAN
        deviation: Sequence[float] = IMAGENET_STD
        if settings.normalisation == "own":
            if loaded.mean is None or loaded.deviation is None:
                raise ModelError(
                    f"teacher.normalisation `own`: {settings.model} has no preprocessor_config.json that says what it is"
                )
            mean, deviation = loaded.mean, loaded.deviation
        teacher = cls(loaded.tower, side, settings.layers, settings.image_size, mean, deviation, fusion)
        teacher.identity = identity
        return teacher

    @torch.no_grad()
    def forward(self, video: Tensor) -> Seen:
        """What it says of clips: uint8 [B, T, 3, S, S] -> see `Seen`."""
        batch, frames = video.shape[:2]
        view = self.tower.run(self.prepare(video.flatten(0, 1)), self.layers)
        features = view.features.float().unflatten(1, (batch, frames)).flatten(2, 3)
        if self.fusion is not None and frames > 1:
            features = self.fusion(features, frames).float()
        return Seen(
            features,
            view.attention.unflatten(0, (batch, frames)),
            view.tokens.float().unflatten(0, (batch, frames)),
            view.stem.float().unflatten(0, (batch, frames)).flatten(1, 2),
            None if view.class_token is None else view.class_token[:, 0].float().unflatten(0, (batch, frames)),
        )

    @torch.no_grad()
    def pool_windows(self, seen: Seen, window: int) -> Tensor:
        """Each token with its neighbours through the teacher's own pooling (ClusterSTM's enhanced tokens).

        SigLIP's head reads the window. CLIP's class token, in the last block, reads itself and the window [INF: the
        paper's teacher is SigLIP].

        Args:
            seen: what `forward` returned.
            window: side of the neighbourhood, odd; it is clipped at the frame's border [INF]. 1: the token alone.

        Returns:
            float32 [B, T, N, C], not normalised; where a window covers the frame, the model's embedding of the image.

        Raises:
            ValueError: the window is even or less than 1.
        """
        near = self._near(window)
        pooled = self.tower.pool(*self._flatten(seen), near)
        return pooled.float().unflatten(0, seen.tokens.shape[:2])

    @torch.no_grad()
    def pool_means(self, seen: Seen, window: int) -> Tensor:
        """As `pool_windows`, with the mean of the neighbours' last tokens in place of the pooling head."""
        near = self._near(window).float()
        means = self.tower.average(*self._flatten(seen), near / near.sum(dim=1, keepdim=True))
        return means.float().unflatten(0, seen.tokens.shape[:2])

    def _flatten(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Tokens [F, N, D] and class tokens [F, 1, D] of all frames, in the precision of the tower's weights."""
        precision = next(self.tower.parameters()).dtype
        token = None if seen.class_token is None else seen.class_token.flatten(0, 1)[:, None].to(precision)
        return seen.tokens.flatten(0, 1).to(precision), token

    def _near(self, window: int) -> Tensor:
        """Which tokens lie in the window around each, bool [N, N]."""
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window {window} must be odd and at least 1: a token stands in its middle")
        place = torch.arange(self.side, device=self.mean.device)
        close = (place[:, None] - place).abs() <= window // 2  # along one axis
        return (close[:, None, :, None] & close[None, :, None, :]).reshape(self.side**2, self.side**2)


def _load_tower(name: str) -> LoadedTower:
    """Libraries take seconds to import: only the one that is needed is."""
    if name.startswith(TRANSFORMERS):
        from stm.models.teachers.transformers import load_transformers

        return load_transformers(name.removeprefix(TRANSFORMERS))
    from stm.models.teachers.open_clip import load_open_clip

    return load_open_clip(name)
