"""Contrast, hard negatives, matching and hidden words against loops over plain numbers, in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from joined_texts import HIDDEN, IDS, draw, draw_targets, measure, run_joined, work
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from stm.objectives.contrast import match_pairs
from stm.objectives.video_text import (
    IGNORED,
    contrast_ids,
    draw_negatives,
    mask_words,
    masked_language_loss,
    matching_loss,
)

PAD, CLS, SEP, MASK, WORDS = 0, 2, 3, 4, 50


def draw_pairs(rows: int, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video, text = normalize(torch.randn(2, rows, width, generator=generator, dtype=torch.float64), dim=2)
    return video, text


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------
# contrast


def contrast_by_loops(video: np.ndarray, text: np.ndarray, ids: list[int], temperature: float) -> float:
    rows, total = range(len(ids)), 0.0
    for one, other in ((video, text), (text, video)):
        for i in rows:
            scores = [math.exp(one[i] @ other[j] / temperature) for j in rows]
            same = [j for j in rows if ids[j] == ids[i]]
            total -= sum(math.log(scores[j] / sum(scores)) for j in same) / len(same)
    return total / (2 * len(ids))


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [7, 1, 7, 2, 1, 7], [3] * 6, [2**40, 2**40 + 1, 0, 1, 2, 2**40]])
def test_rows_of_one_sample_share_the_target(ids: list[int], temperature: float) -> None:
    video, text = draw_pairs(6)
    loss = contrast_ids(video, text, torch.tensor(ids), temperature)
    expected = contrast_by_loops(video.numpy(), text.numpy(), ids, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_without_repeated_samples_it_is_info_nce() -> None:
    found = []
    for ours in (True, False):
        video, text = (x.requires_grad_() for x in draw_pairs(9))
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        if ours:
            loss = contrast_ids(video, text, torch.arange(9).flip(0), temperature)
        else:
            loss = match_pairs(video, text, temperature).loss
        loss.backward()
        found.append([loss, video.grad, text.grad, temperature.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_contrast_is_float32_under_autocast() -> None:
    video, text = (x.bfloat16() for x in draw_pairs(6))
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrast_ids(video, text, torch.arange(6), 0.01)
    assert loss.dtype == torch.float32
    exact = contrast_ids(video.double(), text.double(), torch.arange(6), 0.01)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_shapes_that_do_not_fit_are_errors() -> None:
    video, text = draw_pairs(4)
    for arguments in ((video[:3], text, torch.arange(4)), (video, text, torch.arange(3)), (video[0], text[0], text)):
        with pytest.raises(ValueError, match=r"must be \[B, E\] alike, and ids"):
            contrast_ids(*arguments, 0.1)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_joined_batch(tmp_path: Path) -> None:
    two = run_joined(work, tmp_path)
    video, text, logits = (torch.cat(parts) for parts in zip(draw(0), draw(1), strict=True))
    targets = torch.cat([draw_targets(0), draw_targets(1)])
    assert ((draw_targets(1) != IGNORED).sum() > 1.5 * (draw_targets(0) != IGNORED).sum()) and HIDDEN[1] > HIDDEN[0]
    for case, ids in IDS.items():
        one = measure(video, text, torch.tensor(ids).flatten(), logits, targets)
        for name, expected in one.items():
            parts = [values[case][name] for values in two]
            rows = expected.ndim > 0  # DDP divides what flows on into the weights by the number of processes
            found = np.concatenate(parts) / 2 if rows else np.mean(parts)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15, err_msg=f"{case} {name}")


# -------------------------------------------------------------------------------------------------------
# hard negatives


def weigh(similarity: Tensor, ids: Tensor, temperature: float) -> np.ndarray:
    """Probability of each column, by loops."""
    rows, found = len(ids), np.zeros((len(ids), len(ids)))
    for i in range(rows):
        total = sum(math.exp(similarity[i, j].item() / temperature) for j in range(rows))
        for j in range(rows):
            if ids[i] != ids[j]:
                found[i, j] = math.exp(similarity[i, j].item() / temperature) / total + 1e-4
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 3, 1, 0]])
def test_negatives_are_never_positives_and_as_frequent_as_the_softmax_says(ids: list[int]) -> None:
    video, text = draw_pairs(6)
    similarity, numbers, draws = video @ text.T, torch.tensor(ids), 4000
    noise = rand(draws, 6, 6)
    found = torch.stack([draw_negatives(similarity, numbers, 0.3, one) for one in noise])  # [draws, 6]
    assert (numbers[found] != numbers).all()
    expected = weigh(similarity, numbers, 0.3)
    counts = torch.nn.functional.one_hot(found, 6).double().mean(dim=0).numpy()
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts - expected) <= 4 * error + 1e-9).all()


def test_the_draw_is_that_of_exponential_times() -> None:
    """The first of independent exponential times is each with a probability in proportion to its rate: the noise says
    which, so that the draw can be told beforehand."""
    video, text = draw_pairs(5)
    similarity, ids, noise = video @ text.T, torch.tensor([0, 1, 2, 1, 4]), rand(5, 5, seed=1)
    weights = weigh(similarity, ids, 0.1)
    times = [[-math.log(1 - noise[i, j].item()) / max(weights[i, j], 1e-300) for j in range(5)] for i in range(5)]
    expected = np.argmin(times, axis=1).tolist()
    assert draw_negatives(similarity, ids, 0.1, noise).tolist() == expected
    assert draw_negatives(similarity / 0.1, ids, noise=noise).tolist() == expected


def test_without_noise_torchs_generator_draws() -> None:
    similarity, ids = torch.zeros(40, 40), torch.arange(40)
    torch.manual_seed(0)
    first, second = draw_negatives(similarity, ids), draw_negatives(similarity, ids)
    torch.manual_seed(0)
    assert torch.equal(draw_negatives(similarity, ids), first) and not torch.equal(first, second)


def test_a_row_whose_negatives_all_round_to_nothing_is_drawn_evenly() -> None:
    similarity = torch.eye(5) * 2 - 1  # at temperature 0.001 the softmax of all negatives is 0 in float32
    found = torch.stack([draw_negatives(similarity, torch.arange(5), 0.001, n) for n in rand(2000, 5, 5).float()])
    counts = torch.nn.functional.one_hot(found, 5).float().mean(dim=0)
    assert (counts.diagonal() == 0).all()
    assert ((counts - 0.25).abs()[~torch.eye(5, dtype=torch.bool)] < 0.04).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_do_not_spoil_the_draw(bad: float) -> None:
    similarity = torch.zeros(4, 4)
    similarity[0] = bad
    similarity[1, 2] = bad
    ids = torch.tensor([0, 1, 2, 2])
    drawn = [draw_negatives(similarity, ids, 0.07, noise).tolist() for noise in rand(300, 4, 4)]
    rows = list(zip(*drawn, strict=True))
    assert [set(row) for row in rows[:1] + rows[2:]] == [{1, 2, 3}, {0, 1}, {0, 1}]
    assert set(rows[1]) == ({0, 3} if bad == -math.inf else {0, 2, 3})


def test_where_there_is_no_negative_nothing_fails() -> None:
    found = torch.stack([draw_negatives(torch.zeros(3, 3), torch.full((3,), 8), 0.07, n) for n in rand(100, 3, 3)])
    assert [set(column.tolist()) for column in found.T] == [{1, 2}, {0, 2}, {0, 1}]  # another row of the sample
    assert draw_negatives(torch.zeros(1, 1), torch.tensor([8]), 0.07).tolist() == [0]


# -------------------------------------------------------------------------------------------------------
# matching


def test_matching_takes_the_first_third_for_true() -> None:
    logits = 3 * rand(12, 2) - 1
    total = 0.0
    for row, (no, yes) in enumerate(logits.tolist()):
        right = yes if row < 4 else no
        total -= math.log(math.exp(right) / (math.exp(no) + math.exp(yes)))
    assert matching_loss(logits).item() == pytest.approx(total / 12, rel=1e-12)
    assert matching_loss(torch.zeros(3, 2)).item() == pytest.approx(math.log(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert matching_loss(logits.bfloat16()).dtype == torch.float32
    for shape in ((4, 2), (3, 3), (3,)):
        with pytest.raises(ValueError, match=r"must be \[3B, 2\]"):
            matching_loss(torch.zeros(shape))


# -------------------------------------------------------------------------------------------------------
# hidden words


def draw_captions(batch: int, length: int) -> Tensor:
    """[CLS] words [SEP] [PAD] ..., int64 [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, WORDS, (batch, length), generator=generator)
    ends = torch.randint(2, length, (batch, 1), generator=generator)
    places = torch.arange(length)
    tokens = torch.where(places == ends, SEP, torch.where(places > ends, PAD, tokens))
    return torch.where(places == 0, CLS, tokens)


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


def test_without_hidden_words_the_loss_and_its_gradient_are_zero() -> None:
    logits = torch.randn(2, 3, 9).requires_grad_()
    loss = masked_language_loss(logits, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and (logits.grad == 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_language_loss(logits.bfloat16(), torch.ones(2, 3).long()).dtype == torch.float32


@pytest.mark.slow
def test_all_objectives_are_one_graph() -> None:
    def step(video: Tensor, text: Tensor, ids: Tensor, tokens: Tensor, logits: Tensor, pairs: Tensor) -> Tensor:
        negatives = draw_negatives(video @ text.T, ids, 0.1, torch.full((6, 6), 0.5))
        _, targets = mask_words(tokens, 0.5, MASK, (PAD, CLS), WORDS, torch.full((3, 6, 8), 0.4))
        losses = contrast_ids(video, text[negatives], ids, 0.1) + matching_loss(pairs)
        return losses + masked_language_loss(logits, targets)

    arguments = (*draw_pairs(6), torch.arange(6), draw_captions(6, 8), rand(6, 8, WORDS), rand(18, 2))
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(*arguments), step(*arguments))
