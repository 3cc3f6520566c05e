"""The rows of zero-shot retrieval against loops over single clips and captions."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from captioned_clips import RUN, CaptionedClip, save_fitted, write_captioned

from stm.config import Retrieval
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import unit
from stm.methods.contrast_head import load_embedder
from stm.storage.files import read_json

TASK = Retrieval(task="retrieval", views=2, source="people", count=2)


def test_each_caption_s_rank_and_that_of_its_clip_s_best_caption(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    text = unit(rng.normal(size=(7, 3, 16))).astype(np.float16)
    sources = ["machine", "people", "people"]
    clips = [
        CaptionedClip(("red", "green", "blue")[n % 3], [f"{n} {k}" for k in range(3)], sources, text[n])
        for n in range(7)
    ]
    clips[2] = CaptionedClip("red", ["other"], ["machine"], text[2, :1])
    index = write_captioned(tmp_path / "test" / "test-00000.parquet", clips)
    # Near one of a clip's captions, but not so near as to be found by all.
    wanted = text[:, 1].astype(np.float64) + 1.6 * unit(rng.normal(size=(7, 16)))
    weights = save_fitted(tmp_path / "weights.safetensors", TASK, [index], wanted)
    evaluate(TASK, RUN, EvaluationInputs(weights, [index], tmp_path, 3, device="cpu"))

    embedder, dataset = load_embedder(weights), clips_to_test(TASK, RUN, [index], 3)
    asked = [n for n in range(7) if n != 2]
    vectors = {}
    for number in asked:
        with torch.inference_mode():
            views = [embedder(torch.from_numpy(view["video"])[None])[0].numpy() for view in dataset[number]]
        assert len(views) == 2
        vectors[number] = sum(views) / np.linalg.norm(sum(views))
    captions = [(n, k) for n in asked for k in (1, 2)]
    scores = {(n, k): {m: float(unit(text[n, k].astype(float)) @ vectors[m]) for m in asked} for n, k in captions}
    rank = {pair: 1 + sum(scores[pair][m] > scores[pair][pair[0]] for m in asked) for pair in captions}
    best = {n: min(1 + sum(scores[other][n] > scores[n, k][n] for other in captions) for k in (1, 2)) for n in asked}
    rows = pq.read_table(tmp_path / "ranks.parquet").to_pylist()
    assert [(row["key"], row["caption"], row["rank"], row["caption_rank"]) for row in rows] == [
        (f"clip-{n:03d}", f"{n} {k}", rank[n, k], best[n]) for n, k in captions
    ]
    assert len(set(rank.values())) > 2 and len(set(best.values())) > 1 and list(best.values()) != list(rank.values())
    found = read_json(tmp_path / "metrics.json")
    for way, ranks in (("text_to_video", rank), ("video_to_text", best)):
        for depth in (1, 5):
            assert found[way][f"r{depth}"] == np.mean([value <= depth for value in ranks.values()])
    assert (found["source"], found["queries"], found["clips"], found["clips_without_caption"]) == ("people", 12, 6, 1)
    assert found["headline"]["value"] == found["text_to_video"]["r1"]
