"""A small BERT with random weights and a given vocabulary, for demos and tests."""

from collections.abc import Iterable
from math import sqrt
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of their ids


BASE_WIDTH, BASE_RANGE = 768, 0.02  # of BERT-base


def scaled_range(width: int) -> float:
    """The standard deviation of the initial weights that gives layers of this width the same gain as BERT-base's.

    With BERT-base's 0.02 at width 128, a fresh cross-attention hardly changes [CLS], so that matching does not learn.
    """
    return BASE_RANGE * sqrt(BASE_WIDTH / width)


def make_bert(folder: Path, words: Iterable[str], width: int, layers: int, heads: int, seed: int = 0) -> None:
    """Saves a randomly initialised `BertForMaskedLM` and its tokenizer in transformers' format, reproducibly.

    Args:
        folder: created here; will contain `config.json`, `model.safetensors` and the tokenizer's files.
        words: the vocabulary in order, or captions, which are lower-cased and split at punctuation, as BERT does;
            duplicates are dropped.
        width: hidden size; the feed-forward layers are four times as wide, as in BERT.
        layers: number of layers.
        heads: number of attention heads; must divide the width.
        seed: for the weights. The state of torch's global generator is left unchanged.

    Raises:
        ValueError: `words` is empty, or the width is not divisible by the number of heads.
    """
    backend = BertTokenizer().backend_tokenizer
    pieces = [
        piece
        for word in words
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(word))
    ]
    if not pieces:
        raise ValueError("a vocabulary needs words")
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        initializer_range=scaled_range(width),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    BertTokenizer(vocab=vocabulary).save_pretrained(str(folder))
