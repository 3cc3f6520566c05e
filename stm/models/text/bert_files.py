"""Reading a transformers BERT: its config, its weights, and their names in `SplitBert`."""

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
    """A copy for an encoder, with torch's attention, which takes boolean masks."""
    config = deepcopy(config)
    config.is_decoder = config.add_cross_attention = False
    config._attn_implementation = "sdpa"
    return config


def read_config(source: ModelSource) -> BertConfig:
    """The config of a BERT.

    Raises:
        ModelError: it cannot be loaded, or belongs to another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(**source.arguments)
    except (OSError, ValueError, KeyError) as error:
        raise explain_missing(source, error) from error
    if not isinstance(config, BertConfig) or config.model_type != "bert":
        raise ModelError(
            f"language.model {source.name!r} is a {config.model_type} model, not a BERT; bert-base-uncased is one"
        )
    return plain_config(config)


def read_bert(source: ModelSource, config: BertConfig) -> tuple[BertForMaskedLM, str | None]:
    """The whole BERT and the hub's commit, through transformers, which knows older names of weights.

    The masked language modelling head is freshly initialised where the files have none.

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
    # The head's decoder is tied to the embeddings and the bias, so files need not hold it. The head itself may be missing as a
    # whole (BertModel's files); a part of it may not.
    missing = {name for name in report["missing_keys"] if ".decoder." not in name}
    head = {name for name in model.state_dict() if name.startswith("cls.predictions.") and ".decoder." not in name}
    lacking = sorted(missing - head if head <= missing else missing)
    if lacking:
        raise ModelError(
            f"model {source.name!r} is not a complete BERT: {len(lacking)} weights are missing, for instance {lacking[0]}"
        )
    return model, getattr(model.config, "_commit_hash", None)


def rename(state: Mapping[str, Tensor], fusion_layer: int) -> dict[str, Tensor]:
    """A state dict of BertForMaskedLM under the names of `stm.models.text.split_bert.SplitBert`."""
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
