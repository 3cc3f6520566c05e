"""The decoder against loops that predict one token after the other, and against all texts that there are."""

import math
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
import torch
from made_bert import LAYERS, WIDTH, ask, write_bert
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import BertConfig

from stm.models.text import decoder as text_decoder
from stm.models.text.decoder import TextDecoder
from stm.models.text.split_bert import SplitBert
from stm.pretrained.hub import ModelError

PAD, CLS, SEP, WORDS = 0, 2, 3, 12


def decoder(seed: int = 0) -> TextDecoder:
    """Of 12 words, in float64 and eval mode; its weights are large, so that its predictions differ."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.6,
    )
    return TextDecoder(config, PAD, CLS, SEP).double().eval()


def memories(rows: int, tokens: int = 5) -> Tensor:
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def next_word(model: TextDecoder, words: list[int], memory: Tensor) -> Tensor:
    """Log-probabilities of what follows the words, [V], from nothing but these words."""
    logits = model.bert(input_ids=torch.tensor([words]), encoder_hidden_states=memory[None]).logits
    return log_softmax(logits[0, -1], dim=-1)


def probability(model: TextDecoder, words: list[int], memory: Tensor) -> float:
    """Log-probability of the words after the first, one after the other."""
    return sum(next_word(model, words[:end], memory)[words[end]].item() for end in range(1, len(words)))


def pad(texts: list[list[int]]) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([text + [PAD] * (longest - len(text)) for text in texts])


# Some share their first word; 4 to 11 are words.
CANDIDATES = [[CLS, *words, SEP] for words in ([4], [5], [4, 6], [7, 8, 9], [10], [4, 6, 6], [11, 5], [9], [8], [6, 4])]


def test_the_loss_is_what_predicting_word_after_word_gives() -> None:
    model, memory = decoder(), memories(3)
    texts = [CANDIDATES[3], CANDIDATES[0], CANDIDATES[6]]
    expected = torch.tensor([-probability(model, text, own) for text, own in zip(texts, memory, strict=True)]).double()
    torch.testing.assert_close(model(pad(texts), memory), expected)
    weights = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(model(pad(texts), memory, weights), expected * weights)
    torch.testing.assert_close(model(pad([*texts[:2], [CLS, 5, 5, 5, 5, 5, 5, SEP]]), memory)[:2], expected[:2])


def test_smoothing_mixes_in_the_mean_over_all_words() -> None:
    model, memory = decoder(), memories(1)
    text = CANDIDATES[2]
    steps = [next_word(model, text[:end], memory[0]) for end in range(1, len(text))]
    expected = -sum(0.9 * step[word] + 0.1 * step.mean() for step, word in zip(steps, text[1:], strict=True))
    torch.testing.assert_close(model(torch.tensor([text]), memory, smoothing=0.1)[0], expected)


def test_padding_of_the_memory_is_not_looked_at() -> None:
    model, memory = decoder(), memories(2)
    present = torch.tensor([[True] * 3 + [False] * 2] * 2)
    tokens, candidates = pad(CANDIDATES[:2]), pad(CANDIDATES)
    short = memory[:, :3].contiguous()
    torch.testing.assert_close(model(tokens, memory, present=present), model(tokens, short))
    torch.testing.assert_close(model.rank(memory, candidates, 4, present=present), model.rank(short, candidates, 4))
    assert model.generate(memory, 2, 6, present=present) == model.generate(short, 2, 6)
    assert not torch.allclose(model(tokens, memory), model(tokens, short))


def test_the_loss_is_float32_under_autocast_and_trains_the_memory() -> None:
    model, memory = decoder().float().train(), memories(2).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(pad(CANDIDATES[:2]), memory)
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    loss.sum().backward()
    assert memory.grad is not None and (memory.grad.abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("ranking", ["sum", "albef"])
@pytest.mark.parametrize("depth", [1, 4, 10, 128])
def test_answers_are_ranked_as_if_each_were_scored_alone(
    ranking: Literal["sum", "albef"], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_decoder, "_PREDICTED", 15)  # three answers at a time
    model, memory = decoder(), memories(3)
    found = model.rank(memory, pad(CANDIDATES), depth, ranking)
    assert found.shape == (3, len(CANDIDATES)) and found.dtype == torch.float32
    for row, own in zip(found.tolist(), memory, strict=True):
        start = next_word(model, [CLS], own)
        first = [start[answer[1]].item() for answer in CANDIDATES]
        short_list = sorted(range(len(CANDIDATES)), key=lambda number: (-first[number], number))[:depth]
        for number, answer in enumerate(CANDIDATES):
            expected = probability(model, answer, own) + (first[number] if ranking == "albef" else 0)
            assert row[number] == (pytest.approx(expected, rel=1e-5) if number in short_list else -math.inf)


def test_candidates_that_cannot_be_answers_are_refused() -> None:
    model, memory = decoder(), memories(1)
    for wrong in ([[5, 6, SEP]], [[CLS, PAD, PAD]]):
        with pytest.raises(ValueError, match="must begin with"):
            model.rank(memory, torch.tensor(wrong))
    with pytest.raises(ValueError, match="depth must be at least 1, and candidates must have at least 2 tokens"):
        model.rank(memory, pad(CANDIDATES), depth=0)


@pytest.mark.parametrize("seed", range(3))
def test_one_beam_takes_the_most_probable_word_each_time(seed: int) -> None:
    model, memory, most = decoder(seed), memories(6), 7
    expected = []
    for own in memory:
        words = [CLS]
        while len(words) <= most and words[-1] != SEP:
            words.append(int(next_word(model, words, own).argmax()))
        expected.append([word for word in words[1:] if word not in (SEP, PAD)])
    assert model.generate(memory, beams=1, max_tokens=most) == expected
    assert len({len(words) for words in expected}) > 1 or len({tuple(words) for words in expected}) > 1


@pytest.mark.parametrize("seed", range(3))
def test_as_many_beams_as_words_find_the_best_of_all_texts(seed: int) -> None:
    """Of two tokens at most, where nothing is lost when twelve beams are kept; lengths do not count."""
    model, memory = decoder(seed), memories(4)
    found = model.generate(memory, beams=WORDS, max_tokens=2, length_penalty=0.0)
    texts = [[CLS, SEP], *([CLS, first, second] for first, second in product(range(WORDS), repeat=2) if first != SEP)]
    for words, own in zip(found, memory, strict=True):
        step = next_word(model, [CLS], own)
        after = {first: next_word(model, [CLS, first], own) for first in range(WORDS)}
        scores = [step[text[1]] + (after[text[1]][text[2]] if len(text) == 3 else 0) for text in texts]
        best = texts[int(torch.stack(scores).argmax())]
        assert words == [word for word in best[1:] if word not in (SEP, PAD)]


def test_a_longer_text_wins_with_a_greater_length_penalty() -> None:
    model, memory = decoder(1), memories(8)
    short, long = (sum(map(len, model.generate(memory, 4, 10, penalty))) for penalty in (-4.0, 4.0))
    assert short < long


def test_a_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="positions"):
        decoder().generate(memories(1), max_tokens=16)


def test_it_starts_as_the_fusion_layers_of_the_split_bert(tmp_path: Path) -> None:
    """Of one word there is nothing to look back at, so both predict the same after it."""
    write_bert(tmp_path)
    language = SplitBert.load(ask(tmp_path)).double().eval()
    model = TextDecoder.of(language).double().eval()
    assert len(model.bert.bert.encoder.layer) == len(language.fusion_layers) < LAYERS
    tokens = torch.arange(4)[:, None] + language.cls_id
    memory = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        expected = language.predict_words(language.fuse(language.embeddings(tokens), tokens, memory))
        found = model(torch.cat([tokens, tokens.flip(0)], dim=1), memory)
    torch.testing.assert_close(found, cross_entropy(expected[:, 0], tokens.flip(0)[:, 0], reduction="none"))
    # A copy: training one leaves the other alone.
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in language.parameters()}


def test_a_bert_without_a_tokenizer_makes_no_decoder() -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ModelError, match="has no tokenizer"):
        TextDecoder.of(SplitBert(config, 1))


def test_its_weights_go_through_a_safetensors_file(tmp_path: Path) -> None:
    model, other = decoder(0), decoder(1)
    save_file(model.weights(), tmp_path / "decoder.safetensors")
    other.load_weights(load_file(tmp_path / "decoder.safetensors"))
    tokens, memory = pad(CANDIDATES[:3]), memories(3)
    assert torch.equal(model(tokens, memory), other(tokens, memory))
    tied = other.bert.cls.predictions.decoder.weight
    assert tied is other.bert.bert.embeddings.word_embeddings.weight
    with pytest.raises(RuntimeError, match=r"Missing key|size mismatch"):
        other.load_weights({name: tensor for name, tensor in model.weights().items() if "layer.1" not in name})
