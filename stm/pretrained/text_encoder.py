"""Frozen text encoders: open_clip's text towers, or any text encoder from transformers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import MODEL_MAPPING, AutoConfig, AutoTokenizer, CLIPTextModelWithProjection

from stm.config import Text
from stm.distributed.process import choose_device
from stm.pretrained.clip import embed_texts, load_clip
from stm.pretrained.hub import PRECISIONS, ModelError, explain_missing, find_model, load_complete

TRANSFORMERS = "transformers:"
_UNKNOWN = 10**6  # tokens; tokenizers without a known maximum length report 1e30


class TextEncoder(ABC):
    """A text encoder with its tokenizer; `TextEncoder.load` loads the one that a config names."""

    identity: dict[str, str | None]  # for receipts

    @staticmethod
    def load(settings: Text, device: str | None = None) -> "TextEncoder":
        """Load the encoder of `settings.model`.

        Args:
            device: by default CUDA where available.

        Raises:
            ModelError: the model cannot be loaded, is not a text encoder, or does not support `settings.pooling`.
        """
        kind = TransformersText if settings.model.startswith(TRANSFORMERS) else ClipText
        return kind(settings, device)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return one unit vector per text, float32 [n, D]; texts longer than the model's context are truncated.

        Raises:
            ModelError: a vector is not finite, which can happen in half precision.
        """
        if not texts:
            return self.encode(["nothing"])[:0]  # to get the width, which only the model knows
        vectors = self._encode(list(texts))
        if not np.isfinite(vectors).all():
            raise ModelError(f"{self.identity['model']}: vectors are not finite; set text.precision to float32")
        return vectors

    @abstractmethod
    def _encode(self, texts: list[str]) -> np.ndarray: ...


class ClipText(TextEncoder):
    """An open_clip model's text tower."""

    def __init__(self, settings: Text, device: str | None) -> None:
        if settings.pooling != "projected":
            raise ModelError(
                f"text.pooling {settings.pooling!r} is for `{TRANSFORMERS}` models; an open_clip text tower such as "
                f"{settings.model!r} only has `projected`"
            )
        self._clip = load_clip(settings.model, device=device, setting="text.model")
        # Converts the whole model, since `load_clip` keeps the text tower in float32.
        self._clip.model.to(PRECISIONS[settings.precision])
        self._batch_size = settings.batch_size
        self.identity = dict(self._clip.identity)

    def _encode(self, texts: list[str]) -> np.ndarray:
        return embed_texts(self._clip, texts, self._batch_size)


class TransformersText(TextEncoder):
    """A transformers text encoder, from the hub or a local folder."""

    def __init__(self, settings: Text, device: str | None) -> None:
        self._settings = settings
        self._device = choose_device(device)
        source = find_model(settings.model.removeprefix(TRANSFORMERS))
        try:
            config = AutoConfig.from_pretrained(**source.arguments)
            self._tokenizer = AutoTokenizer.from_pretrained(**source.arguments)
        except (OSError, ValueError, KeyError) as error:
            raise explain_missing(source, error) from error
        model_class, arguments = _choose_class(settings, config)
        model = load_complete(model_class, source, settings.precision, self._device, **arguments)
        # For encoder-decoder models such as T5, only the encoder is used.
        self._model = model.get_encoder() if config.is_encoder_decoder else model
        self._tokenizer.padding_side = "right"  # so that the first token is never padding
        if self._tokenizer.pad_token is None:  # padding is masked, so any token works
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        self._longest = _context(self._tokenizer.model_max_length, config)
        identity = source.identify(getattr(model.config, "_commit_hash", None))
        self.identity = identity | {"model": f"{TRANSFORMERS}{source.label}"}

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> np.ndarray:
        size = self._settings.batch_size
        parts = [self._embed(texts[start : start + size]) for start in range(0, len(texts), size)]
        return np.concatenate([functional.normalize(part.float(), dim=-1).cpu().numpy() for part in parts])

    def _embed(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        mask = tokens["attention_mask"].to(self._device)
        output = self._model(input_ids=tokens["input_ids"].to(self._device), attention_mask=mask)
        if self._settings.pooling == "projected":
            return output.text_embeds
        hidden = output.last_hidden_state.float()  # [n, tokens, D]
        if self._settings.pooling == "cls":
            return hidden[:, 0]
        share = mask[..., None].float()  # excludes padding from the mean
        return (hidden * share).sum(dim=1) / share.sum(dim=1)


def _choose_class(settings: Text, config: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model class for a pooling, and its arguments.

    Raises:
        ModelError: the model does not support this pooling.
    """
    kind = config.model_type
    if kind.startswith("siglip"):
        raise ModelError(
            f"text.model {settings.model!r}: SigLIP's text tower, which has a pooling of its own, is read by open_clip: "
            "write for instance ViT-B-16-SigLIP2@webli, or local-dir: and a folder of open_clip"
        )
    if settings.pooling == "projected":
        if kind in ("clip", "clip_text_model"):
            return CLIPTextModelWithProjection, {}
        raise ModelError(
            f"text.model {settings.model!r}: pooling `projected` is CLIP's, and this is a {kind} model; set "
            "text.pooling to `cls` or `mean`"
        )
    if hasattr(config, "vision_config") or type(config) not in MODEL_MAPPING:
        hint = "; its text tower has pooling `projected`" if kind == "clip" else ""
        raise ModelError(f"text.model {settings.model!r} is a {kind} model, not a text encoder{hint}")
    model_class: Any = MODEL_MAPPING[type(config)]
    # A pooler would be unused, and many published encoders lack its weights.
    pooler = "add_pooling_layer" in signature(model_class).parameters
    return model_class, {"add_pooling_layer": False} if pooler else {}


def _context(stated: int, config: Any) -> int:
    """Maximum text length in tokens: the tokenizer's limit or, if it has none, the model's number of positions."""
    # RoBERTa and its relatives reserve two positions for padding.
    return stated if stated < _UNKNOWN else getattr(config, "max_position_embeddings", 514) - 2
