"""Reads a BERT from transformers: its config and its weights, renamed for `SplitBert`."""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, BertConfig, BertForMaskedLM

from stm.pretrained.hub import ModelError, ModelSource, explain_missing


def plain_config(config: BertConfig) -> BertConfig:
    """Copy a config for an encoder with torch's attention, which accepts boolean masks."""
    config = deepcopy(config)
    config.is_decoder = config.add_cross_attention = False
    config._attn_implementation = "sdpa"
    return config


def read_config(source: ModelSource) -> BertConfig:
    """Load the config of a BERT.

    Raises:
        ModelError: it cannot be loaded, or is of a different model type.
    """
    try:
        config = AutoConfig.from_pretrained(**source.arguments)
    except (OSError, ValueError, KeyError) as error:
        raise explain_missing(source, error) from error
    if not isinstance(config, BertConfig) or config.model_type != "bert":
        raise ModelError(
            f"language.model {source.name!r} is a {config.model_type} model, not a BERT; for example, use bert-base-uncased"
        )
    return plain_config(config)


def read_bert(source: ModelSource, config: BertConfig) -> tuple[BertForMaskedLM, str | None]:
    """Load the whole BERT with transformers, which recognises older weight names; also return its commit on the hub.

    The masked language modelling head is newly initialised if the files have none.

    Raises:
        ModelError: safetensors or weights are missing.
    """
    try:
        loaded: Any = BertForMaskedLM.from_pretrained(
            **source.arguments, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise explain_missing(source, error) from error
    model, report = loaded
    # The head's decoder is tied to the embeddings and the bias, so files may omit it. The head may be missing entirely
    # (BertModel's files), but not partly.
    missing = {name for name in report["missing_keys"] if ".decoder." not in name}
    head = {name for name in model.state_dict() if name.startswith("cls.predictions.") and ".decoder." not in name}
    lacking = sorted(missing - head if head <= missing else missing)
    if lacking:
        raise ModelError(
            f"model {source.name!r} is not a complete BERT: {len(lacking)} weights are missing, for instance {lacking[0]}"
        )
    return model, getattr(model.config, "_commit_hash", None)


def rename(state: Mapping[str, Tensor], fusion_layer: int) -> dict[str, Tensor]:
    """Rename a state dict of BertForMaskedLM for `stm.models.text.split_bert.SplitBert`."""
    renamed = {}
    for theirs, tensor in state.items():
        name = theirs.removeprefix("bert.").replace("cls.predictions.transform.", "transform.")
        name = re.sub(r"^cls\.predictions\.bias$", "word_bias", name)
        if layer := re.match(r"encoder\.layer\.(\d+)\.", name):
            number = int(layer[1])
            part, place = ("text", number) if number < fusion_layer else ("fusion", number - fusion_layer)
            name = f"{part}_layers.{place}.{name[layer.end() :]}"
        if not name.startswith("cls.predictions.decoder."):  # tied to the embeddings and the bias
            renamed[name] = tensor
    return renamed
