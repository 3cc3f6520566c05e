"""Checkpoints with random weights in the formats of the published ones: VideoMAE and UMT, ActionCLIP, RAFT."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stm.config import Language, LanguageRun, Run
from stm.models.vit import Architecture, VideoEncoder
from stm.models.weights import zoo
from stm.models.weights.checks import Weights, gather_weights, outline
from stm.models.weights.safetensors import write_own
from stm.models.weights.transformers import write_transformers
from stm.models.weights.videomae import to_official
from stm.rehearsal.copies.choose import CLASSES
from stm.rehearsal.shrink import LAYERS, WIDTH
from stm.storage.files import write_bytes

_CHECKPOINTS = (".pth", ".pt", ".bin", ".ckpt")
_CLIP_FRAMES = 77  # rows of ActionCLIP's table of frame positions: CLIP's context length
_PATCH = 16


def write_initial(path: Path, run: Run) -> None:
    """Write weights that a run can start from, in the format of the path: a checkpoint, safetensors, or a folder."""
    torch.manual_seed(0)
    weights = gather_weights(VideoEncoder(zoo.describe(run)))
    if path.suffix in _CHECKPOINTS:
        _save(path, {"model": to_official(weights)})
    elif path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_own(weights, path)
    else:
        write_transformers(weights, path)


def write_release(path: Path, run: Run, folder: Path) -> None:
    """Write published weights of a run: a classifier, or a video-language model of UMT's second stage or STM.

    Args:
        folder: to which the path of the run's BERT is relative; it must have been written.
    """
    torch.manual_seed(0)
    if isinstance(run, LanguageRun) and run.language is not None:
        language = run.language.model_copy(update={"model": str(folder / run.language.model)})
        _save(path, {"model": _language_release(zoo.describe(run), language)})
        return
    weights = _fill(zoo.describe(run), CLASSES)
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_own(weights, path)
    else:
        _save(path, {"model": to_official(weights)})


def write_action_clip(path: Path) -> None:
    """Write an ActionCLIP checkpoint: CLIP's image tower with OpenAI's names, and the transformer over frames."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    from stm.models.teachers.action_clip import HEAD_WIDTH, NEST
    from stm.models.teachers.temporal_fusion import NEST as FUSION_NEST
    from stm.models.teachers.temporal_fusion import TemporalFusion

    torch.manual_seed(0)
    width = 2 * HEAD_WIDTH
    tower = VisionTransformer(2 * _PATCH, _PATCH, width, LAYERS, 2, 4.0, output_dim=WIDTH, act_layer=QuickGELU)
    fusion = TemporalFusion(WIDTH, _CLIP_FRAMES, layers=2)
    content = {
        NEST: {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()},
        FUSION_NEST: {f"module.{name}": tensor for name, tensor in fusion.state_dict().items()},
    }
    _save(path, content)


def write_raft(path: Path) -> None:
    """Write torchvision's RAFT-small with random weights."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    state = raft_small(weights=None).state_dict()
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, path)
    else:
        _save(path, state)


def _fill(architecture: Architecture, classes: int) -> Weights:
    """A classifier with small random weights, and ones for its norms."""
    blank = outline(architecture, "classifier", classes)
    return Weights(architecture, {name: _draw(name, tuple(tensor.shape)) for name, tensor in blank.items()})


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    if "norm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape) * 0.02


def _language_release(architecture: Architecture, language: Language) -> dict[str, Tensor]:
    """A model under the names of UMT's second stage, with all heads and a decoder of answers."""
    from stm.models.text.decoder import TextDecoder
    from stm.models.text.split_bert import SplitBert
    from stm.models.video_language import VideoLanguageModel

    encoder = VideoEncoder(architecture)
    model = VideoLanguageModel(encoder, SplitBert.blank(language), language.embedding)
    state = {f"vision_encoder.{name}": tensor for name, tensor in to_official(gather_weights(encoder)).items()}
    for name, tensor in model.language_state().items():
        state[_release_name(name, language.fusion_layer)] = tensor.detach().clone()
    for name, tensor in TextDecoder.of(model.language).weights().items():
        state[f"text_decoder.{name}"] = tensor.detach().clone()
    return state


def _release_name(name: str, fusion_layer: int) -> str:
    """The name that UMT's second stage gives to one of our tensors outside the encoder."""
    from stm.models.weights.released import RELEASE_NAMES  # imports transformers

    for theirs, ours in RELEASE_NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    name = name.removeprefix("language.")
    for ours, theirs in (("transform.", "cls.predictions.transform."), ("word_bias", "cls.predictions.bias")):
        if name.startswith(ours):
            return f"text_encoder.{theirs}{name.removeprefix(ours)}"
    for part, first in (("text_layers.", 0), ("fusion_layers.", fusion_layer)):
        if name.startswith(part):
            number, _, inner = name.removeprefix(part).partition(".")
            return f"text_encoder.bert.encoder.layer.{first + int(number)}.{inner}"
    return f"text_encoder.bert.{name}"


def _save(path: Path, content: Any) -> None:
    buffer = io.BytesIO()  # torch.save would write a file's name into its content
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
