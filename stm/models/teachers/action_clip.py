"""ActionCLIP's image tower, from the checkpoint that also contains its temporal transformer: the teacher of STM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor

from stm.models.teachers.open_clip import make_tower
from stm.models.teachers.temporal_fusion import read_state
from stm.models.teachers.tower import LoadedTower
from stm.models.weights.checks import WeightsError, check_tensors
from stm.pretrained.hub import ModelError
from stm.pretrained.local_files import ACTION_CLIP
from stm.storage.files import sha256_file

NEST = "model_state_dict"  # the key of the CLIP in ActionCLIP's checkpoints
HEAD_WIDTH = 64  # CLIP's
_STEM = "visual.conv1.weight"


def load_action_clip(name: str) -> LoadedTower:
    """Load the image tower of an ActionCLIP checkpoint, on the CPU, in float32.

    Args:
        name: the file: a checkpoint (.pt, .pth) or its tensors as safetensors, relative to the working directory.

    Raises:
        ModelError: the file cannot be read, is not safe to load, or contains no such tower.
    """
    path = Path(name).expanduser()
    try:
        visual = build_visual(read_state(path, NEST), path)
    except WeightsError as error:
        raise ModelError(f"teacher.model: {error}") from error
    identity: dict[str, str | None] = {"model": f"{ACTION_CLIP}{path.name}", "weights_sha256": sha256_file(path)}
    return LoadedTower(make_tower(visual), identity, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def build_visual(state: Mapping[str, Any], path: Path) -> VisionTransformer:
    """Build CLIP's image tower from its tensors, `visual.*`; all sizes follow from their shapes.

    Raises:
        WeightsError: there is no ViT under `visual`, or its tensors do not match; the message names `path`.
    """
    start = next((name.removesuffix(_STEM) for name in map(str, state) if name.endswith(_STEM)), "")
    prefix = f"{start}visual."
    own = {str(name).removeprefix(prefix): value for name, value in state.items() if str(name).startswith(prefix)}
    kernel, table, proj = (own.get(name) for name in ("conv1.weight", "positional_embedding", "proj"))
    hidden = own.get("transformer.resblocks.0.mlp.c_fc.weight")
    tensors = [value for value in (kernel, table, proj, hidden) if isinstance(value, Tensor)]
    if [tensor.dim() for tensor in tensors] != [4, 2, 2, 2]:
        listed = ", ".join(sorted(map(str, state))[:5]) or "nothing"
        raise WeightsError(
            f"{path}: holds no image tower of ActionCLIP: visual.conv1.weight, visual.positional_embedding, visual.proj and "
            f"visual.transformer.resblocks are expected, and it has {listed}, …. ResNets are not supported"
        )
    kernel, table, proj, hidden = tensors
    width, patch = kernel.shape[0], kernel.shape[-1]
    with torch.device("meta"):
        visual = VisionTransformer(
            image_size=round((len(table) - 1) ** 0.5) * patch,
            patch_size=patch,
            width=width,
            layers=len({name.split(".")[2] for name in own if name.startswith("transformer.resblocks.")}),
            heads=max(1, width // HEAD_WIDTH),
            mlp_ratio=len(hidden) / width,
            output_dim=proj.shape[-1],
            act_layer=QuickGELU,
        )
    check_tensors(own, visual.state_dict(), f"{path} has an image tower of ActionCLIP")
    visual.load_state_dict({name: tensor.float() for name, tensor in own.items()}, assign=True)
    return visual
