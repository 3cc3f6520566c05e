"""Every key of the config, changed one at a time: receipts and journals differ where the key decides the bytes, and only there.

Which keys decide is stated by hand, in `RERUN` of test_config_changes.py and in the exceptions below.
"""

import copy
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from receipt_only_stages import LEARNING_STAGES, OFFLINE_STAGES, Receipts, first_jobs, run_all, run_one
from recorded_runs import SHARDS
from test_config_changes import CONFIGS, KEYS, Key, change, find_line, make_models, small_lists

from stm.config import Config, parse_config
from stm.shards.schema import shard_schema
from stm.stages.jobs import Jobs
from stm.storage.tables import write_table

__all__ = ["small_lists"]  # a fixture

STAGES = {"offline": OFFLINE_STAGES, "masking": LEARNING_STAGES, "language": LEARNING_STAGES}
JOBS = [(config, name) for config, stages in STAGES.items() for name in stages]
SEED = Key("offline", ("seed",), Config)  # among `KEYS` only for the runs
# Keys that change which jobs there are, and where their results are written.
OF_THE_JOBS = (
    ("*", "name"),
    ("*", "results"),
    ("*", "seeds"),
    ("*", "pretrain.*.dataset"),
    ("*", "pretrain.*.seeds"),
    ("*", "evaluate.*.runs"),
)
# Keys that rerun a job without deciding its bytes, or that its inputs record, by name of the job.
NOT_RECORDED = (
    ("*similarity/*", "similarity.keep_embeddings"),
    ("*similarity/*", "mask_quality.split"),  # other jobs
    ("*flow", "flow.preset"),  # of DIS; the config uses RAFT
)
# Of a run, an evaluation records what it reads itself. All else is in the hash of the weights.
OF_THE_RUN = ("model", "image_size", "patch_size", "tubelet", "frames", "stride", "sampling", "precision", "seed")
# The journal of a stage keeps what does not depend on these keys.
NOT_IN_THE_JOURNAL = (
    ("*", "bad_input.policy"),
    ("manifest", "dataset.*"),
    ("manifest", "seed"),
    ("generate", "dataset.clips"),  # further clips do not change the others
    ("generate", "dataset.label"),  # of the annotations, as the caption is: not of the video
    ("generate", "dataset.caption"),
    ("*pretrain/*", "pretrain.*.processes"),  # a cluster does not always allocate the same nodes
    ("*pretrain/*", "pretrain.*.nodes"),
    ("*pretrain/*", "pretrain.*.parallel"),
)


def listed(table: tuple[tuple[str, str], ...], job: str, key: Key) -> bool:
    return any(fnmatchcase(job, jobs) and fnmatchcase(key.name, name) for jobs, name in table)


def decides(key: Key, job: str) -> bool:
    """Whether the receipt of a job must contain a key."""
    dataset, _, plain = job.rpartition(":")
    listed_jobs = [pattern for pattern in find_line(key) if fnmatchcase(plain, pattern.strip("!?"))]
    if not listed_jobs or listed_jobs[-1].startswith("!") or key.dataset not in (None, dataset):
        return False
    if "evaluate/" in job and key.name.startswith("pretrain."):
        return key.path[-1] in OF_THE_RUN and len(key.path) == 3
    return not listed(NOT_RECORDED, job, key)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """By config: the receipts of all jobs, each made in a folder with the results of the unchanged config."""
    before = Path.cwd()

    @cache
    def make(config: str) -> tuple[Path, dict[str, Receipts]]:
        folder = tmp_path_factory.mktemp(config)
        os.chdir(folder)
        make_models(folder)
        values = parse_config(CONFIGS[config]).model_dump(mode="json")
        if config == "offline":
            run_all(values, OFFLINE_STAGES + LEARNING_STAGES)
        else:
            pack_nothing(values)
            run_all(values, LEARNING_STAGES)
        return folder, {name: run_one(*job) for name, job in first_jobs(values, STAGES[config]).items()}

    def enter(config: str) -> dict[str, Receipts]:
        folder, receipts = make(config)
        os.chdir(folder)
        return receipts

    yield enter
    os.chdir(before)


def pack_nothing(values: dict[str, Any]) -> None:
    """Write packed shards without clips, which runs and evaluations name by their hashes."""
    for layout in Jobs(parse_config(values)).layouts.values():
        layout.shard_index.parent.mkdir(parents=True)
        layout.shard_index.write_text(json.dumps({"shards": dict.fromkeys(SHARDS)}))
        for shard in SHARDS:
            write_table(layout.shard(shard), shard_schema().empty_table(), {"tar_sha256": f"{layout.root} {shard}"})


def keys_of(config: str) -> list[Key]:
    return [key for key in KEYS if key.config == config]


@pytest.mark.parametrize(("config", "stage"), JOBS)
def test_the_receipt_changes_with_every_key_that_decides_and_with_no_other(config: str, stage: str, world: Any) -> None:
    made = world(config)
    for job in (name for name in made if name.split(":")[-1].split("/")[0] == stage):

        def run(values: dict[str, Any], job: str = job) -> Receipts:
            return run_one(*first_jobs(values, (stage,))[job], Path("changed"))

        keys = [key for key in (*KEYS, SEED) if key.config == config and not listed(OF_THE_JOBS, job, key)]
        deciding = [key for key in keys if decides(key, job)]
        assert deciding
        for key in deciding:
            found = run(change(key))
            assert found.output != made[job].output, f"{job}: the receipt does not depend on {key.name}"
            if made[job].journal is not None:
                same = listed(NOT_IN_THE_JOURNAL, job, key)
                assert (found.journal == made[job].journal) == same, f"{job}: the journal and {key.name}"
        others = [key for key in keys if key not in deciding]
        if run(changed_together(config, others)) != made[job]:
            assert [key.name for key in others if run(change(key)) != made[job]] == []
            pytest.fail(f"{job}: the receipt depends on a key that does not decide its bytes")


def changed_together(config: str, keys: list[Key]) -> dict[str, Any]:
    """The config with another value of each key, as far as they are valid together."""
    values: dict[str, Any] = parse_config(CONFIGS[config]).model_dump(mode="json")
    return with_changes(values, keys)


def with_changes(values: dict[str, Any], keys: list[Key]) -> dict[str, Any]:
    merged = copy.deepcopy(values)
    for key in keys:
        holder, changed = merged, change(key)
        for part in key.path[:-1]:
            holder, changed = holder[part], changed[part]
        holder[key.path[-1]] = changed[key.path[-1]]
    try:
        Config.model_validate(merged)
        return merged
    except (ValidationError, KeyError):
        # One of them alone is left out; most are valid together.
        middle = len(keys) // 2
        return with_changes(with_changes(values, keys[:middle]), keys[middle:]) if middle else values
