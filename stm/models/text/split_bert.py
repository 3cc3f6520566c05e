"""A BERT split in two: the first layers encode only the text, the last layers also attend to the video.

In UMT's second stage, the first nine of BERT-base's twelve layers are the text encoder and the last three the cross-modal
encoder, each with cross-attention to the video tokens. All layers keep BERT's bidirectional self-attention; the
cross-attention layers are new. The masked language modelling head is BERT's, with its matrix tied to the word embeddings.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertPredictionHeadTransform

from stm.config import Language
from stm.distributed.shares import OwnNoise
from stm.models.checkpointing import Checkpointed
from stm.models.text.bert_files import plain_config, read_bert, read_config, rename
from stm.models.text.small_bert import make_bert
from stm.models.text.tokenizer import Tokenizer, load_tokenizer
from stm.pretrained.hub import ModelError, ModelSource, find_model

__all__ = ["SplitBert", "Tokenizer", "make_bert"]

# The sizes in a BERT config, with the maximum allowed in a file: headers are untrusted.
_SIZES = {
    "vocab_size": 2**22,
    "hidden_size": 2**16,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "intermediate_size": 2**18,
    "max_position_embeddings": 2**16,
    "type_vocab_size": 2**10,
}
_OTHERS = (
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)


class SplitBert(Checkpointed, OwnNoise):
    """Text layers, fusion layers, and a masked language modelling head."""

    side = "text"

    def __init__(self, config: BertConfig, fusion_layer: int, tokenizer: Tokenizer | None = None) -> None:
        """Builds a model with BERT's random initialisation; seed torch first for reproducible weights.

        Args:
            config: a BERT config; `num_hidden_layers` counts text and fusion layers.
            fusion_layer: number of text layers.
            tokenizer: the BERT's tokenizer; required for encoding texts.

        Raises:
            ModelError: one of the two parts would have no layers, or the tokenizer's vocabulary is larger than the BERT's.
        """
        super().__init__()
        layers = config.num_hidden_layers
        if not 0 < fusion_layer < layers:
            raise ModelError(
                f"fusion_layer is {fusion_layer}, and must be between 1 and {layers - 1}: of the BERT's {layers} layers, at "
                "least one encodes the text alone and at least one attends to the video"
            )
        if tokenizer is not None and tokenizer.vocabulary > config.vocab_size:
            raise ModelError(
                f"the tokenizer has {tokenizer.vocabulary} tokens and the BERT {config.vocab_size}: they do not match"
            )
        self.config = plain_config(config)
        self.fusion_layer = fusion_layer
        self.identity: dict[str, str | None] | None = None  # for receipts: model and hash, if loaded from files
        self._tokenizer = tokenizer
        fusion = deepcopy(self.config)
        # transformers adds cross-attention to decoders only. A decoder's self-attention is causal only if no mask is
        # passed; here one always is.
        fusion.is_decoder = fusion.add_cross_attention = True
        self.embeddings = BertEmbeddings(self.config)
        self.text_layers = nn.ModuleList(BertLayer(self.config) for _ in range(fusion_layer))
        self.fusion_layers = nn.ModuleList(BertLayer(fusion) for _ in range(layers - fusion_layer))
        self.transform = BertPredictionHeadTransform(self.config)
        self.word_bias = nn.Parameter(torch.zeros(self.config.vocab_size))
        self.apply(self._initialise)

    @classmethod
    def load(cls, settings: Language) -> "SplitBert":
        """Load a pretrained BERT (BertModel, BertForMaskedLM or BertForPreTraining) and split it.

        Cross-attention layers are newly initialised with BERT's scheme, as is the masked language modelling head if the files
        have none (BertModel); seed torch first for reproducible weights.

        Raises:
            ModelError: the model cannot be loaded, is not a BERT, lacks weights or a tokenizer, or is incompatible with
                `fusion_layer` or `max_tokens`.
        """
        source = find_model(settings.model)
        model = cls.blank(settings, source)
        peer, commit = read_bert(source, model.config)
        # Not strict, because a plain BERT has no cross-attention. The assertion ensures that nothing else is skipped.
        result = model.load_state_dict(rename(peer.state_dict(), settings.fusion_layer), strict=False)
        assert not result.unexpected_keys and all(".crossattention." in name for name in result.missing_keys)
        model.identity = source.identify(commit)
        return model

    @classmethod
    def blank(cls, settings: Language, source: ModelSource | None = None) -> "SplitBert":
        """Build the model of `load` from the BERT's config and tokenizer alone, with randomly initialised weights.

        Args:
            source: where the files are; by default found from `settings.model`.

        Raises:
            ModelError: see `load`.
        """
        source = source or find_model(settings.model)
        config = read_config(source)
        if settings.max_tokens > config.max_position_embeddings:
            raise ModelError(
                f"language.max_tokens {settings.max_tokens}: {settings.model!r} reads at most "
                f"{config.max_position_embeddings} tokens"
            )
        tokenizer = load_tokenizer(source, settings.tokenization)
        return cls(config, settings.fusion_layer, tokenizer)

    @classmethod
    def rebuild(cls, values: Mapping[str, Any]) -> "SplitBert":
        """Build a randomly initialised model from the values of `describe`.

        Raises:
            ModelError: the values are not a valid BERT description.
        """
        try:
            bert, fusion_layer, tokenizer = values["bert"], values["fusion_layer"], values["tokenizer"]
            # Checked before allocating anything of these sizes.
            sizes = {name: (bert[name], most) for name, most in _SIZES.items()}
            wrong = [name for name, (size, most) in sizes.items() if not (isinstance(size, int) and 0 < size <= most)]
            if wrong or not isinstance(bert["hidden_act"], str):
                raise ModelError(f"invalid {(wrong or ['hidden_act'])[0]}")
            config = BertConfig(**{name: bert[name] for name in (*_SIZES, *_OTHERS)})
            return cls(config, fusion_layer, None if tokenizer is None else Tokenizer(**tokenizer))
        except ModelError:
            raise
        except Exception as error:  # transformers' config validation raises various errors
            raise ModelError(f"these values do not describe a BERT: {error!r}") from error

    def describe(self) -> dict[str, Any]:
        """Everything except weights that `rebuild` needs, as JSON values: "bert", "fusion_layer" and "tokenizer"."""
        return {
            "bert": {name: getattr(self.config, name) for name in (*_SIZES, *_OTHERS)},
            "fusion_layer": self.fusion_layer,
            "tokenizer": None if self._tokenizer is None else self._tokenizer.describe(),
        }

    def _initialise(self, module: nn.Module) -> None:
        """BERT's initialisation: normally distributed weights, zero biases; the padding embedding is zero."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises ModelError if there is none."""
        if self._tokenizer is None:
            raise ModelError("this BERT has no tokenizer")
        return self._tokenizer

    @property
    def width(self) -> int:
        """Hidden size, W."""
        return int(self.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Vocabulary size, V."""
        return int(self.config.vocab_size)

    @property
    def pad_id(self) -> int:
        """The padding token, which no other token attends to."""
        return self._tokenizer.pad_id if self._tokenizer else int(self.config.pad_token_id or 0)

    @property
    def cls_id(self) -> int:
        """The first token of a text."""
        return self.tokenizer.cls_id

    @property
    def sep_id(self) -> int:
        """The last token of a text."""
        return self.tokenizer.sep_id

    @property
    def mask_id(self) -> int:
        """The token that replaces a masked word."""
        return self.tokenizer.mask_id

    def forward(self, tokens: Tensor) -> Tensor:
        """Encodes only the text: int64 [B, X] -> [B, X, W], the output of the last text layer."""
        mask = self._mask(tokens)
        with self.own_noise(tokens.device):
            states: Tensor = self.embeddings(tokens)
            for layer in self.text_layers:
                states = self.run_block(layer, states, mask)
        return states

    def fuse(self, states: Tensor, tokens: Tensor, memory: Tensor) -> Tensor:
        """Passes the text through the fusion layers, which cross-attend to the video.

        Args:
            states: [B, X, W], the output of `forward`.
            tokens: int64 [B, X], used to find the padding.
            memory: video features [B, K, W], without padding; [1, K, W] if one video is shared by all texts.

        Returns:
            [B, X, W], the output of the last layer.
        """
        mask = self._mask(tokens)
        with self.own_noise(tokens.device):
            for layer in self.fusion_layers:
                states = self.run_block(layer, states, mask, memory)
        return states

    def predict_words(self, fused: Tensor) -> Tensor:
        """The output of `fuse` [B, X, W] -> token logits [B, X, V]."""
        # Uses the embedding matrix directly: a tied module would duplicate it in the state dict.
        return linear(self.transform(fused), self.embeddings.word_embeddings.weight, self.word_bias)

    def _mask(self, tokens: Tensor) -> Tensor:
        """Bool [B, 1, 1, X], True for tokens to attend to; never None, which would make a fusion layer causal."""
        return (tokens != self.pad_id)[:, None, None]
