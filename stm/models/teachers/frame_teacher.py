"""A frozen CLIP, SigLIP or ActionCLIP that encodes each frame of a clip as an image: attention for masks and features as targets.

UMT masks by its attention, which is computed in the training step on the augmented pixels; UMT, STM and ClusterSTM use its
features as targets. STM's teacher is ActionCLIP: its own image tower, followed by its temporal transformer, with attention
between the frames of a clip.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from stm.config import FrameTeacher as FeatureSettings
from stm.config import Teacher as Settings
from stm.data.guides.crop import overlap_matrix
from stm.models.teachers.temporal_fusion import FOLDER_FILE, TemporalFusion
from stm.models.teachers.tower import LoadedTower, Tower
from stm.models.weights.checks import WeightsError
from stm.pretrained.hub import ModelError
from stm.pretrained.local_files import ACTION_CLIP
from stm.storage.files import sha256_file
from stm.storage.shipped import model_path
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD, to_unit

TRANSFORMERS = "transformers:"


class TeacherOutput(NamedTuple):
    """A teacher's output for B clips of T frames of N patches, L = T * N. All tensors are float32."""

    features: Tensor  # [layers, B, L, C], tokens of the last blocks in the joint space, in block order; not normalised
    attention: Tensor  # [B, T, N], of the query that pools the frame, averaged over heads; non-negative
    tokens: Tensor  # [B, T, N, D], input to the pooling: of CLIP's last block, or SigLIP's final normalised tokens
    stem: Tensor  # [B, L, S], patch embeddings before position embeddings are added
    class_token: Tensor | None = None  # [B, T, D], input of CLIP's last block; None for SigLIP


class FrameTeacher(nn.Module):
    """A frozen image tower on the student's grid of tokens, with optional temporal fusion.

    It is never trained and always in eval mode. It computes in the precision of its weights, or in that of an enclosing
    autocast; its outputs are float32.
    """

    mean: Tensor
    deviation: Tensor
    overlap: Tensor
    identity: dict[str, Any] | None = None  # for receipts: the model and its weights' hash, if loaded from files
    logit_scale: float | None = None  # by which the model's training multiplied cosines with texts; None: unknown

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
            tower: becomes a submodule, is frozen, and its position embedding is resized to `image_size`.
            side: the student's tokens per side of a frame.
            layers: number of last blocks whose features are returned; UMT and STM: 6. With 0, only `attend` may be called.
            image_size: side length that frames are resized to, in pixels; by default `side` teacher patches, one per
                student token. With `layers`, only the default is allowed.
            mean, deviation: for normalising pixels in [0, 1]. The default is UMT's: its released code passes the student's
                pixels, normalised with ImageNet's statistics instead of CLIP's, to the teacher.
            fusion: applied to the features of clips; images (T = 1) are left unchanged (STM).

        Raises:
            ModelError: the size is not a multiple of the patch size, there are fewer blocks than layers, the features are not
                on the student's grid, or the fusion's width differs from the features'.
        """
        super().__init__()
        self.image_size = image_size or side * tower.patch
        _check_sizes(tower, side, layers, self.image_size)
        self.side = side
        self.layers = layers
        self.feature_width = tower.feature_width
        self.token_width = tower.token_width
        self.stem_width = tower.stem_width
        if fusion is not None and fusion.width != tower.feature_width:
            raise ModelError(
                f"teacher.temporal_fusion is {fusion.width} wide, and the teacher's features are {tower.feature_width}"
            )
        patches_per_side = self.image_size // tower.patch
        tower.resize(patches_per_side)
        self.tower = tower
        self.fusion = fusion
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)
        # Overlap of each teacher patch with each student token along one axis, as a fraction. Not saved: it is determined
        # by the sizes.
        self.register_buffer("overlap", torch.tensor(overlap_matrix(0, 1, 1, patches_per_side, side)), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def load(cls, settings: Settings, side: int) -> "FrameTeacher":
        """Load the teacher that a run's settings name, on the CPU, for a student with side x side tokens per frame.

        Raises:
            ModelError: it cannot be loaded or does not match the student; the message explains why.
        """
        loaded = _load_tower(settings.model)
        identity: dict[str, Any] = dict(loaded.identity)
        # A teacher that only guides masks returns no features.
        layers, fusion = 0, None
        if isinstance(settings, FeatureSettings):
            layers = settings.layers
            if settings.temporal_fusion is not None:
                path = model_path(settings.temporal_fusion)
                path = path / FOLDER_FILE if path.is_dir() else path
                fusion = _load_fusion(path)
                identity["temporal_fusion_sha256"] = sha256_file(path)
        mean, deviation = _choose_statistics(settings, loaded)
        teacher = cls(loaded.tower, side, layers, settings.image_size, mean, deviation, fusion)
        teacher.identity = identity
        teacher.logit_scale = loaded.logit_scale
        return teacher

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, regardless of the parent module's mode."""
        return super().train(False)

    def prepare(self, frames: Tensor) -> Tensor:
        """The tower's input: uint8 frames [F, 3, S, S] -> float32 [F, 3, image_size, image_size], normalised."""
        pixels = (to_unit(frames) - self.mean) / self.deviation
        if pixels.shape[-1] != self.image_size:  # as in UMT: bicubic, without antialiasing
            size = (self.image_size, self.image_size)
            pixels = functional.interpolate(pixels, size, mode="bicubic", align_corners=False)
        return pixels

    @torch.no_grad()
    def forward(self, video: Tensor) -> TeacherOutput:
        """Clips, uint8 [B, T, 3, S, S] -> all outputs, see `TeacherOutput`; requires `layers` above 0."""
        batch, frames = video.shape[:2]
        output = self.tower.run(self.prepare(video.flatten(0, 1)), self.layers)
        features = output.features.float().unflatten(1, (batch, frames)).flatten(2, 3)
        if self.fusion is not None and frames > 1:
            features = self.fusion(features, frames).float()
        return TeacherOutput(
            features,
            output.attention.unflatten(0, (batch, frames)),
            output.tokens.float().unflatten(0, (batch, frames)),
            output.stem.float().unflatten(0, (batch, frames)).flatten(1, 2),
            None if output.class_token is None else output.class_token[:, 0].float().unflatten(0, (batch, frames)),
        )

    @torch.no_grad()
    def attend(self, video: Tensor, tubelet: int) -> Tensor:
        """Computes the guide "attention" of clips (UMT), skipping the blocks that only the features need.

        Args:
            video: uint8 [B, T, 3, S, S], T a multiple of the tubelet.
            tubelet: frames per slot.

        Returns:
            float32 [B, slots, N]: the attention that pools an image's embedding, averaged over heads and over the tubelet's
            frames (our inference; UMT's slots are frames). Non-negative; a frame's sum is at most 1, because CLIP's class
            token also attends to itself.
        """
        attention = self.tower.attend(self.prepare(video.flatten(0, 1)))  # [frames, patches_per_side^2]
        patches_per_side = self.overlap.shape[1]
        if patches_per_side != self.side:
            attention = (
                self.overlap @ attention.unflatten(1, (patches_per_side, patches_per_side)) @ self.overlap.T
            ).flatten(1)
        return attention.unflatten(0, (-1, tubelet)).mean(dim=1).unflatten(0, (video.shape[0], -1))

    @torch.no_grad()
    def pool_windows(self, output: TeacherOutput, window: int) -> Tensor:
        """Pools each token with its neighbours by the teacher's own head (ClusterSTM's enhanced tokens).

        SigLIP's head attends to the window; CLIP's class token, in the last block, to itself and the window [INF: the
        paper's teacher is SigLIP].

        Args:
            output: the output of `forward`.
            window: side length of the neighbourhood, odd; clipped at the frame's border [INF]. 1: only the token itself.

        Returns:
            float32 [B, T, N, C], not normalised; if a window covers the frame, this is the model's embedding of the image.

        Raises:
            ValueError: the window is even or less than 1.
        """
        near = self._near(window)
        pooled = self.tower.pool(*self._flatten(output), near)
        return pooled.float().unflatten(0, output.tokens.shape[:2])

    @torch.no_grad()
    def pool_means(self, output: TeacherOutput, window: int) -> Tensor:
        """Like `pool_windows`, but with the mean of the neighbours' final tokens instead of the pooling head."""
        near = self._near(window).float()
        means = self.tower.average(*self._flatten(output), near / near.sum(dim=1, keepdim=True))
        return means.float().unflatten(0, output.tokens.shape[:2])

    def _flatten(self, output: TeacherOutput) -> tuple[Tensor, Tensor | None]:
        """Tokens [F, N, D] and class tokens [F, 1, D] of all frames, in the precision of the tower's weights."""
        precision = next(self.tower.parameters()).dtype
        token = None if output.class_token is None else output.class_token.flatten(0, 1)[:, None].to(precision)
        return output.tokens.flatten(0, 1).to(precision), token

    def _near(self, window: int) -> Tensor:
        """Mask of the tokens in the window around each token, bool [N, N]."""
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window {window} must be odd and at least 1: a token is at its centre")
        place = torch.arange(self.side, device=self.mean.device)
        close = (place[:, None] - place).abs() <= window // 2  # along one axis
        return (close[:, None, :, None] & close[None, :, None, :]).reshape(self.side**2, self.side**2)


def _check_sizes(tower: Tower, side: int, layers: int, image_size: int) -> None:
    """Raises ModelError if the tower cannot encode frames of this size, in pixels, or has fewer blocks than `layers`."""
    if image_size % tower.patch:
        raise ModelError(f"teacher.image_size {image_size} is not a multiple of its patch size, {tower.patch} pixels")
    patches_per_side = image_size // tower.patch
    if layers and patches_per_side != side:
        raise ModelError(
            f"teacher.image_size {image_size} gives the teacher {patches_per_side} patches per side and the student has "
            f"{side} tokens: their features would not cover the same places. Leave it out, or set it to {side * tower.patch}"
        )
    if layers > tower.depth:
        raise ModelError(
            f"teacher.layers {layers} is more than the teacher's {tower.depth} blocks; set it to {tower.depth} or less"
        )


def _choose_statistics(settings: Settings, loaded: LoadedTower) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation for normalising the pixels."""
    if settings.normalisation != "own":
        return IMAGENET_MEAN, IMAGENET_STD
    if loaded.mean is None or loaded.deviation is None:
        raise ModelError(
            f"teacher.normalisation `own`: {settings.model} has no preprocessor_config.json, which would define it"
        )
    return loaded.mean, loaded.deviation


def _load_fusion(path: Path) -> TemporalFusion:
    try:
        return TemporalFusion.load(path)
    except WeightsError as error:
        raise ModelError(f"teacher.temporal_fusion: {error}") from error


def _load_tower(name: str) -> LoadedTower:
    """Imports only the library that the model needs, because each import takes seconds."""
    if name.startswith(TRANSFORMERS):
        from stm.models.teachers.transformers import load_transformers

        return load_transformers(name.removeprefix(TRANSFORMERS))
    if name.startswith(ACTION_CLIP):
        from stm.models.teachers.action_clip import load_action_clip

        return load_action_clip(name.removeprefix(ACTION_CLIP))
    from stm.models.teachers.open_clip import load_open_clip

    return load_open_clip(name)
