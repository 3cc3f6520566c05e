"""Retrieval figures against loops; retrieval end to end on small shards with packed text vectors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from captioned_clips import RUN, CaptionedClip, save_fitted, write_captioned
from clip_metrics import check_clip_values
from training_shards import make_run

from stm.config import PretrainRun, Retrieval
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.features import unit
from stm.evaluation.metrics import wilson_interval
from stm.evaluation.retrieval.queries import Queries, collect_queries, first_source
from stm.evaluation.retrieval.zero_shot import rank_queries
from stm.shards.index import ClipIndex

TASK = Retrieval(task="retrieval")
WIDTH = 16


def draw_vectors(seed: int, rows: int, width: int = WIDTH) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, width)))


def loop_rank(scores: list[float], right: list[bool]) -> float:
    """Rank of the best right one: better ones before it, of equal ones their mean share."""
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    above = sum(score > best + 1e-6 for score in scores)
    tied = [is_right for score, is_right in zip(scores, right, strict=True) if abs(score - best) <= 1e-6]
    return 1 + above + tied.count(False) / (tied.count(True) + 1)


def loop_figures(queries: Queries, clips: np.ndarray, same: bool) -> dict[str, dict[str, float]]:
    """Both directions, one pair after the other; `same`: a text is right for each clip that has it."""
    texts: list[set[Any]] = [set() for _ in clips]
    for caption, clip in zip(queries.captions, queries.clips, strict=True):
        texts[clip].add(caption)
    scores = [[float(t @ c) for c in clips.astype(float)] for t in queries.vectors.astype(float)]

    def belongs(caption: int, clip: int) -> bool:
        return queries.captions[caption] in texts[clip] if same else queries.clips[caption] == clip

    numbers, members = range(len(scores)), range(len(clips))
    found = {
        "text_to_video": [loop_rank(scores[q], [belongs(q, c) for c in members]) for q in numbers],
        "video_to_text": [
            loop_rank([scores[q][c] for q in numbers], [belongs(q, c) for q in numbers]) for c in members
        ],
    }
    figures = {}
    for direction, ranks in found.items():
        recalls = {f"r{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        middle = sorted(ranks)[(len(ranks) - 1) // 2 : len(ranks) // 2 + 1]
        figures[direction] = {
            **recalls,
            "median_rank": sum(middle) / len(middle),
            "mean_rank": sum(ranks) / len(ranks),
        }
    return figures


def draw_queries(seed: int, clips: int, different: int) -> Queries:
    """One to three captions a clip, out of `different` texts; the same text has the same vector."""
    rng, vectors = np.random.default_rng(seed), draw_vectors(seed + 1, different)
    owners = np.repeat(np.arange(clips), rng.integers(1, 4, clips))
    texts = rng.integers(0, different, len(owners))
    return Queries([f"text {number}" for number in texts], owners, vectors[texts])


@pytest.mark.parametrize(("seed", "different"), [(0, 10_000), (1, 20), (2, 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_figures_are_those_of_a_loop(seed: int, different: int, tied: bool) -> None:
    queries, clips = draw_queries(seed, 30, different), draw_vectors(seed + 7, 30)
    if tied:
        clips = clips[np.arange(30) // 4]  # clips that look alike
    found = rank_queries(queries, clips)
    expected, same = loop_figures(queries, clips, False), loop_figures(queries, clips, True)
    for direction in ("text_to_video", "video_to_text"):
        assert found.metrics[direction] == pytest.approx(expected[direction])
        assert found.metrics["same_text"][direction] == pytest.approx(same[direction])
    owners = {
        text: {c for c, t in zip(queries.clips, queries.captions, strict=True) if t == text}
        for text in queries.captions
    }
    assert found.metrics["same_text"]["clips"] == len(set().union(*(o for o in owners.values() if len(o) > 1)))
    assert (found.metrics["queries"], found.metrics["clips"]) == (len(queries.captions), 30)


def test_a_constant_embedding_is_at_the_level_of_chance() -> None:
    queries = Queries([f"text {number}" for number in range(40)], np.arange(40), draw_vectors(0, 40))
    metrics = rank_queries(queries, np.repeat(draw_vectors(1, 1), 40, axis=0)).metrics
    assert metrics["text_to_video"] == {"r1": 0, "r5": 0, "r10": 0, "median_rank": 20.5, "mean_rank": 20.5}
    # All clips find the same list of captions: each caption's clip but one stands elsewhere in it.
    assert metrics["video_to_text"]["r1"] == 1 / 40 == metrics["chance"]["r1"]


def test_a_model_of_the_text_is_perfect_only_where_all_clips_of_a_text_count() -> None:
    texts = np.arange(20) // 2  # each caption twice
    vectors = draw_vectors(3, 10)[texts]
    metrics = rank_queries(Queries([f"text {n}" for n in texts], np.arange(20), vectors), vectors).metrics
    assert metrics["text_to_video"]["r1"] == 0 and metrics["text_to_video"]["mean_rank"] == 1.5
    assert metrics["same_text"]["clips"] == 20
    for direction in ("text_to_video", "video_to_text"):
        assert metrics["same_text"][direction]["r1"] == 1 == metrics["same_text"][direction]["mean_rank"]


def make_captioned(clips: int, text: np.ndarray) -> list[CaptionedClip]:
    """Three captions of `blip` and one of `human` each, but the first clip has no `blip`; text: [clips, D]."""
    told = []
    for number in range(clips):
        captions = [f"blip {number} {place}" for place in range(3) if number] + [f"human {number}"]
        sources = ["blip"] * (len(captions) - 1) + ["human"]
        vectors = draw_vectors(100 + number, len(captions))
        vectors[1 if number else 0] = text[number]  # the middle one of `blip`
        told.append(CaptionedClip(("red", "green", "blue")[number % 3], captions, sources, vectors))
    return told


def test_captions_are_those_of_the_source_evenly_spread(tmp_path: Path) -> None:
    text = draw_vectors(0, 4)
    index = ClipIndex(
        [write_captioned(tmp_path / "test" / "test-00000.parquet", [*make_captioned(4, text), CaptionedClip()])]
    )
    assert first_source(index) == "blip"
    queries, asking = collect_queries(index, "blip", 1)
    assert queries.captions == ["blip 1 1", "blip 2 1", "blip 3 1"]
    assert queries.clips.tolist() == [0, 1, 2] and asking.tolist() == [1, 2, 3]
    queries, asking = collect_queries(index, "blip", 3)
    assert queries.captions[:4] == ["blip 1 0", "blip 1 1", "blip 1 2", "blip 2 0"]
    assert queries.clips.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(np.linalg.norm(queries.vectors, axis=1), 1, rtol=1e-6)
    assert collect_queries(index, "human", 5)[0].captions == [f"human {number}" for number in range(4)]
    with pytest.raises(ValueError, match=r"has a caption of the source 'gpt'; packed sources: blip, human"):
        collect_queries(index, "gpt", 1)
    bare = ClipIndex(
        [write_captioned(tmp_path / "bare" / "test-00000.parquet", [CaptionedClip(None, ["a"], ["blip"])])]
    )
    with pytest.raises(ValueError, match="captions without text vectors"):
        collect_queries(bare, "blip", 1)
    wide = write_captioned(
        tmp_path / "wide" / "test-00000.parquet", [CaptionedClip(None, ["a"], ["blip"], np.eye(1, 5))], prefix="wide"
    )
    with pytest.raises(ValueError, match=r"vectors of 5 and 16 dimensions"):
        collect_queries(ClipIndex([tmp_path / "test" / "test-00000.parquet", wide]), "blip", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Twelve clips, the head fitted so that each is at the middle caption of `blip`; the first has none."""
    folder, text = tmp_path_factory.mktemp("retrieval"), draw_vectors(0, 12)
    index = write_captioned(folder / "test" / "test-00000.parquet", make_captioned(12, text))
    return {"index": index, "weights": save_fitted(folder / "weights.safetensors", TASK, [index], text), "text": text}


def run_task(
    made: dict[str, Any], output: Path, task: Retrieval = TASK, run: PretrainRun = RUN, **changes: Any
) -> dict[str, Any]:
    run = run.model_copy(update=changes)
    evaluate(task, run, EvaluationInputs(made["weights"], [made["index"]], output, 3, device="cpu"))
    check_clip_values(output)
    return json.loads((output / "metrics.json").read_text())


def test_retrieval_end_to_end(made: dict[str, Any], tmp_path: Path) -> None:
    metrics = run_task(made, tmp_path)
    assert (metrics["task"], metrics["source"], metrics["clips_without_caption"]) == ("retrieval", "blip", 1)
    assert (metrics["queries"], metrics["clips"]) == (11, 11)
    for direction in ("text_to_video", "video_to_text"):
        assert metrics[direction]["r1"] == 1 == metrics[direction]["mean_rank"]
        assert metrics["confidence95"][direction]["r1"] == list(wilson_interval(11, 11))
    table = pq.read_table(tmp_path / "ranks.parquet").to_pydict()
    assert table["key"] == [f"clip-{number:03d}" for number in range(1, 12)]
    assert table["caption"] == [f"blip {number} 1" for number in range(1, 12)]
    assert table["rank"] == [1] * 11 == table["caption_rank"]
    assert metrics["receipt"]["stage"] == "evaluate"


def test_each_caption_asks_and_the_best_one_answers(made: dict[str, Any], tmp_path: Path) -> None:
    metrics = run_task(made, tmp_path, TASK.model_copy(update={"count": 3}))
    assert metrics["queries"] == 33 and metrics["clips"] == 11
    # The other two captions of a clip are noise; the middle one is found, and finds it.
    assert metrics["video_to_text"]["r1"] == 1 and 1 / 3 <= metrics["text_to_video"]["r1"] < 0.7
    table = pq.read_table(tmp_path / "ranks.parquet").to_pydict()
    assert table["rank"][1::3] == [1] * 11
    assert np.mean(np.array(table["rank"]) <= 5) == pytest.approx(metrics["text_to_video"]["r5"])


def test_views_and_crops_and_workers_change_no_byte_they_should_not(made: dict[str, Any], tmp_path: Path) -> None:
    task = TASK.model_copy(update={"views": 2, "crops": 3, "source": "human"})
    for name, workers in (("first", 0), ("second", 2)):
        metrics = run_task(made, tmp_path / name, task, workers=workers)
        assert metrics["queries"] == 12 == metrics["clips"]
    for file in ("metrics.json", "ranks.parquet"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_runs_and_vectors_that_do_not_go_together_are_refused(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its run has no `contrast`"):
        run_task(made, tmp_path, contrast=None)
    narrow = write_captioned(tmp_path / "test" / "test-00000.parquet", make_captioned(3, draw_vectors(0, 3)))
    other = save_fitted(tmp_path / "weights.safetensors", TASK, [narrow], draw_vectors(0, 3, WIDTH + 1))
    with pytest.raises(ValueError, match=r"captions' vectors have 16 dimensions, and .* trained with 17"):
        run_task({**made, "weights": other}, tmp_path)
    with pytest.raises(ValueError, match="does not have this run's architecture"):
        run_task(made, tmp_path, run=make_run(frames=2, contrast={"layers": 1}))
