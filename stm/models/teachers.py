"""Frozen image models that look at a clip's frames for the student: which patches matter (UMT).

UMT masks by the attention of a frozen CLIP: of each frame the last block's attention weights from the class token to
the patches, averaged over heads. They are computed in the training step, on the augmented pixels themselves.
"""

from collections.abc import Sequence

import torch
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from stm.config import Teacher
from stm.data.guides import overlap_matrix
from stm.data.pixels import IMAGENET_MEAN, IMAGENET_STD, to_unit
from stm.models.vit import Architecture
from stm.preprocess.clip_model import load_clip
from stm.preprocess.pretrained import ModelError


class AttentionTeacher(nn.Module):
    """A frozen CLIP image tower that says how much it attends to each of the student's tokens.

    It never trains and stays in evaluation mode. It computes in the precision of its weights, or in that of the
    autocast around it; the result is float32.
    """

    mean: Tensor
    deviation: Tensor
    rows: Tensor
    identity: dict[str, str] | None = None  # for receipts: the model and the hash of its weights, where it was loaded

    def __init__(
        self,
        model: nn.Module,
        side: int,
        tubelet: int,
        image_size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        deviation: Sequence[float] = IMAGENET_STD,
    ) -> None:
        """
        Args:
            model: open_clip's image tower. It is taken over: frozen, its position embedding resized to `image_size`.
            side: the student's tokens on a side of a slot.
            tubelet: frames in a slot.
            image_size: side its frames are resized to, in pixels; by default `side` of its own patches, so that each
                of them is a token.
            mean, deviation: what is taken off the pixels, in [0, 1]. The default is UMT's: its release gives the
                CLIP the student's pixels with ImageNet's statistics, not those that CLIP was trained with.

        Raises:
            ModelError: the model has no class token that it reads, or the size is no whole number of its patches.
        """
        super().__init__()
        self.model, self.tubelet = _check_tower(model), tubelet
        patch = self.model.patch_size[0]
        self.image_size = image_size or side * patch
        if self.image_size % patch:
            raise ModelError(f"teacher.image_size {self.image_size} is not a multiple of its patches' {patch} pixels")
        cells = self.image_size // patch
        _resize_positions(self.model, cells)
        self.requires_grad_(False)
        self.train(False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)
        # Share of each of its patches in each of the student's tokens, along one axis.
        self.register_buffer("rows", torch.tensor(overlap_matrix(0, 1, 1, cells, side)), persistent=False)

    @classmethod
    def load(cls, settings: Teacher, architecture: Architecture) -> "AttentionTeacher":
        """The teacher that a run's settings name, on the CPU, for a student of that architecture.

        Raises:
            ModelError: it cannot be loaded or used; the message says why.
        """
        clip = load_clip(settings.model, device="cpu", setting="teacher.model")
        side = architecture.image_size // architecture.patch_size
        own = settings.normalisation == "own"
        mean, deviation = (clip.mean, clip.std) if own else (IMAGENET_MEAN, IMAGENET_STD)
        teacher = cls(clip.model.visual, side, architecture.tubelet, settings.image_size, mean, deviation)
        teacher.identity = clip.identity
        return teacher

    def train(self, mode: bool = True) -> "AttentionTeacher":
        """Stays in evaluation mode, whatever the method around it does."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """The guide "attention" of clips.

        Args:
            video: uint8 [B, T, 3, S, S], T a multiple of the tubelet.

        Returns:
            float32 [B, slots, N]: mean over the tubelet's frames (our inference; UMT's slots are frames) of the last
            block's attention from the class token, averaged over heads. Not negative; a frame's sum is at most 1, as
            the class token attends to itself as well.
        """
        attention = self.attend(self.prepare(video.flatten(0, 1)))  # [frames, cells^2]
        cells = self.rows.shape[1]
        if cells != self.rows.shape[0]:
            attention = (self.rows @ attention.unflatten(1, (cells, cells)) @ self.rows.T).flatten(1)
        return attention.unflatten(0, (-1, self.tubelet)).mean(dim=1).unflatten(0, (video.shape[0], -1))

    def prepare(self, frames: Tensor) -> Tensor:
        """Its input: uint8 frames [F, 3, S, S] -> [F, 3, image_size, image_size], normalised."""
        pixels = (to_unit(frames) - self.mean) / self.deviation
        if pixels.shape[-1] != self.image_size:  # as UMT resizes: bicubic, without antialiasing
            size = (self.image_size, self.image_size)
            pixels = functional.interpolate(pixels, size, mode="bicubic", align_corners=False)
        return pixels.to(self.model.conv1.weight.dtype)

    def attend(self, pixels: Tensor) -> Tensor:
        """Attention of the last block from the class token to the patches: float32 [F, patches]."""
        block = self.model.transformer.resblocks[-1]
        before = self.model.forward_intermediates(
            pixels,
            indices=[len(self.model.transformer.resblocks) - 2],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens = torch.cat([before["image_intermediates_prefix"][0], before["image_intermediates"][0]], dim=1)
        tokens = block.ln_1(tokens)
        # One query, the class token: the weights are those of the whole block at a fraction of its cost.
        weights = block.attn(tokens[:, :1], tokens, tokens, need_weights=True, average_attn_weights=True)[1]
        return weights[:, 0, 1:].float()


def _check_tower(model: nn.Module) -> VisionTransformer:
    """The model, if its last block's class token is what its embedding is read from."""
    advice = "take a CLIP with a class token, ViT-B-16-quickgelu@openai for instance"
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"teacher.model has no open_clip ViT image tower but a {type(model).__name__}; {advice}")
    if model.attn_pool is not None or model.pool_type != "tok":
        pooling = "an attention pooler" if model.attn_pool is not None else f"{model.pool_type!r} pooling"
        raise ModelError(
            f"teacher.model is read by {pooling}, not by a class token, which attends to nothing; {advice}"
        )
    blocks = model.transformer.resblocks
    if len(blocks) < 2 or not isinstance(getattr(blocks[-1], "attn", None), nn.MultiheadAttention):
        raise ModelError(f"teacher.model has no plain attention in its last block, or one block only; {advice}")
    return model


def _resize_positions(model: VisionTransformer, cells: int) -> None:
    """Interpolates the position embedding to `cells` x `cells` patches, as open_clip does at loading."""
    # timm leaves it alone when the number of patches is right, as open_clip does.
    resized = resample_abs_pos_embed(model.positional_embedding[None].detach(), [cells, cells], list(model.grid_size))
    model.positional_embedding = nn.Parameter(resized[0], requires_grad=False)
    model.grid_size = (cells, cells)
    model.image_size = tuple(cells * side for side in model.patch_size)
