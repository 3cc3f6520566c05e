"""A text decoder with cross-attention: answers to questions (UMT), captions.

It has as many layers as a split BERT has fusion layers and starts from their weights, as UMT's does. For answers it
attends to the states of the question, which have attended to the clip; for captions to the clip's tokens.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers import BertConfig, BertLMHeadModel, GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from stm.models.text.split_bert import SplitBert

DEPTH = 128
"""Number of answers that UMT ranks by all their tokens."""

_PREDICTED = 4096
"""Tokens whose logits are held at a time when answers are ranked: half a gigabyte with BERT's vocabulary."""

_TIED = "cls.predictions.decoder."


class TextDecoder(nn.Module):
    """A causal BERT with cross-attention and its language modelling head."""

    def __init__(self, config: BertConfig, pad_id: int, cls_id: int, sep_id: int) -> None:
        """A fresh one; `of` makes one from a split BERT.

        Args:
            config: a BERT's; `num_hidden_layers` counts the decoder's layers.
            pad_id: padding, which is never a target.
            cls_id: the first token of a text.
            sep_id: its last.
        """
        super().__init__()
        config = deepcopy(config)
        config.is_decoder = config.add_cross_attention = True
        config._attn_implementation = "sdpa"
        self.pad_id = pad_id
        self.cls_id = cls_id
        self.sep_id = sep_id
        self.bert = BertLMHeadModel(config)

    @classmethod
    def of(cls, language: SplitBert) -> "TextDecoder":
        """A decoder from copies of a split BERT's fusion layers, embeddings and language modelling head.

        Raises:
            ModelError: it has no tokenizer, which defines a text's first and last token.
        """
        config = deepcopy(language.config)
        config.num_hidden_layers = len(language.fusion_layers)
        decoder = cls(config, language.pad_id, language.cls_id, language.sep_id)
        parts = {
            "bert.embeddings.": language.embeddings,
            "bert.encoder.layer.": language.fusion_layers,
            "cls.predictions.transform.": language.transform,
        }
        weights = {
            f"{place}{name}": tensor for place, part in parts.items() for name, tensor in part.state_dict().items()
        }
        decoder.load_weights({**weights, "cls.predictions.bias": language.word_bias.detach()})
        return decoder

    def weights(self) -> dict[str, Tensor]:
        """Its state dict without the head's matrix, which is tied to the word embeddings: safetensors refuses shared tensors."""
        return {name: tensor for name, tensor in self.bert.state_dict().items() if not name.startswith(_TIED)}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies weights of `weights` into this module.

        Raises:
            RuntimeError: names or shapes differ.
        """
        head = {
            f"{_TIED}weight": weights["bert.embeddings.word_embeddings.weight"],
            f"{_TIED}bias": weights["cls.predictions.bias"],
        }
        self.bert.load_state_dict({**weights, **head})

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        weights: Tensor | None = None,
        present: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """The language modelling loss of each text: every token is predicted from those before it and the memory.

        Args:
            tokens: int64 [B, X], from [CLS] to [SEP], then padding, which is not predicted.
            memory: float [B, S, W], what is attended to; row i for text i.
            weights: float [B], of the texts (an answer's share of its question's, in UMT); None: 1.
            present: bool [B, S], False for padding of the memory; None: no padding.
            smoothing: label smoothing, in [0, 1); UMT has none.

        Returns:
            Float32 (or wider) [B]: the sum over the text's tokens, times its weight. UMT divides the sum over the answers
            by the number of questions.
        """
        logits = self._predict(tokens[:, :-1], memory, present)
        losses = cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], ignore_index=self.pad_id, reduction="none", label_smoothing=smoothing
        ).sum(dim=1)
        return losses if weights is None else losses * weights

    def _predict(self, tokens: Tensor, memory: Tensor, present: Tensor | None) -> Tensor:
        """Logits of the token after each one, float32 (or wider) [B, X, V]."""
        logits: Tensor = self.bert(
            input_ids=tokens, encoder_hidden_states=memory, encoder_attention_mask=present, use_cache=False
        ).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def rank(
        self,
        memory: Tensor,
        candidates: Tensor,
        depth: int = DEPTH,
        ranking: Literal["sum", "albef"] = "sum",
        present: Tensor | None = None,
    ) -> Tensor:
        """Scores given answers: the `depth` with the most probable first token get the log-probability of all their tokens.

        Answers with the same first token tie there, and the first in the list are preferred: sort it by frequency. For eval
        mode only.

        Args:
            memory: float [B, S, W], the states of the questions.
            candidates: int64 [A, X], each [CLS], its words, [SEP], padding.
            depth: number of answers that are scored by all tokens.
            ranking: `sum` of the tokens' log-probabilities; `albef` counts the first token's twice, as the released code of
                ALBEF and UMT does (published numbers come from it).
            present: bool [B, S], False for padding of the memory.

        Returns:
            Float32 [B, A]; minus infinity for answers beyond `depth`.

        Raises:
            ValueError: a candidate does not begin with [CLS] and a token, or `depth` is below 1.
        """
        if depth < 1 or candidates.shape[1] < 2:
            raise ValueError("depth must be at least 1, and candidates must have at least 2 tokens")
        if bool((candidates[:, 0] != self.cls_id).any() | (candidates[:, 1] == self.pad_id).any()):
            raise ValueError("every candidate must begin with [CLS] and a token other than padding")
        start = candidates.new_full((len(memory), 1), self.cls_id)
        first = log_softmax(self._predict(start, memory, present)[:, 0], dim=-1)[:, candidates[:, 1]]  # [B, A]
        # `sort` and not `topk`, whose choice among ties is undefined.
        best, chosen = (part[:, :depth] for part in first.sort(dim=1, descending=True, stable=True))
        # Each pair of question and answer is a row, processed in parts of a fixed size: the memory does not depend on the
        # number of questions.
        answers = chosen.flatten()
        owners = torch.arange(len(memory), device=memory.device).repeat_interleave(best.shape[1])
        rows = max(1, _PREDICTED // candidates.shape[1])
        parts = [
            self(candidates[answer], memory[owner], present=None if present is None else present[owner])
            for answer, owner in zip(answers.split(rows), owners.split(rows), strict=True)
        ]
        total = -torch.cat(parts).view_as(best)
        if ranking == "albef":
            total = total + best
        return torch.full_like(first, -torch.inf).scatter(1, chosen, total).float()

    @torch.no_grad()
    def generate(
        self,
        memory: Tensor,
        beams: int = 1,
        max_tokens: int = 32,
        length_penalty: float = 1.0,
        present: Tensor | None = None,
    ) -> list[list[int]]:
        """Generates a text for each row of the memory, by transformers' beam search. For eval mode only.

        Args:
            memory: float [B, S, W], what is attended to.
            beams: number of beams; 1 is greedy decoding.
            max_tokens: maximum number of tokens after [CLS]; a text without [SEP] by then is truncated.
            length_penalty: a finished text's log-probability is divided by its length to this power; values above 0
                favour longer texts.
            present: bool [B, S], False for padding of the memory.

        Returns:
            The token ids of each text, without [CLS], and without [SEP] and all after it.

        Raises:
            ValueError: `max_tokens` is more than the BERT has positions for.
        """
        config = self.bert.config
        if max_tokens >= config.max_position_embeddings:
            raise ValueError(
                f"max_tokens {max_tokens} and [CLS] are more than {config.max_position_embeddings} positions"
            )
        start = torch.full((len(memory), 1), self.cls_id, device=memory.device)
        settings = GenerationConfig(
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_tokens,
            length_penalty=length_penalty,
            bos_token_id=self.cls_id,
            eos_token_id=self.sep_id,
            pad_token_id=self.pad_id,
        )
        model: Any = self.bert  # generate() is annotated for a protocol that no model fulfils
        texts = model.generate(
            start,
            generation_config=settings,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=memory,
            encoder_attention_mask=present,
            # Passed in, because generate() allocates no cross-attention cache for a decoder without an encoder.
            past_key_values=EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
        )
        return [self._without_special(row) for row in texts[:, 1:].tolist()]

    def _without_special(self, tokens: list[int]) -> list[int]:
        tokens = tokens[: tokens.index(self.sep_id)] if self.sep_id in tokens else tokens
        return [token for token in tokens if token != self.pad_id]
