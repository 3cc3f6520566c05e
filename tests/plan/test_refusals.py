"""What must fail later is refused by the plan and by dry runs, and what need not is not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stm.config import ConfigError, parse_config
from stm.plan.check import check_plan
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages, missing_models

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {"model": "tiny", "optimisation": {"batch_size": 40, "epochs": 2, "warmup_epochs": 0}}
TUNED: dict[str, Any] = {"task": "finetune", "optimisation": {"batch_size": 40, "epochs": 2, "warmup_epochs": 0}}
VALUES: dict[str, Any] = {
    "name": "x",
    "dataset": {"source": "moving-shapes", "clips": {"train": 40, "test": 8}},
    "pack": {"similarity": False, "motion": False},
    "pretrain": {"a": RUN},
    "evaluate": {"tune": TUNED},
}
DENSE: dict[str, Any] = {"captions": {"human": {"kind": "human"}}, "pack": {"captions": "human", "motion": False}}


def changed(tmp_path: Path, **values: Any) -> Any:
    return parse_config(VALUES | {"results": str(tmp_path), **values})


def larger(section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return section | {"optimisation": section["optimisation"] | changes}


def test_a_batch_of_all_clips_is_accepted(tmp_path: Path) -> None:
    check_plan(changed(tmp_path))
    check_plan(changed(tmp_path, **DENSE, similarity={"method": "dense", "model": "ViT-B-16-quickgelu@openai"}))
    check_plan(changed(tmp_path, similarity={"method": "dense", "model": "RN50@openai"}))  # nothing is scored
    check_plan(changed(tmp_path, pretrain={"a": larger(RUN, batch_size=80) | {"repeats": 2}}))
    check_plan(changed(tmp_path, pretrain={"a": larger(RUN, batch_size=80, epochs=0)}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pretrain": {"a": larger(RUN, batch_size=41)}}, ["pretrain.a.optimisation.batch_size is 41", "40 samples"]),
        ({"evaluate": {"tune": larger(TUNED, batch_size=41)}}, ["evaluate.tune.optimisation.batch_size is 41", "40"]),
        ({"pretrain": {"a": RUN | {"split": "training"}}}, ["pretrain.a", "'training'", "train, test"]),
        ({"evaluate": {"tune": TUNED | {"test_split": "val"}}}, ["evaluate.tune", "'val'", "train, test"]),
        ({"pretrain": {"a": RUN | {"processes": 4}}, "prices": {"gpus": 2}}, ["pretrain.a uses 4 GPUs", "is 2"]),
        (
            {"evaluate": {"tune": TUNED | {"test_split": "test", "processes": 4}}, "prices": {"gpus": 2}},
            ["evaluate.tune uses 4 GPUs"],
        ),
        *(
            ({**DENSE, "similarity": {"method": "dense", "model": model}}, ["similarity.method of x is dense", kind])
            for model, kind in (
                ("convnext_base@laion400m_s13b_b51k", "a timm tower without SigLIP's pooling head"),
                ("RN50@openai", "a ResNet"),
                ("coca_ViT-B-32@laion2b_s13b_b90k", "a ViT with an attention pooler"),
            )
        ),
        (
            {
                "dataset": {"source": "moving-shapes", "clips": {"train": 4000, "test": 8}},
                "pretrain": {"a": larger(RUN, batch_size=2048) | {"model": "large"}},
                "prices": {"gpu": "rtx-4090"},
            },
            ["pretrain.a needs about", "rtx-4090", "24 GB", "set `gradient_checkpointing`, raise `accumulate`"],
        ),
        (
            {
                "dataset": {"source": "moving-shapes", "clips": {"train": 4000, "test": 8}},
                "pretrain": {"a": RUN | {"model": "large"}},
                "evaluate": {"tune": larger(TUNED, batch_size=2048)},
            },
            ["evaluate.tune of a needs about", "h200", "141 GB", "set `gradient_checkpointing`"],
        ),
    ],
)
def test_jobs_that_must_fail_are_named(values: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    config = changed(tmp_path, **values)
    job = Jobs(config).make()
    plan = all_stages()["plan"]
    assert plan.check is not None
    with pytest.raises(ConfigError):
        plan.check(job)  # by a dry run
    with pytest.raises(ConfigError) as error:
        plan.run(job, {}, plan.outputs(job), 1)  # by `stm plan`
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "x/plan.json").exists()


def test_an_evaluation_that_no_run_can_do_is_refused(tmp_path: Path) -> None:
    zero = {"task": "zero_shot"}
    with pytest.raises(ConfigError, match=r"evaluate.zero needs runs with `contrast`"):
        changed(tmp_path, evaluate={"zero": zero})


def test_models_that_are_not_there_are_planned_for_and_refused_in_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    config = changed(
        tmp_path,
        captions={"human": {"kind": "human"}, "blip": {"kind": "blip2", "model": "Salesforce/blip2-opt-2.7b"}},
        similarity={"model": f"local-dir:{tmp_path}/clip"},
        text={"model": f"local-dir:{tmp_path}/absent"},
        pack={"captions": "human", "similarity": True, "text": True, "motion": False},
        pretrain={
            "a": RUN | {"init": "weights/a.pth"},
            "b": RUN | {"init": f"{tmp_path}/x/pretrain/a/weights.safetensors"},  # which a writes
            "c": RUN | {"init": "owner/model"},  # a hub id
        },
    )
    missing = missing_models(config)
    assert [line.partition(" (")[0] for line in missing] == [f"{tmp_path}/absent", "weights/a.pth"]
    assert "pretrain/a" in missing[1]
    job, stages = Jobs(config).make(), all_stages()
    shown = stages["plan"].run(job, {}, stages["plan"].outputs(job), 1)
    assert shown is not None and shown.endswith(
        "\n".join(["needed before anything is run:", *(f"  {m}" for m in missing)])
    )
    manifest = stages["manifest"]
    assert manifest.check is not None
    with pytest.raises(ConfigError, match=r"weights/a.pth \(no such file or folder; for pretrain/a\)"):
        manifest.check(Jobs(config).make(dataset="x"))


def test_a_folder_of_videos_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = changed(tmp_path, dataset={"source": "folder", "root": str(tmp_path / "nowhere")})
    for name, job in (("plan", Jobs(config).make()), ("manifest", Jobs(config).make(dataset="x"))):
        check = all_stages()[name].check
        assert check is not None
        with pytest.raises(ValueError, match=r"nowhere.*no such folder"):
            check(job)


def test_a_dry_run_estimates_memory_without_waiting_for_torch() -> None:
    program = (
        "import sys; from stm.config import load_config; from stm.plan.check import check_memory; "
        "check_memory(load_config('config/stm.yaml')); print([name for name in ('torch', 'open_clip') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
