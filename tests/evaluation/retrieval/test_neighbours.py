"""Retrieval of clips by clips, against loops over all pairs and against enumeration."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clip_metrics import check_clip_values
from color_clips import LABELS, RUN, make_splits
from pydantic import ValidationError
from training_shards import FRAMES, make_run, make_shard

from stm.config import LinearProbe, PretrainRun, VideoRetrieval
from stm.data.dataset import ClipDataset
from stm.data.sampling import view_windows
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import unit
from stm.evaluation.metrics import wilson_interval
from stm.evaluation.retrieval.neighbours import (
    Search,
    chance_recall,
    neighbour_metrics,
    rank_search,
    search_classes,
    search_clips,
)
from stm.models.weights import zoo

BY_CLASS = VideoRetrieval(task="video_retrieval")
BY_CLIP = VideoRetrieval(task="video_retrieval", hit="clip", views=2)


def draw(seed: int, *shape: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=shape))


def loop_rank(query: np.ndarray, candidates: np.ndarray, right: set[int], itself: int | None = None) -> float:
    """The rank of the best right candidate, one pair after the other."""
    scores = {place: float(query @ vector) for place, vector in enumerate(candidates) if place != itself}
    if not right:
        return float("inf")
    best = max(scores[place] for place in right)
    return 1 + sum(score > best + 1e-6 for score in scores.values())


@pytest.mark.parametrize("same_split", [False, True])
def test_ranks_by_class_are_those_of_a_loop(same_split: bool) -> None:
    rng = np.random.default_rng(0)
    labels = [str(label) if label else None for label in rng.integers(0, 5, 40)]
    labels[7] = "only once"
    theirs = labels if same_split else [str(label) if label else None for label in rng.integers(0, 4, 60)]
    queries, candidates = draw(1, 40, 8), draw(2, len(theirs), 8)
    search = search_classes(queries, candidates, labels, theirs, same_split)
    ranks = rank_search(search)
    asked = [place for place, label in enumerate(labels) if label is not None]
    shown = [place for place, label in enumerate(theirs) if label is not None]
    expected = []
    for place in asked:
        itself = shown.index(place) if same_split else None
        right = {n for n, other in enumerate(shown) if theirs[other] == labels[place] and n != itself}
        expected.append(loop_rank(queries[place], candidates[shown], right, itself))
    assert search.clips.tolist() == asked
    assert ranks.tolist() == expected
    assert np.isinf(ranks[asked.index(7)])
    metrics = neighbour_metrics(search, ranks)
    for depth in (1, 5, 10):
        hits = sum(rank <= depth for rank in expected)
        assert metrics[f"r{depth}"] == pytest.approx(hits / len(asked))
        assert metrics["confidence95"][f"r{depth}"] == pytest.approx(list(wilson_interval(hits, len(asked))))
    assert (metrics["queries"], metrics["candidates"]) == (len(asked), len(shown) - same_split)


def test_ranks_by_clip_compare_the_first_window_with_the_second_of_every_clip() -> None:
    """Three crops of each of two windows; their unit vectors are added."""
    vectors = draw(3, 9, 6, 8)
    first = [sum(crops[:3]) / np.linalg.norm(sum(crops[:3])) for crops in vectors.astype(float)]
    second = [sum(crops[3:]) / np.linalg.norm(sum(crops[3:])) for crops in vectors.astype(float)]
    search = search_clips(vectors, np.array([0, 2, 5, 8]))
    expected = [loop_rank(first[clip], np.array(second), {clip}) for clip in (0, 2, 5, 8)]
    assert rank_search(search).tolist() == expected
    assert neighbour_metrics(search, rank_search(search))["candidates"] == 9


@pytest.mark.parametrize(("right", "candidates"), [(0, 4), (1, 4), (2, 5), (3, 6), (6, 6)])
@pytest.mark.parametrize("depth", [1, 2, 5, 10])
def test_chance_is_that_of_all_orders(right: int, candidates: int, depth: int) -> None:
    orders = list(permutations(range(candidates)))
    hits = sum(any(place < right for place in order[:depth]) for order in orders)
    assert chance_recall(right, candidates, depth) == pytest.approx(hits / len(orders))


def test_chance_is_the_mean_over_queries_and_a_constant_feature_reaches_no_more() -> None:
    """Of 100 candidates 1 is right for two queries and 50 for the others: R@1 is 1 % or 50 % by chance."""
    right = [np.arange(1), np.arange(1), np.arange(50), np.arange(50)]
    constant = np.repeat(draw(0, 1, 8), 100, axis=0)
    search = Search(np.arange(4), constant[:4], constant, right)
    metrics = neighbour_metrics(search, rank_search(search))
    assert metrics["chance"]["r1"] == pytest.approx((0.01 + 0.01 + 0.5 + 0.5) / 4)
    assert metrics["r1"] == 0


# ------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_splits(tmp_path_factory.mktemp("neighbours"))


def run_task(task: VideoRetrieval, made: dict[str, Path], output: Path, run: PretrainRun = RUN) -> dict[str, Any]:
    train = [made["train"]] if task.hit == "class" else []
    evaluate(task, run, EvaluationInputs(made["weights"], [made["test"]], output, 3, train=train, device="cpu"))
    check_clip_values(output)
    return json.loads((output / "metrics.json").read_text())


def pooled(weights: Path, clips: ClipDataset) -> np.ndarray:
    """The mean token of each view of each clip, one view at a time: [clips, views, D]."""
    encoder = zoo.load_encoder(weights).eval()
    with torch.no_grad():
        tokens = [[encoder(torch.from_numpy(view["video"])[None])[0] for view in clips[n]] for n in range(len(clips))]
    return np.array([[view.mean(0).numpy() for view in views] for views in tokens])


def ranks_in(output: Path) -> dict[str, float]:
    table = pq.read_table(output / "ranks.parquet").to_pydict()
    return dict(zip(table["key"], table["rank"], strict=True))


def test_by_class_end_to_end(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = run_task(BY_CLASS, made, tmp_path)
    test = clips_to_test(BY_CLASS, RUN, [made["test"]], 3)
    train = clips_to_test(LinearProbe(task="linear"), RUN, [made["train"]], 3)
    queries, candidates = unit(pooled(made["weights"], test)[:, 0]), unit(pooled(made["weights"], train)[:, 0])
    right = [{place for place in range(15) if place % 3 == number % 3} for number in range(9)]
    expected = {f"test-{n:03d}": loop_rank(queries[n], candidates, right[n]) for n in range(9)}
    assert ranks_in(tmp_path) == expected
    assert metrics["r1"] == sum(rank == 1 for rank in expected.values()) / 9
    # 5 of 15 candidates are right; 10 wrong ones can fill the first ten places.
    assert metrics["chance"]["r1"] == pytest.approx(1 / 3)
    assert metrics["chance"]["r10"] == pytest.approx(1 - 1 / 3003)
    assert (metrics["queries"], metrics["candidates"], metrics["without_candidate"]) == (9, 15, 0)
    assert metrics["headline"]["name"] == "r1" and metrics["headline"]["chance"] == metrics["chance"]["r1"]


def test_clips_with_one_window_are_candidates_but_no_queries(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = np.isin(np.arange(9), (2, 7))
    monkeypatch.setattr("stm.evaluation.retrieval.neighbours.shared_frames", lambda _: np.where(short, 1.0, 0.5))
    metrics = run_task(BY_CLIP, made, tmp_path)
    assert set(ranks_in(tmp_path)) == {f"test-{n:03d}" for n in range(9) if not short[n]}
    assert (metrics["queries"], metrics["candidates"], metrics["clips_with_one_window"]) == (7, 9, 2)


def test_by_clip_end_to_end(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = run_task(BY_CLIP, made, tmp_path)
    test = clips_to_test(BY_CLIP, RUN, [made["test"]], 3)
    vectors = unit(pooled(made["weights"], test))
    expected = {f"test-{n:03d}": loop_rank(vectors[n, 0], vectors[:, 1], {n}) for n in range(9)}
    assert ranks_in(tmp_path) == pytest.approx(expected)
    assert metrics["chance"] == {"r1": pytest.approx(1 / 9), "r5": pytest.approx(5 / 9), "r10": 1}
    first, second = view_windows(2, RUN.frames, RUN.stride, FRAMES, RUN.sampling)
    assert metrics["shared_frames"] == pytest.approx(len({*first} & {*second}) / RUN.frames)
    assert metrics["clips_with_one_window"] == 0
    assert BY_CLIP.splits == {"test": "test"} and BY_CLASS.splits == {"train": "train", "test": "test"}


def test_a_clip_does_not_find_itself_in_its_own_split(made: dict[str, Path], tmp_path: Path) -> None:
    task = BY_CLASS.model_copy(update={"train_split": "test"})
    metrics = run_task(task, {**made, "train": made["test"]}, tmp_path)
    assert (metrics["candidates"], metrics["chance"]["r1"]) == (8, pytest.approx(2 / 8))
    clips = clips_to_test(BY_CLASS, RUN, [made["test"]], 3)
    vectors = unit(pooled(made["weights"], clips)[:, 0])
    expected = {
        f"test-{n:03d}": loop_rank(vectors[n], vectors, {p for p in range(n % 3, 9, 3) if p != n}, n) for n in range(9)
    }
    assert ranks_in(tmp_path) == expected


def test_a_run_needs_neither_contrast_nor_text() -> None:
    assert RUN.contrast is None
    assert BY_CLASS.suits(RUN) and BY_CLASS.needs is None and BY_CLASS.packed_vectors is None


def test_labels_without_candidates_are_misses_and_missing_labels_are_left_out(
    made: dict[str, Path], tmp_path: Path
) -> None:
    labels = [*LABELS, None, "purple"]
    test = make_shard(tmp_path / "test" / "test-00000.parquet", labels, seed=5, prefix="test")
    metrics = run_task(BY_CLASS, {**made, "test": test}, tmp_path / "out")
    assert (metrics["queries"], metrics["unlabelled_clips"], metrics["without_candidate"]) == (4, 1, 1)
    assert np.isinf(ranks_in(tmp_path / "out")["test-004"]) and metrics["r10"] <= 3 / 4
    assert metrics["chance"]["r1"] == pytest.approx(3 / 4 * 5 / 15)


def test_clips_without_a_second_window_are_refused_with_a_remedy(made: dict[str, Path], tmp_path: Path) -> None:
    long = BY_CLIP.model_copy(update={"stride": FRAMES})
    with pytest.raises(ValueError, match=r"long enough for two different windows.*hit: class"):
        run_task(long, made, tmp_path)
    with pytest.raises(ValidationError, match="set views to 2 instead of 1"):
        VideoRetrieval(task="video_retrieval", hit="clip")
    with pytest.raises(ValueError, match="does not have this run's architecture"):
        run_task(BY_CLASS, made, tmp_path, make_run(frames=2))
