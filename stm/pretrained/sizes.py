"""Estimates the cost of running third-party models from their configs and file sizes, without loading weights."""

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from stm.pretrained.local_files import ACTION_CLIP, local_model_files

# BLIP-2 with OPT-2.7b, from its parameter counts: image tower 1.0e9 weights x 257 tokens, language model 2.7e9 x 62 tokens.
HUB_IMAGE_FLOPS = 2 * 1.0e9 * 257
HUB_CAPTION_FLOPS = 2 * 2.7e9 * 62
# CLIP ViT-B/32's text tower: 12 blocks of width 512 on 77 tokens, 38 million weights.
TEXT_FLOPS = 5.9e9
# Numbers of weights in names: `7B`, `2.2B`, `256M`; of a mixture of experts also of those that each token uses: `30B-A3B`.
_WEIGHTS = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([bBmM])(?![A-Za-z0-9])")
_ACTIVE = re.compile(r"-A(\d+(?:\.\d+)?)B(?![A-Za-z0-9])")


def clip_image_flops(model: str, patches: int | None = None) -> float:
    """FLOPs per image of a CLIP image tower, for blocks and projections; a multiply-add counts as two.

    Read from the architecture's config; unknown models are counted as ViT-B/32, 8.8 GFLOP.

    Args:
        patches: patches per image, if it does not have the model's own size.
    """
    tower = clip_tower(model)
    if tower is None:
        return 8.8e9
    tokens = (tower.patches if patches is None else patches) + 1
    width = tower.width
    return float(
        tower.layers * (2 * tokens * width**2 * (4 + 2 * tower.mlp_ratio) + 4 * tokens**2 * width)
        + 2 * tokens * 3 * tower.patch**2 * width
    )


# Width and depth of timm's ViTs, by their names; the MLP of `so400m` is 3.7 times as wide, not 4 times.
_TIMM_SIZES = {"large": (1024, 24), "so400m": (1152, 27), "giantopt": (1536, 40)}


class Tower(NamedTuple):
    """The shape of a CLIP's image tower."""

    width: int
    layers: int
    patch: int  # pixels
    patches: int  # per image of the model's own size
    mlp_ratio: float

    @property
    def weights(self) -> float:
        """Approximate number of weights: those of the blocks and of the patches' projection."""
        return self.layers * self.width**2 * (4 + 2 * self.mlp_ratio) + 3 * self.patch**2 * self.width


def clip_tower(model: str) -> Tower | None:
    """Read the shape of a CLIP's image tower from its config; None for a ResNet, which none of our configs uses."""
    vision = _clip_config(model).get("vision_cfg", {})
    width, layers, patch = vision.get("width", 768), vision.get("layers", 12), vision.get("patch_size", 32)
    timm_name = str(vision.get("timm_model_name", ""))
    if match := re.search(r"patch(\d+)", timm_name):  # for example SigLIP
        patch = int(match[1])
        width, layers = next(
            (size for part, size in _TIMM_SIZES.items() if f"vit_{part}_" in timm_name), (width, layers)
        )
    if not isinstance(layers, int):  # ResNet towers have a list of stages
        return None
    return Tower(width, layers, patch, (vision.get("image_size", 224) // patch) ** 2, vision.get("mlp_ratio", 4.0))


def refused_by_dense(model: str) -> str | None:
    """Return the kind of a CLIP's image tower, from its config, if `similarity.method: dense` does not take it; else None."""
    vision = _clip_config(model).get("vision_cfg", {})
    if timm_name := vision.get("timm_model_name"):
        pooled_by_head = "siglip" in timm_name and vision.get("timm_pool") == "map"
        return None if pooled_by_head else "a timm tower without SigLIP's pooling head"
    if not isinstance(vision.get("layers", 12), int):
        return "a ResNet"
    return "a ViT with an attention pooler" if vision.get("attentional_pool") else None


def clip_width(model: str) -> int:
    """Embedding width of a CLIP; 512 for unknown models."""
    return int(_clip_config(model).get("embed_dim", 512))


def _clip_config(model: str) -> dict[str, Any]:
    """The architecture's config; empty if unknown."""
    for path in local_model_files(model):
        if path.endswith("open_clip_config.json"):
            return dict(json.loads(Path(path).read_text())["model_cfg"])
    if model.startswith(("local-dir:", "hf-hub:")):
        return {}
    # Costs are estimated before any weights are there: STM's ActionCLIP is a ViT-B/16.
    return _read_open_clip("ViT-B-16" if model.startswith(ACTION_CLIP) else model.partition("@")[0])


@cache
def _read_open_clip(architecture: str) -> dict[str, Any]:
    """Read open_clip's own file of an architecture, because a dry run must not wait for its import, and torch's."""
    package = find_spec("open_clip")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder) / "model_configs" / f"{architecture}.json"
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def count_weights(model: str) -> float:
    """Number of weights: of a local model from file sizes at two bytes per weight; of a hub model by its name, such as `7B`."""
    return weights_and_basis(model)[0]


def weights_and_basis(model: str) -> tuple[float, str]:
    """Return the number of a model's weights, and how it is known; 7e9 (assumed) if it is not."""
    sizes = [Path(path).stat().st_size for path in local_model_files(model) if path.endswith(".safetensors")]
    if sizes:
        return sum(sizes) / 2, "by the size of its files"
    named = _WEIGHTS.search(model)
    if named:
        return float(named[1]) * (1e9 if named[2] in "bB" else 1e6), "by its name"
    return 7e9, "assumed"


class VisionFamily(NamedTuple):
    """How vision-language models of a family see a frame."""

    name: str  # part of the model's name, or of `model_type` in its config.json, in lower case
    tokens: float  # of the language model, per frame; 0: one per `token_pixels`
    patches: float  # of the image tower, per token
    weights: float  # of the image tower
    token_pixels: int = 0
    joined: int = 1  # frames of a video that share tokens
    least_pixels: int = 0  # of a video's frame: smaller frames are enlarged


# From the models' papers and the defaults of their processors in transformers; not measured. Cut-outs of large images, which some
# processors add, are not counted.
VISION_FAMILIES = (
    VisionFamily("qwen3", 0, 4, 0.5e9, 32 * 32, joined=2),
    VisionFamily("qwen", 0, 4, 0.67e9, 28 * 28, joined=2, least_pixels=128 * 28 * 28),
    VisionFamily("smolvlm", 81, 9, 0.43e9),
    VisionFamily("internvl", 256, 4, 0.3e9),
    VisionFamily("gemma", 256, 16, 0.42e9),
    VisionFamily("", 256, 4, 0.43e9),  # any other
)
_ONEVISION = {True: VisionFamily("onevision", 196, 3.7, 0.43e9), False: VisionFamily("onevision", 730, 1, 0.43e9)}


def vision_family(model: str, as_video: bool) -> VisionFamily:
    """Return the family of a vision-language model, by the `model_type` of a local folder or else by its name."""
    kinds = [
        json.loads(Path(path).read_text()) for path in local_model_files(model) if Path(path).name == "config.json"
    ]
    name = str(kinds[0].get("model_type", "") if kinds else model).lower().replace("_", "")
    if "onevision" in name:
        return _ONEVISION[as_video]
    return next(family for family in VISION_FAMILIES if family.name in name)


def frame_tokens(model: str, pixels: float, as_video: bool) -> float:
    """Return the tokens of a frame in a vision-language model.

    Args:
        pixels: of a stored frame.
        as_video: whether frames are shown as a video, of which some models join neighbouring frames.
    """
    family = vision_family(model, as_video)
    tokens = family.tokens or max(pixels, family.least_pixels if as_video else 0) / family.token_pixels
    return tokens / (family.joined if as_video else 1)


def answer_flops(model: str, frames: float, pixels: float, as_video: bool, new_tokens: int) -> float:
    """FLOPs of one answer of a vision-language model, with about 40 tokens of a prompt; for other arguments see `frame_tokens`.

    Args:
        frames: shown per answer.
        new_tokens: of the answer, at most.
    """
    active = _ACTIVE.search(model)  # of a mixture of experts
    weights = float(active[1]) * 1e9 if active else count_weights(model)
    family, tokens = vision_family(model, as_video), frames * frame_tokens(model, pixels, as_video)
    return 2 * family.weights * tokens * family.patches + 2 * weights * (tokens + 40 + new_tokens)


def caption_flops(model: str, beams: int = 1) -> float:
    """FLOPs per image caption with BLIP-2; each beam passes through the language model."""
    if not local_model_files(model):
        return HUB_IMAGE_FLOPS + beams * HUB_CAPTION_FLOPS
    # Each weight is used once for each of about 64 tokens: BLIP-2's 32 image queries and the words. Which weights are the
    # language model's is unknown, so that all are counted per beam.
    return beams * 2 * count_weights(model) * 64
