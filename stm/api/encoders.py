"""Loads an encoder, or a fine-tuned classifier, from weights in any format, with everything that its input needs."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from stm.api.masks import check_kept
from stm.data.crop_boxes import center_crop
from stm.data.resizing import resize_crops
from stm.models.architecture import Architecture
from stm.models.sizes import SIZES
from stm.models.weights import zoo
from stm.models.weights.checks import WeightsError, adapt, build_encoder
from stm.models.weights.classifier import VideoClassifier

_OVERSHOOT = 0.25  # by which resized float clips may leave [0, 1]


class ClipSizes(TypedDict):
    """The sizes of an encoder's clips, as arguments of `open_shards`."""

    frames: int
    image_size: int  # pixels
    patch_size: int  # pixels
    tubelet: int  # frames


class Features(NamedTuple):
    """What an encoder computes from B clips of L tokens."""

    tokens: Tensor  # float [B, L or K, width]
    pooled: Tensor  # float [B, width], the mean over the tokens


class Encoder(nn.Module):
    """An encoder in eval mode that takes clips as they are: it crops, resizes and normalises them itself.

    `model` is the network, `stm.models.vit.VideoEncoder`, for training and whatever else needs it.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, source: str) -> None:
        super().__init__()
        self.model = model
        self.architecture = architecture
        self.source = source
        self.eval()

    @property
    def geometry(self) -> ClipSizes:
        """The sizes of its clips as arguments: `stm.open_shards(folder, **encoder.geometry)`."""
        a = self.architecture
        return ClipSizes(frames=a.frames, image_size=a.image_size, patch_size=a.patch_size, tubelet=a.tubelet)

    @torch.no_grad()
    def forward(self, video: Tensor, kept: Tensor | None = None) -> Features:
        """Compute features, without gradients.

        Args:
            video: uint8 [B, T, 3, H, W], on any device. Of frames of another size than the encoder's, the central square is
                resized, as in evaluation. Or float [B, T, 3, S, S] in [0, 1]. ImageNet's normalisation, VideoMAE's, is applied
                here.
            kept: int64 [B, K], the tokens to encode; None: all.

        Returns:
            Features on the encoder's device: of pretrained weights, the tokens after the last norm.

        Raises:
            ValueError: the clips do not have this shape.
        """
        return self._compute(self._prepare(video, kept), None if kept is None else kept.to(self._device))

    def _compute(self, video: Tensor, kept: Tensor | None) -> Features:
        tokens: Tensor = self.model(video, kept)
        return Features(tokens, tokens.mean(dim=1))

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _prepare(self, video: Tensor, kept: Tensor | None = None) -> Tensor:
        """Check clips, and crop and resize them to the encoder's size: [B, T, 3, S, S] on its device."""
        size, frames = self.architecture.image_size, self.architecture.frames
        if not isinstance(video, Tensor) or video.dim() != 5 or video.shape[2] != 3:
            found = list(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(f'clips must be a tensor [B, T, 3, H, W], such as a batch\'s "video"; got {found}')
        if video.shape[1] != frames:
            raise ValueError(
                f"the encoder takes clips of {frames} frames, and these have {video.shape[1]}; open shards with "
                f"**encoder.geometry, or load the weights with frames={video.shape[1]}"
            )
        if kept is not None:
            check_kept(kept, len(video), self.architecture.tokens)
        if (
            video.is_floating_point()
            and video.numel()
            and not -_OVERSHOOT <= video.min() <= video.max() <= 1 + _OVERSHOOT
        ):
            raise ValueError(
                f"float clips must be in [0, 1], not normalised; these are in [{video.min():.3g}, {video.max():.3g}]"
            )
        video = video.to(self._device)
        if video.shape[3:] == (size, size) and (video.dtype == torch.uint8 or video.is_floating_point()):
            return video
        if video.dtype != torch.uint8 or kept is not None:
            why = (
                "kept tokens belong to clips"
                if kept is not None
                else "only uint8 clips are resized here, others must be"
            )
            raise ValueError(
                f"these clips are {video.dtype} of {video.shape[3]} x {video.shape[4]}; {why} of {size} x {size}"
            )
        return _cut_center(video, size)

    def __repr__(self) -> str:
        a = self.architecture
        size = next((name for name, size in SIZES.items() if (size.width, size.depth) == (a.width, a.depth)), "custom")
        shape = f"{a.frames} frames of {a.image_size} x {a.image_size} pixels"
        tokens = f"{a.tokens} tokens of {a.tubelet} x {a.patch_size} x {a.patch_size}"
        network = f"{size}: width {a.width}, {a.depth} blocks, {a.heads} heads"
        return (
            f"{type(self).__name__}({network}{self._describe_head()}; clips of {shape}, {tokens}; from {self.source})"
        )

    def _describe_head(self) -> str:
        return ""


class Classifier(Encoder):
    """A fine-tuned classifier, which is an encoder, too.

    Its `tokens` are those before the encoder's last norm, which fine-tuning does not use, and `pooled` is the head's input:
    their mean after the head's own norm.
    """

    model: VideoClassifier

    def __init__(self, model: VideoClassifier, architecture: Architecture, source: str) -> None:
        super().__init__(model, architecture, source)
        self.labels = model.labels  # in the order of the classes; None: the weights do not name them

    def _compute(self, video: Tensor, kept: Tensor | None) -> Features:
        tokens = self.model.encoder(video, kept, final_norm=False)
        return Features(tokens, self.model.fc_norm(tokens.mean(dim=1)))

    @torch.no_grad()
    def probabilities(self, video: Tensor) -> Tensor:
        """Clips, as in `forward` -> the probability of each class, float32 [B, classes]."""
        return self.model(self._prepare(video)).float().softmax(dim=1)

    def _describe_head(self) -> str:
        return f"; {self.model.head.out_features} classes"


def load(weights: str | Path, *, frames: int | None = None, image_size: int | None = None) -> Encoder:
    """Load the encoder of any weights, on the CPU; those of a fine-tuned classifier are loaded as a `Classifier`.

    Examples:
        >>> encoder = stm.load("results/shapes/pretrain/text")  # doctest: +SKIP
        >>> encoder(batch["video"]).pooled  # doctest: +SKIP

    Args:
        weights: a file of stm (safetensors), an official VideoMAE `.pth`, a transformers folder, the folder of a run or of a
            fine-tuning, or a hub repository (`owner/name`), which transformers downloads.
        frames: clip length, if not that of the weights; positions are computed for it.
        image_size: side of the clips, in pixels, if not that of the weights; likewise.

    Raises:
        WeightsError: the weights cannot be read, or the sizes do not fit them.
    """
    read = zoo.read(weights)
    own = read.architecture
    architecture = replace(
        own,
        frames=own.frames if frames is None else frames,
        image_size=own.image_size if image_size is None else image_size,
    )
    _check_sizes(architecture, str(weights))
    read = adapt(read, architecture, str(weights))
    if read.kind != "classifier":
        return Encoder(build_encoder(read), architecture, str(weights))
    return Classifier(VideoClassifier(read), architecture, str(weights))


def _check_sizes(a: Architecture, source: str) -> None:
    for whole, size, part in (("frames", a.frames, a.tubelet), ("image_size", a.image_size, a.patch_size)):
        if not isinstance(size, int) or size < 1 or size % part:
            raise WeightsError(
                f"{source}: {whole}={size!r} is not a positive multiple of {part}, the size of its tokens"
            )


def _cut_center(video: Tensor, size: int) -> Tensor:
    """The central squares of clips, resized: uint8 [B, T, 3, H, W] -> uint8 [B, T, 3, size, size]."""
    box = center_crop(video.shape[4], video.shape[3])
    square = video[..., box.top : box.top + box.height, box.left : box.left + box.width].permute(0, 1, 3, 4, 2)
    sides = torch.tensor([[box.height, box.width]] * len(video), device=video.device)
    return resize_crops(square, sides, torch.zeros(len(video), dtype=torch.bool, device=video.device), size)
