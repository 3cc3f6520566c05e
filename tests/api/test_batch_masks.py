"""Masks of a batch: the strategies called by hand, a brute-force ranking, a user's file, and errors for missing guides."""

from pathlib import Path

import pytest
import torch
from small_models import save_clip

import stm
from stm.api.masks import GuideError
from stm.config import Teacher
from stm.data.loader import Batch
from stm.masking import get_strategy
from stm.models.teachers.frame_teacher import FrameTeacher


@pytest.fixture(scope="module")
def batch(results: Path) -> Batch:
    return stm.open_shards(results).batch(3)


def test_text_top_hides_the_tokens_that_are_most_similar_to_the_caption(batch: Batch) -> None:
    kept = stm.mask(batch, "text_top", 0.6)
    similarity = batch["guides"]["similarity"]
    expected = []
    for clip in similarity.tolist():
        tokens = []
        for slot, scores in enumerate(clip):
            ranked = sorted(range(16), key=lambda token: scores[token])
            tokens += sorted(16 * slot + token for token in ranked[: 16 - 9])  # int(0.6 * 16) are hidden
        expected.append(tokens)
    assert kept.dtype == torch.int64 and kept.tolist() == expected


@pytest.mark.parametrize("strategy", ["random", "tube", "motion", "motion_compensated", "text_bottom"])
def test_masks_are_those_of_the_strategy_called_by_hand(batch: Batch, strategy: str) -> None:
    assert torch.equal(stm.mask(batch, strategy, 0.5), get_strategy(strategy)(batch["guides"], 0.5))


def test_the_usual_ratio_is_that_of_the_paper(batch: Batch) -> None:
    for strategy, ratio in (("text_top", 0.6), ("tube", 0.9), ("motion", 0.75)):
        assert torch.equal(stm.mask(batch, strategy), stm.mask(batch, strategy, ratio))


def test_hidden_is_true_where_no_kept_token_is(batch: Batch) -> None:
    kept = stm.mask(batch, "random", 0.75)
    masked = stm.hidden(batch, kept)
    assert masked.shape == (3, 3, 4, 4) and masked.dtype == torch.bool
    for clip in range(3):
        visible = {(t, r, c) for t in range(3) for r in range(4) for c in range(4) if not masked[clip, t, r, c]}
        assert visible == {(k // 16, k % 16 // 4, k % 4) for k in kept[clip].tolist()}


@pytest.mark.parametrize("kept", [[[0]], [[48], [0], [0]], [[-1], [0], [0]]])
def test_hidden_refuses_tokens_of_another_batch(batch: Batch, kept: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"is not a mask of this batch. Kept tokens are int64 \[3, K\]"):
        stm.hidden(batch, torch.tensor(kept))


def test_a_strategy_of_a_users_file_is_used(batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from stm.masking import hide_highest, register\n\n\n"
        "@register('calm', needs=('motion',))\n"
        "def calm(guides, ratio):\n"
        "    return hide_highest(-guides['motion'], guides['noise'], ratio)\n"
    )
    kept = stm.mask(batch, f"{path}:calm", 0.5)
    motion = batch["guides"]["motion"].flatten(1)
    assert motion.gather(1, kept).mean() > motion.mean()


def test_a_missing_guide_is_named_with_the_strategies_that_remain(results: Path) -> None:
    batch = stm.open_shards(results, guides=["motion"]).batch(2)
    with pytest.raises(GuideError) as error:
        stm.mask(batch, "text_top", 0.6)
    text = str(error.value)
    assert "'text_top' needs the guide 'similarity', and this batch has motion, noise;" in text
    assert text.endswith("this batch allows: motion, motion_box, random, tube")
    with pytest.raises(GuideError, match='pass teacher="ViT-B-16@openai", "local-dir:FOLDER"'):
        stm.mask(batch, "attention", 0.8)
    with pytest.raises(GuideError, match="learned by a run of the method stm"):
        stm.mask(batch, "spatiotemporal", 0.8, teacher="local-dir:nowhere")
    with pytest.raises(GuideError, match="'similarity'"):  # no teacher replaces it
        stm.mask(batch, "text_top", 0.6, teacher="local-dir:nowhere")


def test_what_is_no_batch_is_explained(batch: Batch) -> None:
    for wrong, found in (({}, "an empty one"), (batch["video"], "Tensor"), ({"video": batch["video"]}, "video")):
        for use in (lambda b: stm.mask(b, "random", 0.5), stm.show, lambda b: stm.hidden(b, torch.zeros(1))):
            with pytest.raises(GuideError, match=f"its loaders return it; got {found}$"):
                use(wrong)


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan")])
def test_impossible_ratios_are_refused(batch: Batch, ratio: float) -> None:
    with pytest.raises(ValueError, match="the mask ratio must be from 0 up to"):
        stm.mask(batch, "random", ratio)


def test_unknown_strategies_are_refused_with_the_known_ones(batch: Batch) -> None:
    with pytest.raises(ValueError, match="no masking strategy 'txt_top'; there are: attention, "):
        stm.mask(batch, "txt_top", 0.6)


def test_a_teacher_computes_the_guides_of_all_clips(batch: Batch, tmp_path: Path) -> None:
    name = f"local-dir:{save_clip(tmp_path / 'clip')}"
    teacher = FrameTeacher.load(Teacher(model=name), side=4)
    attention = torch.cat([teacher.attend(video[None], 2) for video in batch["video"]])
    torch.testing.assert_close(attention[0], teacher.attend(batch["video"][:1], 2)[0])
    expected = get_strategy("attention")({**batch["guides"], "attention": attention}, 0.5)
    assert torch.equal(stm.mask(batch, "attention", 0.5, teacher=name), expected)
    assert torch.equal(stm.mask(batch, "attention", 0.5, teacher=Teacher(model=name)), expected)
    assert stm.mask(batch, "cluster", 0.5, teacher=name).shape == (3, 24)
    assert "attention" not in batch["guides"]  # the batch stays as it is
