"""Every task of the config is declared, and what a task says of itself is what `evaluate` and the config go by."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest

from stm import evaluation
from stm.config import EvaluationTask, LinearProbe, PretrainRun, Retrieval, VideoTextRetrieval, ZeroShot
from stm.config.language_tasks import LanguageOptimisation
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.task import Metric, Task, look_up
from stm.evaluation.tasks import TASKS

SECTIONS = {
    section.model_fields["task"].annotation.__args__[0]: section for section in get_args(get_args(EvaluationTask)[0])
}


def test_every_task_of_the_config_is_declared_with_its_section() -> None:
    assert {name: task.section for name, task in TASKS.items()} == SECTIONS


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_a_declared_function_takes_settings_run_inputs_and_process(name: str) -> None:
    code = TASKS[name].load().__code__
    assert code.co_varnames[: code.co_argcount] == ("task", "run", "inputs", "process")


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_metrics_are_named_once_and_the_lower_ranks_are_better(name: str) -> None:
    names = [metric.name for metric in TASKS[name].metrics]
    assert len(names) == len(set(names))
    assert all(metric.higher_is_better != metric.name.endswith("_rank") for metric in TASKS[name].metrics)


def test_a_task_calls_its_own_function_with_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr("stm.evaluation.classification.linear.probe", lambda *given: called.append(given))
    inputs = EvaluationInputs(tmp_path / "weights", [], tmp_path, 7)
    task, run = LinearProbe(task="linear"), PretrainRun()
    evaluate(task, run, inputs)
    ((*given, process),) = called
    assert given == [task, run, inputs] and (process.rank, process.count) == (0, 1)


def test_a_new_task_needs_a_section_and_a_declaration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(LinearProbe):
        """Counts its test shards."""

        task: Any = "counting"

    declared = Task(Counting, "Counting", (Metric("shards", "shards", scale=1, unit=""),), f"{__name__}:count_shards")
    monkeypatch.setitem(evaluation.TASKS, "counting", declared)
    evaluate(Counting(), PretrainRun(), EvaluationInputs(tmp_path, [tmp_path, tmp_path], tmp_path / "out", 0))
    assert (tmp_path / "out" / "count").read_text() == "2"


def count_shards(task: Any, run: Any, inputs: EvaluationInputs, process: Any) -> None:
    inputs.output.mkdir()
    (inputs.output / "count").write_text(str(len(inputs.test)))


@pytest.mark.parametrize(
    ("name", "need"), [("zero_shot", "contrast"), ("retrieval", "contrast"), ("captioning", "language")]
)
def test_a_run_without_what_the_task_needs_is_refused_by_name(name: str, need: str, tmp_path: Path) -> None:
    inputs = EvaluationInputs(tmp_path / "weights", [], tmp_path, 0)
    with pytest.raises(ValueError, match=f"weights: its run has no `{need}`"):
        evaluate(SECTIONS[name](task=name), PretrainRun(), inputs)


def test_splits_are_those_that_a_task_names() -> None:
    assert ZeroShot(task="zero_shot", test_split="val").splits == {"test": "val"}
    assert LinearProbe(task="linear", train_split="most").splits == {"train": "most", "test": "test"}
    tuned = VideoTextRetrieval(task="video_text_retrieval", optimisation=LanguageOptimisation())
    assert tuned.splits == {"train": "train", "test": "test"}
    asked = tuned.model_copy(update={"validation_split": "val"})
    assert asked.splits == {"train": "train", "validation": "val", "test": "test"}
    assert VideoTextRetrieval(task="video_text_retrieval").splits == {"test": "test"}  # zero-shot


def test_a_retrieval_says_which_captions_it_asks_with() -> None:
    queries = Retrieval(task="retrieval", source="human", count=3).packed_vectors
    assert queries is not None and (queries.sources, queries.count) == (("human",), 3)
    assert ZeroShot(task="zero_shot").packed_vectors is None


def test_a_metric_is_read_with_its_interval_and_chance() -> None:
    metrics = {"best": {"r1": 0.5}, "around": {"r1": [0.4, 0.6]}, "chance": 0.1}
    metric = Metric("best.r1", "R@1", interval="around.r1", chance="chance")
    assert metric.read(metrics) == {
        "name": "best.r1", "label": "R@1", "value": 0.5, "interval": [0.4, 0.6], "chance": 0.1, "higher_is_better": True,
        "scale": 100, "unit": "%",
    }  # fmt: skip
    assert metric.key == "r1"
    plain = dataclasses.replace(metric, interval=None, chance=None).read(metrics)
    assert (plain["interval"], plain["chance"]) == (None, None)
    with pytest.raises(KeyError, match=r"best\.r5"):
        look_up(metrics, "best.r5")


def test_a_number_that_is_not_declared_is_a_share() -> None:
    assert TASKS["linear"].metric("per_class.red.accuracy") == Metric(
        "per_class.red.accuracy", "per_class.red.accuracy"
    )
    assert not TASKS["retrieval"].metric("video_to_text.median_rank").higher_is_better
