"""Evaluations are held against the protocols of their benchmarks: a wrong number is refused before anything runs."""

from pathlib import Path

import pytest

from stm.config import load_config
from stm.datasets import DatasetError
from stm.datasets.language.tasks import check_tasks

CONFIGS = Path(__file__).parents[2] / "config"


@pytest.mark.parametrize("name", ["stm", "clusterstm", "stm-small", "tgm-small"])
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
    with pytest.raises(DatasetError, match=rf"evaluate\.{task}\.{key} is {value}, and .* asks for {asked}"):
        check_tasks(config)


def test_a_benchmark_of_another_task_is_refused():
    config = load_config(CONFIGS / "stm.yaml")
    changed = config.evaluate["msrvtt"].model_copy(update={"dataset": "msrvtt-qa"})
    config = config.model_copy(update={"evaluate": {**config.evaluate, "msrvtt": changed}})
    with pytest.raises(DatasetError, match="is a benchmark of question_answering"):
        check_tasks(config)
