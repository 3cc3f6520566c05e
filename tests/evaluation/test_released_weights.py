"""Released weights evaluated without training: ranks, answers, choices and classes as the formulas of the models give them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from language_runs import make_run, make_small_bert
from torch import Tensor
from training_shards import make_shard
from umt_release import (
    EMBEDDING,
    FUSION,
    Formulas,
    fill,
    linear_shapes,
    make_release,
    norm_shapes,
    rank_of,
    video_shapes,
)

from stm.config import (
    FineTune,
    LanguageRun,
    LanguageTask,
    MultipleChoice,
    PretrainRun,
    QuestionAnswering,
    VideoTextRetrieval,
)
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.language_clips import open_clips
from stm.models.text.tokenizer import load_tokenizer
from stm.models.weights.checks import WeightsError
from stm.pretrained.hub import find_model
from stm.storage.files import read_json
from stm.storage.tables import read_receipt, read_table, write_table
from stm.training.release import convert_release

NONE = {"epochs": 0}
COLORS = ["red", "blue", "green"]


def make_asking_shard(index: Path, clips: int, seed: int, prefix: str) -> None:
    """A shard with two captions and two questions per clip, one of them with choices, about the clip's color."""
    labels: list[str | None] = [COLORS[number % 3] for number in range(clips)]
    make_shard(index, labels, seed, prefix)
    rows = read_table(index).to_pylist()
    for row, color in zip(rows, labels, strict=True):
        row["captions"] = [f"A {color} circle moves!", f"{color} {row['key'][-1]}"]
        choices = [f"a {other} star" for other in COLORS]
        row["questions"] = [
            {"question": "what color is it", "answer": color, "choices": None},
            {"question": "which", "answer": f"a {color} star", "choices": choices},
        ]
    schema = pq.read_schema(index).remove_metadata()
    write_table(index, type(read_table(index)).from_pylist(rows, schema=schema), read_receipt(index))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    make_small_bert(folder / "bert")
    make_asking_shard(folder / "train" / "train-00000.parquet", 12, 0, "train")
    make_asking_shard(folder / "test" / "test-00000.parquet", 9, 2, "test")
    return folder


def release(folder: Path, kind: str, drop: str | None = None) -> tuple[LanguageRun, dict[str, Tensor]]:
    """A run of a release with random weights, converted; a tensor may be left out of its file."""
    bert = str(folder / "bert")
    vocabulary = load_tokenizer(find_model(bert)).vocabulary
    state = make_release(kind, vocabulary, seed=len(kind))
    saved = {name: tensor for name, tensor in state.items() if name != drop}
    torch.save({"model": saved}, folder / f"{kind}.pth")
    language = {"model": bert, "fusion_layer": FUSION, "max_tokens": 8, "embedding": EMBEDDING, "tokenization": "umt"}
    run = make_run(
        "umt",
        bert,
        image_size=32,
        patch_size=8,
        language=language,
        release=str(folder / f"{kind}.pth"),
        optimisation={},
    )
    convert_release(run, folder / kind)
    return run, state


def do(
    task: Any, run: Any, folder: Path, kind: str, training: bool = False, **more: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    output = folder / kind / task.task
    train = [folder / "train" / "train-00000.parquet"] if training else []
    test = [folder / "test" / "test-00000.parquet"]
    weights = folder / kind / "weights.safetensors"
    evaluate(task, run, EvaluationInputs(weights, test, output, 0, train=train, device="cpu", **more))
    return read_json(output / "metrics.json"), pq.read_table(output / "predictions.parquet").to_pylist()


def clips_of(task: LanguageTask, run: LanguageRun, folder: Path) -> tuple[Tensor, Any]:
    """The pixels of the test clips, uint8 [V, T, 3, S, S], and their dataset."""
    dataset = open_clips(task, run, [folder / "test" / "test-00000.parquet"], 0, False)
    return torch.stack([torch.as_tensor(dataset[number][0]["video"]) for number in range(len(dataset))]), dataset


@pytest.mark.parametrize(("kind", "optimisation"), [("pretrained", None), ("retrieval", NONE)])
def test_ranks_are_those_of_the_released_model(kind: str, optimisation: dict[str, int] | None, folder: Path) -> None:
    run, state = release(folder, kind)
    task = VideoTextRetrieval.model_validate({"task": "video_text_retrieval", "optimisation": optimisation})
    assert task.splits == {"test": "test"}, "nothing is trained: the training split is not needed"
    metrics, rows = do(task, run, folder, kind)
    assert metrics["checkpoint"]["chosen"] == ("pretrained" if optimisation is None else "released, fine-tuned")
    video, dataset = clips_of(task, run, folder)
    formulas = Formulas(state)
    texts = [row["caption"] for row in rows]
    tokens = load_tokenizer(find_model(str(folder / "bert")), "umt").encode(texts, 8)
    features = formulas.video(video)
    cosines, logits = formulas.similarity(features, 4, tokens).T, formulas.match(features, tokens)[..., 1].T
    keys = [dataset.index[number].key for number in range(len(dataset))]
    for row, cosine, logit in zip(rows, cosines.tolist(), logits.tolist(), strict=True):
        right = keys.index(row["keys"][0])
        assert (row["rank"], row["reranked"]) == (rank_of(cosine, right), rank_of(logit, right))
    assert len({row["reranked"] for row in rows}) > 2


@pytest.mark.parametrize("own", [None, ("red", "a blue star", "blue", "a green star")], ids=["training's", "own"])
def test_answers_are_those_of_the_released_decoder(own: tuple[str, ...] | None, folder: Path) -> None:
    """Of the training answers, or of the benchmark's own list: then the training split is not read."""
    run, state = release(folder, "questions")
    task = QuestionAnswering.model_validate(
        {"task": "question_answering", "optimisation": NONE, "max_tokens": 8, "ranking": "albef"}
    )
    metrics, rows = do(task, run, folder, "questions", training=own is None, answers=own or ())
    assert metrics["checkpoint"] == {"chosen": "released, fine-tuned"}
    # Each of nine clips has two questions: three colors and three sentences, each right three times.
    assert metrics["most_frequent_answer"] == pytest.approx(1 / 6)
    video, dataset = clips_of(task, run, folder)
    tokenizer, formulas = load_tokenizer(find_model(str(folder / "bert")), "umt"), Formulas(state)
    answers = list(own or ("a blue star", "a green star", "a red star", "blue", "green", "red"))
    keys = [dataset.index[number].key for number in range(len(dataset))]
    features = formulas.video(video)[[keys.index(row["key"]) for row in rows]]
    questions = tokenizer.encode([row["question"] for row in rows], 8)
    targets = tokenizer.encode_targets(answers, 5)
    assert targets[answers.index("blue")].tolist()[2:] == [tokenizer.sep_id, 0, 0] and tokenizer.sep_id not in questions
    scores = formulas.answer_scores(questions, features, targets)
    assert [row["answer"] for row in rows] == [answers[best] for best in scores.argmax(1).tolist()]
    assert len({row["answer"] for row in rows}) > 1


def test_a_benchmark_s_own_list_needs_no_training_questions(folder: Path) -> None:
    run, _ = release(folder, "questions")
    task = QuestionAnswering.model_validate({"task": "question_answering", "optimisation": NONE, "max_tokens": 8})
    answers = ("a blue star", "a green star", "a red star", "blue", "green", "red")
    expected, with_training = do(task, run, folder, "questions", training=True, answers=answers)
    found, rows = do(task, run, folder, "questions", answers=answers)
    assert rows == with_training and len({row["answer"] for row in rows}) > 1
    assert found["accuracy"] == expected["accuracy"] and found["answers_from"] == "benchmark"
    # 18 questions about 9 clips, 3 of each color: every answer is that of 3 questions.
    assert found["most_frequent_answer"] == found["headline"]["chance"] == 3 / 18
    assert "train" in expected["receipt"] and "train" not in found["receipt"]


def test_choices_are_those_of_the_released_model(folder: Path) -> None:
    run, state = release(folder, "retrieval")
    task = MultipleChoice.model_validate({"task": "multiple_choice", "optimisation": NONE, "matching_weight": 1.0})
    _, rows = do(task, run, folder, "retrieval")
    video, dataset = clips_of(task, run, folder)
    tokenizer, formulas = load_tokenizer(find_model(str(folder / "bert")), "umt"), Formulas(state)
    for number, row in enumerate(rows):
        clip = dataset.index[number]
        choices = next(list(question.choices) for question in clip.questions if question.choices)
        logits = formulas.match(formulas.video(video[number : number + 1]), tokenizer.encode(choices, 8))[0]
        assert (row["key"], row["choice"]) == (clip.key, choices[int(logits.softmax(-1)[:, 1].argmax())])


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        (
            "questions",
            VideoTextRetrieval(task="video_text_retrieval"),
            "no retrieval heads, which video_text_retrieval needs",
        ),
        ("questions", MultipleChoice(task="multiple_choice"), "no retrieval heads, which multiple_choice needs"),
        (
            "retrieval",
            QuestionAnswering(task="question_answering"),
            "no language modelling head, which question_answering",
        ),
        (
            "retrieval",
            QuestionAnswering.model_validate({"task": "question_answering", "optimisation": NONE}),
            "holds no 'answers'",
        ),
    ],
)
def test_a_task_is_refused_whose_weights_a_release_lacks(kind: str, task: Any, message: str, folder: Path) -> None:
    run, _ = release(folder, kind)
    with pytest.raises(WeightsError, match=message):
        do(task, run, folder, kind, training=True)


@pytest.mark.parametrize(
    ("kind", "missing", "message"),
    [
        ("pretrained", "itm_head.bias", "1 missing: matching_head.bias"),
        (
            "retrieval",
            "text_encoder.encoder.layer.2.crossattention.self.key.bias",
            "1 missing: language.fusion_layers.0",
        ),
        ("questions", "text_decoder.bert.encoder.layer.0.output.dense.bias", "1 missing: bert.encoder.layer.0.output"),
        ("questions", "vision_encoder.encoder.blocks.2.norm1.bias", "1 missing: encoder.blocks.2.norm1.bias"),
    ],
)
def test_a_release_with_a_missing_tensor_is_refused(kind: str, missing: str, message: str, folder: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        release(folder, kind, drop=missing)


# ------------------------------------------------------------------------------------------------------- classifiers


def classify(folder: Path, names: list[str] | None = None, classes: int = 3, **changes: Any) -> tuple[Any, Any, Tensor]:
    """A released classifier of VideoMAE's layout, evaluated: metrics, predictions, and probabilities by formula."""
    shapes = video_shapes("") | norm_shapes("fc_norm") | linear_shapes("head", classes, 128)
    state = fill({name: shape for name, shape in shapes.items() if not name.startswith("norm.")}, 3)
    state["head.weight"] *= 20
    torch.save({"model": state}, folder / "classifier.pth")
    run = PretrainRun.model_validate(
        {"model": "tiny", "image_size": 32, "patch_size": 8, "tubelet": 1, "frames": 4, "workers": 0}
        | {"release": str(folder / "classifier.pth")}
    )
    convert_release(run, folder / "classifier")
    settings: dict[str, Any] = {"task": "finetune", "optimisation": NONE, "views": 2, **changes}
    if names is not None:
        (folder / "names.txt").write_text("\n".join(names) + "\n")
        settings["classes"] = str(folder / "names.txt")
    task = FineTune.model_validate(settings)
    assert task.splits == {"test": "test"}
    metrics, rows = do(task, run, folder, "classifier")
    test = clips_to_test(task, run, [folder / "test" / "test-00000.parquet"], 0)
    formulas = Formulas(state)
    probabilities = []
    for number in range(len(test)):
        views = torch.stack([torch.as_tensor(sample["video"]) for sample in test[number]])
        pooled = formulas.norm(formulas.video(views, "", last_norm=False).mean(1), "fc_norm", 1e-6)
        probabilities.append(formulas.linear(pooled, "head").softmax(-1).mean(0))
    return metrics, rows, torch.stack(probabilities)


@pytest.mark.parametrize("names", [None, ["green", "red", "blue"]])
def test_classes_are_those_of_the_released_classifier(names: list[str] | None, folder: Path) -> None:
    """In alphabetical order, or in that of a file."""
    _, rows, probabilities = classify(folder, names)
    order = names or sorted(COLORS)
    assert [row["prediction"] for row in rows] == [order[best] for best in probabilities.argmax(1).tolist()]
    np.testing.assert_allclose([row["probability"] for row in rows], probabilities.amax(1).numpy(), rtol=1e-4)
    assert len({row["prediction"] for row in rows}) > 1


def test_names_that_are_too_few_or_double_are_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"4 classes, and the labels of the test split 3 names, 3 of them different"):
        classify(folder, classes=4)
    with pytest.raises(WeightsError, match=r"names.txt 3 names, 2 of them different: give a file"):
        classify(folder, ["red", "blue", "red"])


def test_weights_without_a_classifier_are_refused(folder: Path) -> None:
    run, _ = release(folder, "pretrained")
    with pytest.raises(WeightsError, match="has no classifier to test"):
        do(FineTune.model_validate({"task": "finetune", "optimisation": NONE}), run, folder, "pretrained")
    state = {name: tensor for name, tensor in make_release("pretrained", 18).items() if ".encoder." in name}
    encoder = {
        n.removeprefix("vision_encoder."): t for n, t in state.items() if n.startswith("vision_encoder.encoder.")
    }
    torch.save(encoder, folder / "encoder.pth")
    plain = PretrainRun.model_validate(
        {
            "model": "tiny",
            "image_size": 32,
            "patch_size": 8,
            "tubelet": 1,
            "frames": 4,
            "release": str(folder / "encoder.pth"),
        }
    )
    with pytest.raises(WeightsError, match=r"has no classifier, .*; to probe or fine-tune it, give it as `init`"):
        convert_release(plain, folder / "plain")
