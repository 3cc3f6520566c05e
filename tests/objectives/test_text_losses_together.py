"""The losses with text as one graph, and of two processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import CLS, MASK, PAD, WORDS, draw_captions, draw_pairs, rand
from joined_texts import HIDDEN, IDS, draw, draw_targets, measure, run_joined, work, work_on_weights
from torch import Tensor

from stm.objectives.contrast import contrast_ids
from stm.objectives.masked_language import IGNORED, mask_words, masked_language_loss
from stm.objectives.matching import matching_loss, sample_negatives


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


@pytest.mark.slow
def test_the_contrast_s_gradient_is_that_of_the_joined_batch_or_as_released(tmp_path: Path) -> None:
    """The release's gradient of all weights is half of the joined one with two processes; the temperature's is whole."""
    for found in run_joined(work_on_weights, tmp_path):
        release, divided, joined = found["release"], found["divided"], found["joined"]
        for name in ("loss", "layer", "temperature"):
            np.testing.assert_allclose(divided[name], release[name], rtol=1e-12, atol=1e-15, err_msg=name)
        np.testing.assert_allclose(joined["layer"], 2 * release["layer"], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(joined["temperature"], release["temperature"], rtol=1e-12)
        assert np.abs(release["layer"]).max() > 1e-3


@pytest.mark.slow
def test_all_objectives_are_one_graph() -> None:
    def step(video: Tensor, text: Tensor, ids: Tensor, tokens: Tensor, logits: Tensor, pairs: Tensor) -> Tensor:
        negatives = sample_negatives(video @ text.T, ids, 0.1, torch.full((6, 6), 0.5))
        _, targets = mask_words(tokens, 0.5, MASK, (PAD, CLS), WORDS, torch.full((3, 6, 8), 0.4))
        losses = contrast_ids(video, text[negatives], ids, 0.1) + matching_loss(pairs)
        return losses + masked_language_loss(logits, targets)

    arguments = (*draw_pairs(6), torch.arange(6), draw_captions(6, 8), rand(6, 8, WORDS), rand(18, 2))
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=False)
    torch.testing.assert_close(compiled(*arguments), step(*arguments))
