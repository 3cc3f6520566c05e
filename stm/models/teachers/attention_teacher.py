"""Frozen image models that look at a clip's frames for the student: which patches matter (UMT).

UMT masks by the attention of a frozen CLIP: of each frame the last block's attention weights from the class token to
the patches, averaged over heads. They are computed in the training step, on the augmented pixels themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stm.config import Teacher
from stm.data.guides.crop import overlap_matrix
from stm.models.teachers.frozen import FrozenTeacher
from stm.models.teachers.open_clip import check_tower, resize_tower
from stm.models.vit import Architecture
from stm.pretrained.clip import load_clip
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD


class AttentionTeacher(FrozenTeacher):
    """A frozen CLIP image tower that says how much it attends to each of the student's tokens.

    It never trains and stays in evaluation mode. It computes in the precision of its weights, or in that of the
    autocast around it; the result is float32.
    """

    rows: Tensor

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
        tower = check_tower(model)
        super().__init__(tower.patch_size[0], side, image_size, mean, deviation)
        self.model, self.tubelet = tower, tubelet
        resize_tower(tower, self.cells)
        # Share of each of its patches in each of the student's tokens, along one axis.
        self.register_buffer("rows", torch.tensor(overlap_matrix(0, 1, 1, self.cells, side)), persistent=False)
        self.freeze()

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

    def attend(self, pixels: Tensor) -> Tensor:
        """Attention of the last block from the class token to the patches: float32 [F, patches]."""
        block = self.model.transformer.resblocks[-1]
        before = self.model.forward_intermediates(
            pixels.to(self.model.conv1.weight.dtype),
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
