"""Clips that share captions: what is a positive, what may be drawn as a negative, and the loss, by loops over texts."""

import math
from hashlib import blake2b

import torch
from drawn import draw_pairs, rand
from torch import Tensor

from stm.objectives.contrast import contrast_ids
from stm.objectives.matching import sample_negatives
from stm.objectives.positives import find_positives, hash_captions

CLIPS, TEMPLATES = 256, 174  # a batch of UMT's on the 174 templates of Something-Something V2


def draw_templates() -> list[str]:
    numbers = torch.randint(TEMPLATES, (CLIPS,), generator=torch.Generator().manual_seed(0)).tolist()
    return [f"putting something {number} times into something" for number in numbers]


def ids_of(captions: list[str], clips: Tensor) -> Tensor:
    return torch.stack([clips, hash_captions(captions)], dim=1)


def test_of_174_texts_in_a_batch_of_256_no_drawn_negative_is_a_true_pair() -> None:
    captions = draw_templates()
    shared, clips = ids_of(captions, torch.arange(CLIPS)), torch.arange(CLIPS)
    # As a trained model sees it: clips of one text are alike, so that true pairs are the most similar of all.
    alike = torch.tensor([[float(one == other) for other in captions] for one in captions])
    similarity = 0.3 * alike + 0.05 * rand(CLIPS, CLIPS, seed=1).float()
    wrong = {"shared": 0, "clip": 0}
    for seed in range(5):
        for name, ids in (("shared", shared), ("clip", clips)):
            drawn = sample_negatives(similarity, ids, 0.07, rand(CLIPS, CLIPS, seed=seed)).tolist()
            wrong[name] += sum(captions[row] == captions[column] for row, column in enumerate(drawn))
    assert wrong["shared"] == 0
    assert wrong["clip"] > 0.2 * 5 * CLIPS  # by clip, a large part of the negatives are true pairs


def test_the_loss_of_shared_texts_is_that_of_loops_over_texts() -> None:
    """The formula of UMT's code with `has_multi_vision_gt`: rows of one text share the target."""
    captions = draw_templates()
    video, text = draw_pairs(CLIPS)
    found = contrast_ids(video, text, ids_of(captions, torch.arange(CLIPS)), 0.07)
    total = 0.0
    for scores in (video @ text.T / 0.07, text @ video.T / 0.07):
        for row, values in enumerate(scores.tolist()):
            same = [column for column in range(CLIPS) if captions[column] == captions[row]]
            norm = math.log(sum(map(math.exp, values)))
            total -= sum(values[column] - norm for column in same) / len(same)
    assert abs(found.item() - total / (2 * CLIPS)) < 1e-9


def test_rows_are_positives_by_clip_or_by_text_but_not_through_a_third_row() -> None:
    ids = ids_of(["a", "b", "b", "c"], torch.tensor([0, 0, 1, 2]))
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert find_positives(ids, ids).int().tolist() == expected
    assert find_positives(ids[:, 0], ids[:, 0]).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_a_text_has_the_same_id_everywhere_and_no_other_text_has_it() -> None:
    texts = [f"text {number}" for number in range(10_000)]
    ids = hash_captions(texts)
    assert len(set(ids.tolist())) == 10_000 and torch.equal(hash_captions(texts[5:7]), ids[5:7])
    # Of the bytes alone: Python's own hash is another one in every process.
    assert hash_captions(["a"]).item() == int.from_bytes(blake2b(b"a", digest_size=8).digest(), "big", signed=True)


def test_negatives_of_groups_are_those_of_each_group_alone() -> None:
    """As in UMT's release, where every process draws from its own batch."""
    video, text = draw_pairs(12)
    similarity, ids, noise = video @ text.T, torch.tensor([0, 1, 0, 2, 3, 4, 5, 5, 6, 7, 0, 1]), rand(12, 12, seed=3)
    found = sample_negatives(similarity, ids, 0.1, noise, among=4).tolist()
    expected = []
    for start in range(0, 12, 4):
        part = slice(start, start + 4)
        own = sample_negatives(similarity[part, part], ids[part], 0.1, noise[part, part])
        expected += (own + start).tolist()
    assert found == expected
    # Where a group has no negative, another group has.
    ids = torch.tensor([0, 0, 1, 2])
    for seed in range(20):
        drawn = sample_negatives(torch.zeros(4, 4), ids, 0.1, rand(4, 4, seed=seed), among=2)
        assert set(drawn[:2].tolist()) <= {2, 3} and drawn[2:].tolist() == [3, 2]
