"""Reads the published checkpoints of UMT's second stage and of STM whole, for evaluation without training.

A checkpoint has a state dict under "model":

- "vision_encoder.encoder.*": the video encoder, with VideoMAE's names; "vision_encoder.pool_norm.*";
- "text_encoder.*": a BERT, of which the last layers have "crossattention.*" (fusion layers). In pretraining it is a
  BertForMaskedLM ("text_encoder.bert.*", "text_encoder.cls.*"), after fine-tuning a BertModel without these prefixes;
- "vision_proj.*", "text_proj.*", "itm_head.*", "temp": the heads, which models fine-tuned on questions lack;
- "text_decoder.*": the decoder of answers, a BertLMHeadModel, which only those models have.

Every tensor is used, or belongs to training and is named, or is an error.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stm.models.sizes import heads_of_width
from stm.models.text.bert_files import rename
from stm.models.vit import Architecture
from stm.models.weights.checks import Weights, WeightsError, adapt, raise_differences
from stm.models.weights.initialise import pick_encoder
from stm.models.weights.videomae import find_state, load_checkpoint, parse_checkpoint

# Our names for those outside the encoder and the text models.
RELEASE_NAMES = {
    "vision_encoder.pool_norm.": "pool_norm.",
    "vision_proj.": "video_projection.",
    "text_proj.": "text_projection.",
    "itm_head.": "matching_head.",
    "temp": "temperature",
}
# Used only in training: the teachers and decoders of both, and STM's mask.
_TRAINING = (
    "clip_teacher",
    "fusion_model",
    "lambda_param_tp",
    "tau",
    "temp_attn",
    "temp_fc",
    "temp_ln",
    "vision_encoder.clip_decoder",
    "vision_encoder.clip_decoder_invis",
)
_POSITION_NUMBERS = "embeddings.position_ids"  # 0, 1, 2, ..., which old versions of transformers saved
_TIED = {"decoder.weight": "embeddings.word_embeddings.weight", "decoder.bias": "predictions.bias"}


class Release(NamedTuple):
    """A checkpoint under our names, in float32."""

    encoder: Weights
    language: dict[str, Tensor]  # names as in `VideoLanguageModel.language_state`; parts may be absent
    decoder: dict[str, Tensor]  # names as in `TextDecoder.weights`; empty if there is none
    unused: tuple[str, ...]  # the parts that only training uses, sorted


def read_release(path: Path, architecture: Architecture, fusion_layer: int) -> Release:
    """Read a checkpoint of UMT's second stage or of STM, pretrained or fine-tuned.

    Args:
        architecture: that of the run; its clip length and image size may differ from the checkpoint's.
        fusion_layer: number of text-only layers of the BERT.

    Raises:
        WeightsError: the file cannot be read, its encoder has a different architecture, or a tensor is unknown.
    """
    state, _ = find_state(load_checkpoint(path))
    inside, rest = pick_encoder(state, path)
    known = replace(architecture, heads=heads_of_width(architecture.width) or architecture.heads)
    encoder = adapt(parse_checkpoint({"model": inside}, path, known), architecture, str(path))
    language: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    decoder: dict[str, Tensor] = {}
    unused, unknown = set[str](), list[str]()
    for name in rest:
        part = _training_part(name)
        if part is not None:
            unused.add(part)
        elif name.startswith("text_encoder."):
            text[name.removeprefix("text_encoder.")] = state[name]
        elif name.startswith("text_decoder."):
            decoder[name.removeprefix("text_decoder.")] = state[name]
        elif (ours := _own_name(name)) is not None:
            language[ours] = state[name]
        else:
            unknown.append(name)
    raise_differences(
        {"not expected": sorted(unknown)}, f"{path} is read as a checkpoint of UMT's second stage or of STM"
    )
    untied, tied = _without_copies(text, path), _without_copies(decoder, path)
    language |= {f"language.{name}": tensor for name, tensor in rename(untied, fusion_layer).items()}
    return Release(encoder, _to_float(language), _to_float(tied), tuple(sorted(unused)))


def _training_part(name: str) -> str | None:
    """The entry of `_TRAINING` that a name belongs to, if any."""
    return next((part for part in _TRAINING if name == part or name.startswith(f"{part}.")), None)


def _own_name(name: str) -> str | None:
    for theirs, ours in RELEASE_NAMES.items():
        if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
            return ours + name.removeprefix(theirs)
    return None


def _without_copies(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Drop what a BERT's other tensors determine: the numbers of the positions, and tensors tied to others.

    Raises:
        WeightsError: a tensor that is tied in BERT has different values here.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_POSITION_NUMBERS)}
    for copy, original in _TIED.items():
        for name in [name for name in kept if name.endswith(f"predictions.{copy}")]:
            source = next((other for other in kept if other.endswith(original)), None)
            if source is None or not _is_equal(kept[name], kept[source]):
                raise WeightsError(f"{path}: {name} is not the same as the {original} that BERT ties it to")
            del kept[name]
    return kept


def _is_equal(copy: Any, original: Any) -> bool:
    return isinstance(copy, Tensor) and isinstance(original, Tensor) and torch.equal(copy, original)


def _to_float(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.float() if isinstance(tensor, Tensor) else tensor for name, tensor in state.items()}
