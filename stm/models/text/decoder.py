"""A text decoder with cross-attention, for question answering (UMT) and captioning.

As in UMT, it has as many layers as a split BERT has fusion layers, and is initialised from their weights. For answers it
cross-attends to the question's fused states, for captions to the clip's tokens.
"""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertLMHeadModel, GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from stm.distributed.shares import OwnNoise
from stm.models.checkpointing import Checkpointed
from stm.models.text.split_bert import SplitBert

DEPTH = 128
"""Number of answers that UMT ranks by all tokens."""

_PREDICTED = 4096
"""Maximum number of tokens whose logits are in memory at once during ranking: half a gigabyte with BERT's vocabulary."""

_TIED = "cls.predictions.decoder."


class TextDecoder(Checkpointed, OwnNoise):
    """A causal BERT with cross-attention and a language modelling head."""

    side = "text"

    def __init__(self, config: BertConfig, pad_id: int, cls_id: int, sep_id: int) -> None:
        """Builds a newly initialised decoder; `of` builds one from a split BERT.

        Args:
            config: a BERT config; `num_hidden_layers` is the number of decoder layers.
            pad_id: the padding token, which is never a target.
            cls_id: the first token of a text.
            sep_id: the last token of a text.
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
        """Build a decoder from copies of a split BERT's fusion layers, embeddings and language modelling head.

        It recomputes its activations if the split BERT does, and draws noise as that does.

        Raises:
            ModelError: the BERT has no tokenizer, which defines a text's first and last token.
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
        decoder.recompute(language.gradient_checkpointing)
        decoder.share = language.share
        return decoder

    def recompute(self, on: bool) -> None:
        super().recompute(on)
        layers: Any = self.bert.bert.encoder.layer
        for layer in layers:  # which transformers runs, not `run_block`
            layer.gradient_checkpointing = on
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def weights(self) -> dict[str, Tensor]:
        """The state dict without the head's matrix, which is tied to the embeddings; safetensors rejects shared tensors."""
        return {name: tensor for name, tensor in self.bert.state_dict().items() if not name.startswith(_TIED)}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Loads a state dict returned by `weights`.

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
        """The language modelling loss per text: each token is predicted from the preceding tokens and the memory.

        Args:
            tokens: int64 [B, X], from [CLS] to [SEP], followed by padding, which is ignored.
            memory: float [B, S, W], states to cross-attend to; row i for text i.
            weights: float [B], weights of the texts (in UMT, each answer's share of its question's answers); None: 1.
            present: bool [B, S], False for padding of the memory; None: no padding.
            smoothing: label smoothing, in [0, 1); UMT uses none.

        Returns:
            Float32 (or wider) [B]: the sum over the text's tokens, times its weight. UMT sums over the answers and divides
            by the number of questions.
        """
        logits = self._predict(tokens[:, :-1], memory, present)
        losses = cross_entropy(
            logits.transpose(1, 2), tokens[:, 1:], ignore_index=self.pad_id, reduction="none", label_smoothing=smoothing
        ).sum(dim=1)
        return losses if weights is None else losses * weights

    def _predict(self, tokens: Tensor, memory: Tensor, present: Tensor | None) -> Tensor:
        """Next-token logits, float32 (or wider) [B, X, V]."""
        with self.own_noise(tokens.device):
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
        """Scores given answers: the `depth` answers with the most probable first tokens are scored by all their tokens.

        Answers with the same first token tie in that selection, and earlier ones in the list are preferred, so sort the list
        by frequency. For eval mode only.

        Args:
            memory: float [B, S, W], the states of the questions.
            candidates: int64 [A, X], each as [CLS], words, [SEP], padding.
            depth: number of answers that are scored by all tokens.
            ranking: `sum`: the sum of the tokens' log-probabilities; `albef`: the same with the first token counted twice,
                as in the released code of ALBEF and UMT (which produced the published results).
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
        # `sort`, because `topk` breaks ties arbitrarily.
        best, chosen = (part[:, :depth] for part in first.sort(dim=1, descending=True, stable=True))
        # Each question-answer pair is a row. Rows are processed in chunks of a fixed size, so that memory use does not depend
        # on the number of questions.
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
        """Generates a text per row of the memory with transformers' beam search. For eval mode only.

        Args:
            memory: float [B, S, W], states to cross-attend to.
            beams: number of beams; 1 is greedy decoding.
            max_tokens: maximum number of tokens after [CLS]; a text that has not reached [SEP] by then is truncated.
            length_penalty: the exponent of the length that a finished text's log-probability is divided by; values
                above 0 favour longer texts.
            present: bool [B, S], False for padding of the memory.

        Returns:
            The token ids of each text, without [CLS], and cut before [SEP].

        Raises:
            ValueError: `max_tokens` exceeds the BERT's number of positions.
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
        model: Any = self.bert  # generate() is annotated with a protocol that no model implements
        texts = model.generate(
            start,
            generation_config=settings,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=memory,
            encoder_attention_mask=present,
            # Passed explicitly: generate() does not allocate a cross-attention cache for a decoder without an encoder.
            past_key_values=EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
        )
        return [self._without_special(row) for row in texts[:, 1:].tolist()]

    def _without_special(self, tokens: list[int]) -> list[int]:
        tokens = tokens[: tokens.index(self.sep_id)] if self.sep_id in tokens else tokens
        return [token for token in tokens if token != self.pad_id]
