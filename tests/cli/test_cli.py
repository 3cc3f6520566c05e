"""The command line answers mistakes in one message, and covers every stage of the workflow."""

import re
from pathlib import Path

import pytest

from stm.cli import STAGES, main

ROOT = Path(__file__).parents[2]


def test_every_rule_of_the_workflow_is_a_stage_by_hand():
    rules = {
        rule.replace("_", "-")
        for path in (ROOT / "workflow/rules").glob("*.smk")
        for rule in re.findall(r"^ *(?:rule|checkpoint) (\w+):", path.read_text(), re.M)
    }
    assert rules - {"demo-models"} <= set(STAGES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frames", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["plan", "--config", "CONFIG", "--set", "motion.backend=raft"], ["motion.backend", "raft", "codec"]),
        (["plan", "--config", "CONFIG", "--set", "motion"], ["key=value"]),
        (["plan", "--config", "CONFIG", "--set", "frames=[1"], ["frames=[1", "YAML"]),
        (["manifest", "--config", "FOLDER", "--set", "dataset.root=nowhere"], ["nowhere is not a folder"]),
        (["pretrain", "--config", "CONFIG", "--set", "results=none"], ["stm manifest", "stm split"]),
        (["mask-quality", "--config", "CONFIG", "--set", "results=none"], ["stm manifest", "stm split"]),
        (["frames", "--config", "CONFIG", "--set", "results=none"], ["stm manifest", "stm split"]),
        (["captions", "--config", "CONFIG", "--source", "gpt"], ["gpt", "blip2", "human"]),
        (["pretrain", "--config", "CONFIG", "--run", "tubes"], ["tubes", "tube"]),
        (["evaluate", "--config", "CONFIG", "--run", "tube", "--task", "retrieval"], ["retrieval", "tube", "contrast"]),
        (["generate", "--config", "FOLDER"], ["nothing to generate"]),
        (["mask-quality", "--config", "FOLDER"], ["mask_quality"]),
    ],
)
def test_mistakes_are_one_message_not_a_traceback(arguments, words, capsys):
    known = {"CONFIG": str(ROOT / "config/demo.yaml"), "FOLDER": str(ROOT / "config/folder.yaml")}
    assert main([known.get(argument, argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_the_schema_is_printed(capsys):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "config/schema.json").read_text()
