"""Zero-shot classification with the demo's text encoder, end to end and against a computation by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captioned_clips import RUN, CaptionedClip, save_fitted, write_captioned

from stm.config import Text, ZeroShot
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.classification.zero_shot import embed_labels, spell
from stm.methods.contrast_head import load_embedder
from stm.pretrained.text_encoder import TextEncoder

CLIP = Path(__file__).parents[3] / "stm" / "assets" / "demo-clip"
TEXT = Text(model=f"local-dir:{CLIP}")
LABELS = ["blue", "green", "red"]
TEMPLATES = ("a {} square", "the {} circle moves")
TASK = ZeroShot(task="zero_shot", templates=TEMPLATES, views=2)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return embed_labels(LABELS, TEMPLATES, TextEncoder.load(TEXT, "cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> dict[str, Path]:
    """Weights fitted on other clips than those to be tested."""
    folder, labels = tmp_path_factory.mktemp("zero-shot"), LABELS * 30
    fitted = write_captioned(
        folder / "train" / "train-00000.parquet", [CaptionedClip(label) for label in labels], seed=1
    )
    test = write_captioned(
        folder / "test" / "test-00000.parquet", [*(CaptionedClip(label) for label in LABELS * 5), CaptionedClip(None)]
    )
    wanted = vectors[[LABELS.index(label) for label in labels]]
    return {"test": test, "weights": save_fitted(folder / "weights.safetensors", TASK, [fitted], wanted)}


def run_task(made: dict[str, Path], output: Path, task: ZeroShot = TASK, text: Text | None = TEXT) -> dict[str, Any]:
    evaluate(task, RUN, EvaluationInputs(made["weights"], [made["test"]], output, 3, text=text, device="cpu"))
    return json.loads((output / "metrics.json").read_text())


def test_a_clip_gets_the_label_whose_sentence_it_is_nearest_to(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = run_task(made, tmp_path)
    assert metrics["top1"] > 0.8 and metrics["top5"] == 1.0 and metrics["top5_of"] == 3
    assert (metrics["task"], metrics["train_clips"], metrics["test_clips"]) == ("zero_shot", 0, 15)
    assert metrics["unlabelled_clips"] == 1 and set(metrics["per_class"]) == set(LABELS)
    low, high = metrics["confidence95"]
    assert low < metrics["top1"] <= high
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert table["label"] == LABELS * 5 and table["key"][0] == "clip-000"
    assert np.mean(np.equal(table["label"], table["prediction"])) == pytest.approx(metrics["top1"])
    # The receipt names the model without its folder, which differs between machines.
    assert metrics["receipt"]["settings"]["text"]["model"] == f"local-dir:{Path(CLIP).name}"


def test_probabilities_are_softmax_of_cosines_averaged_over_views(
    made: dict[str, Path], tmp_path: Path, vectors: np.ndarray
) -> None:
    run_task(made, tmp_path)
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    embedder, clips = load_embedder(made["weights"]), clips_to_test(TASK, RUN, [made["test"]], 3)
    for number in (0, 7):
        video = torch.from_numpy(np.stack([view["video"] for view in clips[number]]))
        with torch.inference_mode():
            logits = embedder(video) @ torch.from_numpy(vectors).T / 0.1
        probability, place = logits.softmax(1).mean(0).max(0)
        assert table["prediction"][number] == LABELS[int(place)]
        assert table["probability"][number] == pytest.approx(float(probability), abs=1e-4)


def test_label_vectors_are_the_mean_over_templates_of_unit_length() -> None:
    class Axes(TextEncoder):
        """The first template on the first axis, all else on the axis of the label."""

        def _encode(self, texts: list[str]) -> np.ndarray:
            axes = [0 if text.startswith("a ") else 1 + LABELS.index(text.split()[-1]) for text in texts]
            return np.eye(4, dtype=np.float32)[axes]

    found = embed_labels(LABELS, ("a {}", "one {}", "two {}"), Axes())
    np.testing.assert_allclose(found[1], np.array([1, 0, 2, 0]) / np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("brushing_teeth", "brushing teeth"),
        ("ApplyEyeMakeup", "Apply Eye Makeup"),
        ("Pushing an iPhone from left to right", "Pushing an iPhone from left to right"),
        ("red", "red"),
    ],
)
def test_labels_are_spelt_as_words(label: str, words: str) -> None:
    assert spell(label) == words


def test_what_cannot_be_compared_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="requires the text encoder"):
        run_task(made, tmp_path, text=None)
    bare = write_captioned(tmp_path / "test" / "test-00000.parquet", [CaptionedClip(None)] * 2)
    with pytest.raises(ValueError, match="none of the 2 clips of the test split has a label"):
        run_task({**made, "test": bare}, tmp_path)
    single = write_captioned(tmp_path / "one" / "test-00000.parquet", [CaptionedClip("red")] * 2)
    with pytest.raises(ValueError, match="all test clips have the label 'red'"):
        run_task({**made, "test": single}, tmp_path)
