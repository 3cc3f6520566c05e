"""Hidden words against loops over plain numbers, in float64."""

import math

import pytest
import torch
from drawn import CLS, MASK, PAD, SEP, WORDS, draw_captions, rand
from torch.nn.functional import cross_entropy

from stm.objectives.masked_language import IGNORED, mask_words, masked_language_loss


def test_words_are_hidden_as_the_noise_says() -> None:
    tokens, noise = draw_captions(30, 12), rand(3, 30, 12)
    read, targets = mask_words(tokens, 0.5, MASK, (PAD, CLS), WORDS, noise)
    for b in range(30):
        for x in range(12):
            token, (choice, fate, word) = tokens[b, x].item(), noise[:, b, x].tolist()
            expected: tuple[float, float] = (token, IGNORED)
            if token not in (PAD, CLS) and choice < 0.5:
                expected = (MASK if fate < 0.8 else int(word * WORDS) if fate < 0.9 else token, token)
            assert (read[b, x].item(), targets[b, x].item()) == expected
    assert read.dtype == targets.dtype == torch.int64


def test_half_the_words_are_hidden_and_of_these_80_10_10() -> None:
    tokens = draw_captions(4000, 20)
    torch.manual_seed(0)
    read, targets = mask_words(tokens, 0.5, MASK, (PAD, CLS), WORDS)
    hidden, words = targets != IGNORED, (tokens != PAD) & (tokens != CLS)
    assert not (hidden & ~words).any()
    assert torch.equal(targets[hidden], tokens[hidden]) and torch.equal(read[~hidden], tokens[~hidden])
    total = hidden.sum().item()
    assert total / words.sum().item() == pytest.approx(0.5, abs=0.01)
    masked, same = (read == MASK) & hidden, (read == tokens) & hidden
    changed = hidden & ~masked & ~same
    # A random word is [MASK] or the word itself once in WORDS times each.
    assert masked.sum().item() / total == pytest.approx(0.8 + 0.1 / WORDS, abs=0.01)
    assert same.sum().item() / total == pytest.approx(0.1 + 0.1 / WORDS, abs=0.01)
    assert set(read[changed].tolist()) == set(range(WORDS)) - {MASK}  # evenly from all
    counts = torch.bincount(read[changed], minlength=WORDS).double()
    assert counts[5:].std() / counts[5:].mean() < 0.2
    ends = tokens == SEP  # UMT: may be hidden
    assert hidden[ends].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not hidden[tokens == CLS].any() and not hidden[tokens == PAD].any()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_at_the_ends_nothing_or_all_is_hidden(probability: float) -> None:
    tokens = draw_captions(20, 9)
    _, targets = mask_words(tokens, probability, MASK, (PAD, CLS), WORDS)
    assert torch.equal(targets != IGNORED, ((tokens != PAD) & (tokens != CLS)) & (probability == 1.0))


def test_a_random_word_is_never_beyond_the_vocabulary() -> None:
    noise = torch.full((3, 1, 1), 1 - 2**-24)  # the highest number that torch draws
    noise[0], noise[1] = 0, 0.85
    for vocabulary in (30522, 2**24 - 1, 7):
        read, _ = mask_words(torch.tensor([[5]]), 0.5, MASK, (PAD,), vocabulary, noise)
        assert read.item() == vocabulary - 1


def test_the_loss_of_hidden_words_is_their_mean_cross_entropy() -> None:
    logits = 4 * rand(3, 5, 9) - 2
    targets = torch.full((3, 5), IGNORED)
    targets[0, 1], targets[0, 3], targets[2, 0] = 7, 0, 8
    total = 0.0
    for b, x in ((0, 1), (0, 3), (2, 0)):
        scores = [math.exp(value) for value in logits[b, x].tolist()]
        total -= math.log(scores[targets[b, x]] / sum(scores))
    loss = masked_language_loss(logits, targets)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)
    assert loss.item() == pytest.approx(cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-12)


@pytest.mark.parametrize(("among", "groups"), [(2, [(0, 2), (2, 4), (4, 5)]), (5, [(0, 5)]), (None, [(0, 5)])])
def test_by_group_the_loss_is_the_mean_of_each_group_s_own(among: int | None, groups: list[tuple[int, int]]) -> None:
    logits = 4 * rand(5, 6, 9) - 2
    targets = torch.full((5, 6), IGNORED)
    targets[0, 1], targets[0, 3], targets[1, 2], targets[2, 0], targets[4, 5] = 7, 0, 8, 3, 3
    own = [
        cross_entropy(logits[a:b].flatten(0, 1), targets[a:b].flatten(), ignore_index=IGNORED).item() for a, b in groups
    ]
    found = masked_language_loss(logits, targets, "group", among).item()
    assert found == pytest.approx(math.fsum(own) / len(own), rel=1e-12)
    assert (found == pytest.approx(masked_language_loss(logits, targets).item(), rel=1e-9)) == (len(groups) == 1)


def test_by_group_one_without_hidden_words_counts_as_zero() -> None:
    logits = rand(4, 3, 9).requires_grad_()
    targets = torch.full((4, 3), IGNORED)
    targets[0, 1] = 4
    loss = masked_language_loss(logits, targets, "group", 2)
    loss.backward()
    assert loss.item() == pytest.approx(masked_language_loss(logits, targets).item() / 2)
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_without_hidden_words_the_loss_and_its_gradient_are_zero() -> None:
    logits = torch.randn(2, 3, 9).requires_grad_()
    loss = masked_language_loss(logits, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and (logits.grad == 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_language_loss(logits.bfloat16(), torch.ones(2, 3).long()).dtype == torch.float32
