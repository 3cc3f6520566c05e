"""Evaluations are checked against the protocols of their benchmarks: a wrong number is refused before anything runs."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from stm.cli import main
from stm.config import Config, ConfigError, load_config, parse_config
from stm.datasets import DatasetError
from stm.datasets.video_text.protocol import protocol_names
from stm.datasets.video_text.tasks import (
    answers_file,
    candidate_answers,
    check_tasks,
    has_shared_texts,
)
from stm.evaluation import EvaluationInputs
from stm.evaluation.stage import EVALUATE
from stm.stages.jobs import Jobs

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "config"


@pytest.mark.parametrize(
    "name", ["stm", "clusterstm", "umt", "umt-large", "released", "stm-small", "clusterstm-small", "tgm-small"]
)
def test_shipped_configs_follow_the_protocols(name):
    check_tasks(load_config(CONFIGS / f"{name}.yaml"))


@pytest.mark.parametrize(
    ("task", "key", "value", "asked"),
    [
        ("msrvtt", "frames", 8, "12"),
        ("msrvtt-zero", "frames", 12, "4"),
        ("didemo", "max_tokens", 32, "64"),
        ("didemo", "validation_split", None, "val"),
        ("msrvtt", "validation_split", "test", "None"),
        ("msrvtt-qa", "max_answer_tokens", 10, "5"),
        ("activitynet", "test_split", "val", "test"),
    ],
)
def test_a_number_that_is_not_the_protocol_s_is_refused_with_what_it_must_be(task, key, value, asked):
    config = load_config(CONFIGS / "stm.yaml")
    changed = config.evaluate[task].model_copy(update={key: value})
    config = config.model_copy(update={"evaluate": {**config.evaluate, task: changed}})
    with pytest.raises(DatasetError, match=rf"evaluate\.{task}\.{key} is {value}, and .* requires {asked}"):
        check_tasks(config)


def test_a_benchmark_of_another_task_is_refused():
    config = load_config(CONFIGS / "stm.yaml")
    changed = config.evaluate["msrvtt"].model_copy(update={"dataset": "msrvtt-qa"})
    config = config.model_copy(update={"evaluate": {**config.evaluate, "msrvtt": changed}})
    with pytest.raises(DatasetError, match="is a benchmark of question_answering"):
        check_tasks(config)


def with_retrieval(source: str, results: Path) -> Config:
    """config/stm.yaml with one more evaluation, on a benchmark of that name."""
    values = load_config(CONFIGS / "stm.yaml").model_dump(mode="json") | {"results": str(results)}
    values["datasets"]["more"] = {"dataset": {"source": source, "root": "videos", "annotations": "lists"}}
    task = {"task": "video_text_retrieval", "dataset": "more", "frames": 12, "max_tokens": 25, "optimisation": {}}
    task |= {"train_split": "learn", "validation_split": "held", "test_split": "asked"}
    values["evaluate"], values["tables"] = {"more": task}, {}
    return parse_config(values)


def test_the_protocol_alone_says_that_clips_share_texts(tmp_path):
    shared = {name for name in protocol_names() if has_shared_texts(with_retrieval(name, tmp_path), "stm", "more")}
    assert shared == {"ssv2-template", "ssv2-label"}  # VindLU's `has_multi_vision_gt`
    assert not has_shared_texts(load_config(CONFIGS / "stm-small.yaml"), "umt", "retrieval")
    values = with_retrieval("ssv2-template", tmp_path).model_dump(mode="json")
    values["evaluate"]["more"]["shared_texts"] = False
    with pytest.raises(ConfigError, match="shared_texts"):
        parse_config(values)


def test_pretraining_on_a_benchmark_that_shares_texts_must_share_them(tmp_path):
    """Otherwise its 174 templates would be negatives of themselves."""
    values = with_retrieval("ssv2-template", tmp_path).model_dump(mode="json")
    values["pretrain"]["umt"]["more"] = ["more"]
    with pytest.raises(DatasetError, match=r"pretrain\.umt\.objectives\.shared_texts is false, and clips of .* share"):
        check_tasks(parse_config(values))
    values["pretrain"]["umt"]["objectives"]["shared_texts"] = True
    check_tasks(parse_config({**values, "evaluate": {}}))


def test_a_benchmark_s_questions_are_answered_from_its_own_file(tmp_path, monkeypatch):
    config = load_config(CONFIGS / "stm.yaml")
    name = "msrvtt-qa"
    dataset = config.datasets[name].dataset.model_copy(update={"annotations": str(tmp_path)})
    corpus = config.datasets[name].model_copy(update={"dataset": dataset})
    config = config.model_copy(update={"datasets": {**config.datasets, name: corpus}})
    assert answers_file(config, "umt", name) is None  # a plan needs no data
    with pytest.raises(DatasetError, match=r"there is no msrvtt_qa_answer_list\.json"):
        candidate_answers(config, "umt", name)
    path = tmp_path / "anno_downstream" / "msrvtt_qa_answer_list.json"
    path.parent.mkdir()
    path.write_text('["guitar", "man", "a man"]')
    assert answers_file(config, "umt", name) == path
    assert candidate_answers(config, "umt", name) == ("guitar", "man", "a man")
    for other in ("msrvtt", "msrvtt-mc"):  # no questions with a list
        assert answers_file(config, "umt", other) is None and candidate_answers(config, "umt", other) == ()
    small = load_config(CONFIGS / "stm-small.yaml")
    assert candidate_answers(small, "umt", "questions") == ()
    # The rule reads the file, so that another list runs the evaluation again.
    monkeypatch.setattr("stm.stages.jobs.Jobs._read_shards", lambda self, _: ["train-0", "val-0", "test-0"])
    job = Jobs(config).make(dataset="webvid", run="umt", task=name)
    assert EVALUATE.inputs(job)["answers"] == path and "train" in EVALUATE.inputs(job)
    # A release is not trained: its questions need the training split for nothing but the answers of a benchmark without a list.
    questions = config.evaluate[name]
    none = questions.model_copy(update={"optimisation": questions.optimisation.model_copy(update={"epochs": 0})})
    released = config.model_copy(update={"evaluate": {name: none}})
    assert EVALUATE.inputs(Jobs(released).make(dataset="webvid", run="umt", task=name)).keys() >= {"test", "answers"}
    assert "train" not in EVALUATE.inputs(Jobs(released).make(dataset="webvid", run="umt", task=name))
    assert none.splits_for(own_answers=False) == {"train": "train", "test": "test"}
    assert "answers" not in EVALUATE.inputs(Jobs(config).make(dataset="webvid", run="umt", task="msrvtt"))
    # And the stage hands its answers to the evaluation.
    passed: list[EvaluationInputs] = []
    monkeypatch.setattr("stm.evaluation.launch.run_evaluation", lambda _task, _run, inputs: passed.append(inputs))
    for task, expected in ((name, ("guitar", "man", "a man")), ("msrvtt", ())):
        job = Jobs(config).make(dataset="webvid", run="umt", task=task)
        EVALUATE.run(job, EVALUATE.inputs(job), EVALUATE.outputs(job), 1)
        assert passed[-1].answers == expected


@pytest.mark.parametrize(("source", "shared"), [("ssv2-template", True), ("msvd", False)])
def test_command_and_workflow_pass_on_splits_seed_and_what_the_protocol_says(source, shared, tmp_path, monkeypatch):
    config, passed = with_retrieval(source, tmp_path), []
    monkeypatch.setattr("stm.evaluation.launch.run_evaluation", lambda *given: passed.append(given))
    splits = ("learn", "held", "asked")
    monkeypatch.setattr("stm.stages.jobs.Jobs._read_shards", lambda self, _: [f"{split}-00000" for split in splits])
    monkeypatch.setattr("stm.cli.load", lambda _: config)
    monkeypatch.setattr("stm.datasets.video_text.tasks.check_tasks", lambda _: None)
    assert main(["evaluate", "--config", "any.yaml", "--run", "stm"]) in (None, 0)
    files = {
        use: [f"more/shards/{split}/x"] for use, split in zip(("train", "validation", "test"), splits, strict=True)
    }
    job = SimpleNamespace(
        rule="evaluate",
        config=config.model_dump(mode="json", exclude_none=True),
        wildcards={"run": "stm", "task": "more", "dataset": "webvid"},
        input={"weights": "w", **files},
        output={"metrics": str(tmp_path / "metrics.json")},
        threads=1,
        resources={"gpu": 1},
        log=[str(tmp_path / "log.txt")],
    )
    runpy.run_path(str(ROOT / "workflow/scripts/stage.py"), {"snakemake": job})
    (_, _, by_hand), (_, _, by_rule) = passed
    for inputs in (by_hand, by_rule):
        assert (inputs.shared_texts, inputs.seed) == (shared, config.seed)
        found = [[path.parent.name for path in indexes] for indexes in (inputs.train, inputs.validation, inputs.test)]
        assert found == [["learn"], ["held"], ["asked"]]
        assert all(path.parents[2].name == "more" for path in (*inputs.train, *inputs.validation, *inputs.test))
    for task, run, _ in passed:
        assert (task, run) == (config.evaluate["more"], config.runs["stm"])


def test_packing_captions_of_a_benchmark_of_questions_is_refused_before_every_clip_is_dropped():
    config = load_config(CONFIGS / "stm.yaml")
    corpus = config.datasets["msvd-qa"]
    changed = corpus.model_copy(update={"pack": corpus.pack.model_copy(update={"captions": "human"})})
    config = config.model_copy(update={"datasets": {**config.datasets, "msvd-qa": changed}})
    with pytest.raises(DatasetError, match=r"datasets\.msvd-qa\.pack\.captions is human, and MSVD-QA has questions"):
        check_tasks(config)
