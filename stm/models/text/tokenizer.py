"""Converts captions to token ids: a BERT's tokenizer, stored only as its JSON text."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from stm.datasets.video_text.cleaning import clean_text
from stm.pretrained.hub import ModelError, ModelSource, explain_missing

_SPECIAL = ("pad", "cls", "sep", "mask")
_FILES = ("tokenizer.json", "vocab.txt")


class Tokenizer:
    """Converts texts to a fixed number of token ids.

    It has no weights and is not part of a state dict. `describe` returns its complete state as JSON values.
    """

    def __init__(self, text: str, special: Mapping[str, str], scheme: Literal["bert", "umt"] = "bert") -> None:
        """
        Args:
            text: the content of a `tokenizer.json` of the tokenizers library. It must add [CLS] and [SEP] itself.
            special: the tokens for "pad", "cls", "sep" and "mask".
            scheme: `language.tokenization` of the config: `umt` adds [SEP] only to targets (see `encode_targets`).

        Raises:
            ModelError: the text cannot be parsed as a tokenizer, or lacks one of these tokens.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"the tokenizer cannot be read: {error}") from error
        if scheme not in ("bert", "umt"):
            raise ModelError(f"unknown tokenization {scheme!r}")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = {name: special.get(name) for name in _SPECIAL}
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = (self._find(name) for name in _SPECIAL)
        self.vocabulary: int = self._tokenizer.get_vocab_size(with_added_tokens=True)  # number of tokens
        self._scheme = scheme
        if scheme == "umt":
            start = special["cls"]
            self._tokenizer.post_processor = TemplateProcessing(
                single=f"{start} $A", special_tokens=[(start, self.cls_id)]
            )

    def _find(self, name: str) -> int:
        word = self._special[name]
        number = self._tokenizer.token_to_id(word) if isinstance(word, str) else None
        if number is None:
            raise ModelError(f"the tokenizer lacks the {name} token {word!r}, which a BERT needs")
        return int(number)

    def encode(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        """Token ids, padded or truncated to a fixed length, so that all batches have the same shape.

        Args:
            texts: B raw captions; they are cleaned here, as UMT does (see `clean_text`).
            max_tokens: X, including [CLS] and [SEP]; longer texts are truncated, keeping [SEP]. With the scheme `umt`
                there is no [SEP].

        Returns:
            int64 [B, X].
        """
        return self._encode([clean_text(text) for text in texts], max_tokens)

    def encode_targets(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        """Like `encode`, for texts that a decoder predicts, which always end with [SEP].

        With the scheme `umt` they are not cleaned, and a text that is too long loses its [SEP], as in UMT's release.
        """
        if self._scheme == "bert":
            return self.encode(texts, max_tokens)
        return self._encode([f"{text} {self._special['sep']}" for text in texts], max_tokens)

    def _encode(self, texts: Sequence[str], max_tokens: int) -> Tensor:
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(length=max_tokens, pad_id=self.pad_id, pad_token=self._special["pad"])
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), max_tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Converts token ids to text, without special tokens and with word pieces joined."""
        return self._tokenizer.decode(list(tokens)).strip()

    def describe(self) -> dict[str, Any]:
        """The arguments for `Tokenizer(**values)`, as JSON values, independent of what was encoded before."""
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        return {"text": self._tokenizer.to_str(), "special": dict(self._special), "scheme": self._scheme}


def load_tokenizer(source: ModelSource, scheme: Literal["bert", "umt"] = "bert") -> Tokenizer:
    """Load the tokenizer of a transformers model; `scheme` as in `Tokenizer`.

    Raises:
        ModelError: tokenizer files are missing, or the tokenizer is not from the tokenizers library.
    """
    from transformers import AutoTokenizer

    advice = f"a BERT needs {' or '.join(_FILES)} next to its weights"
    # For a folder without these files, transformers returns a tokenizer with an empty vocabulary.
    if source.folder is not None and not any((source.folder / name).is_file() for name in _FILES):
        raise ModelError(f"model {source.name!r} has no tokenizer files: {advice}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source.arguments)
    except (OSError, ValueError, KeyError) as error:
        raise explain_missing(source, error) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelError(
            f"model {source.name!r}: its tokenizer is a {type(tokenizer).__name__}, not a fast one; {advice}"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"model {source.name!r} has a tokenizer with an empty vocabulary: {advice}")
    return Tokenizer(backend.to_str(), {name: getattr(tokenizer, f"{name}_token") for name in _SPECIAL}, scheme)
