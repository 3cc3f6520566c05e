"""Results without Snakemake's records, as in another clone, are not taken for results of the present config."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from receipt_only_stages import first_jobs
from small_workflow import snakemake
from test_config_changes import CONFIGS, KEYS, Key, change, small_lists
from test_receipts import OF_THE_JOBS, decides, listed, world

from stm.cli import main
from stm.config import merge, parse_config
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages, run_stage
from stm.stages.provenance import StaleInputError, check_finished, check_inputs
from stm.stages.rules import DeclaredRule
from stm.storage.tables import RECEIPT_KEY, read_receipt, write_table

__all__ = ["small_lists", "world"]  # fixtures


def refusal(values: dict[str, Any], stage: str = "report", **wildcards: str) -> str:
    """The message with which a stage refuses the results in the current folder; empty if it accepts them."""
    try:
        check_inputs(all_stages()[stage], Jobs(parse_config(values)).make(**wildcards), all_stages())
    except StaleInputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("config", ["offline", "masking", "language"])
def test_the_page_refuses_results_of_another_value_of_every_key_that_decides(config: str, world: Any) -> None:
    made = world(config)
    assert refusal(CONFIGS[config]) == ""
    for key in KEYS:
        # Receipts have the hash of a file of weights; when it changes, Snakemake sees that the input is new.
        if key.config == config and key.name != "flow.weights" and not listed(OF_THE_JOBS, "", key):
            message = refusal(change(key))
            if any(decides(key, job) for job in made):
                assert names(key, message), f"{key.name}: {message}"
            else:
                assert message == "", key.name


def names(key: Key, message: str) -> bool:
    """Whether a message names the key, or the other files that a key which names files selects."""
    if key.name.endswith(".dataset") or key.path[-1] in ("split", "train_split", "test_split", "datasets", "more"):
        return key.name in message or "was made from different shards" in message
    return key.name in message


@pytest.fixture
def results(world: Any, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A copy of the results of the config `offline`, in the current folder; the config."""
    world("offline")
    shutil.copytree(Path.cwd(), tmp_path / "clone")
    before = Path.cwd()
    os.chdir(tmp_path / "clone")
    yield CONFIGS["offline"]
    os.chdir(before)


def test_guides_that_nothing_reads_are_accepted_and_needed_by_no_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of a split that only tests a classifier: packed with guides by an earlier version, without, or otherwise."""
    monkeypatch.chdir(tmp_path)
    values = {
        **{"name": "small", "dataset": {"source": "moving-shapes", "clips": {"train": 8}}, "shard_size": 1000},
        **{"captions": {"human": {"kind": "human"}}, "pack": {"captions": "human"}},
        "pretrain": {"tube": {"model": "tiny", "image_size": 32, "patch_size": 8, "frames": 4}},
        "evaluate": {"linear": {"task": "linear", "test_split": "val"}},
    }
    pack = parse_config(values).pack
    jobs = Jobs(parse_config(values), lambda dataset: ["val-00003"])
    path = jobs.layouts["small"].shard("val-00003")
    other = pack.model_copy(update={"flow": True})
    for packed, refused in ((pack, False), (pack.without_guides(), False), (other, True)):
        write_table(path, pa.table({"key": pa.array([], pa.string())}), {"settings": packed.fingerprint(), "grid": 14})
        fresh = Jobs(parse_config(values), lambda dataset: ["val-00003"])
        try:
            check_finished(
                all_stages()["shards"], fresh.make(dataset="small", split="val", shard="val-00003"), all_stages()
            )
            assert not refused
        except StaleInputError as error:
            assert refused and "was made with pack.flow = true, the config says false" in str(error)


EVERY_2 = {"frames": {"every": 2}}
MADE_WITH_4 = "results/small/frames/{shard}-00000.parquet{more} was made with frames.every = 4, the config says 2"


def test_the_message_names_file_key_values_and_remedy(results: dict[str, Any]) -> None:
    message = refusal(merge(results, EVERY_2), "captions", dataset="small", source="manual", shard="test-00000")
    assert MADE_WITH_4.format(shard="test", more="") in message
    assert "snakemake --forcerun frames " in message
    # One line for the frames of two shards and their packed copies.
    message = refusal(merge(results, EVERY_2))
    assert MADE_WITH_4.format(shard="test", more=" (and 3 more)") in message
    assert len(message.splitlines()) == 3


# One key of each stage, and a job further down that must refuse, with the key as the message names it.
FURTHER_DOWN = [
    ({"dataset": {"fps": 8}}, "frames", "dataset.fps"),
    ({"bad_input": {"policy": {"too_short": "fail"}}}, "frames", "bad_input.policy.too_short"),
    ({"frames": {"min_side": 8}}, "frames", "frames.min_side"),
    ({"shard_size": 3}, "frames", "shard_size"),
    ({"frames": {"quality": 50}}, "pretrain", "frames.quality"),
    ({"captions": {"label": {"templates": ["{}!"]}}}, "pretrain", "captions.label.templates"),
    ({"similarity": {"precision": "bfloat16"}}, "pretrain", "similarity.precision"),
    ({"similarity": {"window": 3}}, "pretrain", "similarity.window"),
    ({"text": {"pooling": "mean"}}, "pretrain", "text.pooling"),
    ({"motion": {"backend": "codec"}}, "evaluate", "motion.backend"),
    ({"flow": {"cells": 4}}, "evaluate", "flow.cells"),
    ({"pack": {"motion": False}}, "pretrain", "pack.motion"),
    ({"grid": 7}, "pretrain", "grid"),
    ({"pretrain": {"tube": {"mask": {"ratio": 0.5}}}}, "evaluate", "pretrain.tube.mask.ratio"),
    ({"seed": 1}, "evaluate", "seed"),
    ({"evaluate": {"linear": {"epochs": 3}}}, "report", "evaluate.linear.epochs"),
    ({"mask_quality": {"text_ratio": 0.5}}, "report", "mask_quality.text_ratio"),
    ({"crop_agreement": {"crops": 7}}, "report", "crop_agreement.crops"),
    # Mask quality compares all sources, and agreement is measured on the first packed one.
    ({"captions": {"more": {"kind": "human"}}}, "report", "captions"),
    ({"pack": {"captions": ["label", "manual"]}}, "report", "pack.captions"),
]


@pytest.mark.parametrize(("update", "stage", "key"), FURTHER_DOWN, ids=lambda value: str(value)[:40])
def test_one_key_of_each_stage_is_refused_further_down(
    update: dict[str, Any], stage: str, key: str, results: dict[str, Any]
) -> None:
    if stage in ("pretrain", "evaluate"):
        # Packed shards contain what their parts were made with.
        for part in ("frames", "captions", "similarity", "text", "motion", "flow", "embeddings"):
            shutil.rmtree(f"results/small/{part}")
    values = merge(results, update)
    _, job = first_jobs(values, (stage,))[
        {"pretrain": "pretrain/tube", "evaluate": "evaluate/tube/linear"}.get(stage, stage)
    ]
    with pytest.raises(StaleInputError, match=f"was made with {key.replace('.', '[.]')} = "):
        check_inputs(all_stages()[stage], job, all_stages())


@pytest.mark.parametrize("command", [["report"], ["pretrain"], ["motion", "--shard", "train-00000"]])
def test_commands_by_hand_refuse(
    command: list[str], results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text(yaml.safe_dump(results))
    assert main([*command, "--config", "config.yaml", "--set", "frames.every=2"]) == 2
    assert "was made with frames.every = 4, the config says 2" in capsys.readouterr().err


def test_a_job_of_the_workflow_refuses(results: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(StaleInputError, match=r"frames[.]every = 4"):
        run_stage("report", merge(results, EVERY_2), {}, {}, {}, 1, log)
    assert "frames.every = 4, the config says 2" in log.read_text()


def test_the_workflow_refuses_finished_results_of_which_snakemake_has_no_record(results: dict[str, Any]) -> None:
    def dry_run(values: dict[str, Any], *arguments: str, fails: bool = False) -> str:
        Path("config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return snakemake(Path.cwd(), "--dry-run", *arguments, fails=fails)

    for update, made_with in (
        (EVERY_2, "frames.every = 4, the config says 2"),
        ({"shard_size": 3}, "shard_size = "),
        ({"dataset": {"fps": 8}}, "dataset.fps = "),
    ):
        printed = dry_run(merge(results, update), fails=True)
        assert f"was made with {made_with}" in printed
        assert "Traceback" not in printed
    # The command that the message names, and the unchanged config, are accepted.
    dry_run(merge(results, EVERY_2), "--forcerun", "frames")
    dry_run(results, "--config", "frames={every: 4}")  # numbers inside braces are text to Snakemake


def test_a_rule_checks_only_finished_results_without_a_record(results: dict[str, Any]) -> None:
    def inputs(shard: str, unrecorded: bool) -> None:
        jobs = Jobs(parse_config(merge(results, EVERY_2)))
        rule = DeclaredRule(all_stages()["frames"], jobs, unrecorded=lambda path: unrecorded)
        rule.inputs(SimpleNamespace(dataset="small", shard=shard))

    with pytest.raises(StaleInputError) as error:
        inputs("test-00000", True)
    # All of them, so that one command makes all of them again.
    assert MADE_WITH_4.format(shard="test", more=" (and 3 more)") in str(error.value)
    inputs("test-00000", False)  # its settings tell Snakemake to make it again
    Path("results/small/frames/test-00000.parquet").unlink()
    inputs("test-00000", True)


def test_numbers_of_weights_and_shards_that_were_replaced_are_refused(results: dict[str, Any]) -> None:
    Path("results/small/pretrain/tube/weights.safetensors").write_bytes(b"trained again")
    assert "evaluate/tube/linear/metrics.json was made from a different results/small/pretrain" in refusal(results)
    edit_receipt(Path("results/small/shards/train/train-00000.parquet"), lambda receipt: receipt | {"tar_sha256": "1"})
    message = refusal(results, "evaluate", dataset="small", run="tube", task="linear")
    assert "pretrain/tube/config.json was made from different shards than results/small/shards/train/train-" in message


def test_older_receipts_without_an_entry_are_accepted(results: dict[str, Any]) -> None:
    for path in Path("results").rglob("*.parquet"):
        if read_receipt(path):
            edit_receipt(path, lambda receipt: {"stage": receipt["stage"], "versions": {}})
    assert refusal(merge(results, EVERY_2)) == ""


def test_another_folder_of_the_same_model_is_accepted(results: dict[str, Any]) -> None:
    moved = json.loads(json.dumps(results).replace("models/one/", "/elsewhere/"))
    assert refusal(moved, "pretrain", dataset="small", run="tube") == ""
    other = json.loads(json.dumps(results).replace("models/one/clip", "models/one/larger"))
    assert "similarity.model" in refusal(other, "pretrain", dataset="small", run="tube")


def edit_receipt(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    table = pq.read_table(path)
    receipt = json.dumps(edit(read_receipt(path))).encode()
    pq.write_table(table.replace_schema_metadata({RECEIPT_KEY: receipt}), path)
