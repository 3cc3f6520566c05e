"""Exports a trained encoder as a timm `VisionTransformer`, for timm's users and tools.

Its input is normalised clips, float [B, 3, T, S, S] (channels first, as in timm), whereas our encoder takes uint8
[B, T, 3, S, S]. Everything else is identical, since the blocks are timm's own.
"""

from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from stm.models.vit import make_positions
from stm.models.weights.checks import Weights, gather_weights


class TubeletConvolution(nn.Module):
    """A clip version of timm's `PatchEmbed`: normalised clips [B, 3, T, S, S] -> tokens [B, L, width]."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        frames: int,
        tubelet: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.patch_size = (tubelet, patch_size, patch_size)
        self.img_size = (frames, img_size, img_size)
        self.grid_size = tuple(whole // part for whole, part in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1] * self.grid_size[2]
        kernel = self.patch_size
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, stride=kernel, bias=bias, device=device, dtype=dtype)

    def forward(self, clip: Tensor) -> Tensor:
        if clip.dim() != 5 or tuple(clip.shape[2:]) != self.img_size:
            raise ValueError(f"clips must be [B, 3, {', '.join(map(str, self.img_size))}], not {list(clip.shape)}")
        return self.proj(clip).flatten(2).transpose(1, 2)


def to_timm_state(weights: Weights) -> dict[str, Tensor]:
    """The state dict for `to_timm`'s model, without the decoder.

    For a classifier, `fc_norm` replaces the final norm of the tokens.
    """
    a, classifier = weights.architecture, weights.kind == "classifier"
    state = {"pos_embed": make_positions(a, a.width)}
    for ours, tensor in weights.tensors.items():
        if ours.startswith("decoder.") or (classifier and ours.startswith("encoder.norm.")):
            continue
        theirs = ours.removeprefix("encoder.").replace("embedding.projection.", "patch_embed.proj.")
        if theirs == "patch_embed.proj.weight":
            tensor = tensor.unflatten(1, (3, a.tubelet, a.patch_size, a.patch_size))
        state[theirs] = tensor
    return state


def to_timm(model: nn.Module | Weights) -> VisionTransformer:
    """Build a timm model with the weights of a `VideoEncoder`, a `VideoMAE`, or a classifier around an encoder.

    `forward_features` returns the tokens [B, L, width], like our encoder; `model(clip)` returns their mean [B, width], or a
    classifier's logits [B, classes]. The position embedding is a frozen parameter, as in timm.
    """
    weights = model if isinstance(model, Weights) else gather_weights(model)
    a, classifier = weights.architecture, weights.kind == "classifier"
    vit = VisionTransformer(
        img_size=a.image_size,
        patch_size=a.patch_size,
        embed_dim=a.width,
        depth=a.depth,
        num_heads=a.heads,
        mlp_ratio=a.mlp_ratio,
        num_classes=weights.classes,
        class_token=False,
        global_pool="avg",
        fc_norm=classifier,
        weight_init="skip",
        norm_layer=partial(nn.LayerNorm, eps=a.norm_eps),
        embed_layer=partial(TubeletConvolution, frames=a.frames, tubelet=a.tubelet),
    )
    vit.load_state_dict(to_timm_state(weights))
    vit.get_parameter("pos_embed").requires_grad_(False)
    return vit.eval()
