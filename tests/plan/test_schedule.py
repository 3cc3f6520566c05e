"""The wall-clock of plans whose schedule is simple enough to be written out by hand."""

from typing import Any

import pytest

from stm.config import parse_config
from stm.plan.clips import Clips
from stm.plan.costs import Line
from stm.plan.hardware import Hardware
from stm.plan.schedule import estimate_hours

CLIPS = {"x": Clips({"train": 2000, "test": 1000}, 10, 340, 256, "here")}
RUN = {"model": "tiny", "optimisation": {"batch_size": 8}}


def hours(lines: list[Line], **values: Any) -> float:
    config = parse_config(
        {
            "name": "x",
            "dataset": {"source": "moving-shapes"},
            "pack": {"similarity": False, "motion": False},
            "pretrain": {"a": RUN, "b": RUN, "c": RUN},
            "evaluate": {"linear": {"task": "linear"}},
            **values,
        }
    )
    return estimate_hours(config, lines, CLIPS, Hardware.of(config))


def on_gpu(name: str, job_hours: float, gpus: int = 1, jobs: int = 1, cores: float = 1) -> Line:
    return Line(name, jobs, 99, gpu_hours=jobs * gpus * job_hours, gpus=gpus, cores=cores, job_hours=job_hours)


def on_cores(name: str, jobs: int, job_hours: float) -> Line:
    return Line(name, jobs, jobs * job_hours, job_hours=job_hours)


def test_jobs_of_a_stage_share_the_cores() -> None:
    lines = [on_cores("frames", 3, 2.0)]
    assert hours(lines, prices={"cores": 8}) == pytest.approx(2)
    assert hours(lines, prices={"cores": 1}) == pytest.approx(6)
    assert hours(lines, prices={"cores": 2}) == pytest.approx(3)  # shards follow each other without a break


def test_a_stage_waits_for_the_files_that_it_reads() -> None:
    lines = [
        on_cores("manifest", 1, 1.0),
        on_cores("split", 1, 0.5),
        on_cores("frames", 3, 2.0),
        on_cores("shards", 3, 1.0),
    ]
    lines += [on_gpu("pretrain/a", 4.0), on_gpu("evaluate/a/linear", 3.0)]
    assert hours(lines) == pytest.approx(1 + 0.5 + 2 + 1 + 4 + 3)


def test_runs_are_side_by_side_on_different_gpus() -> None:
    lines = [on_gpu(f"pretrain/{run}", 6.0) for run in "abc"]
    assert hours(lines, prices={"gpus": 3}) == pytest.approx(6)
    assert hours(lines, prices={"gpus": 1}) == pytest.approx(18)
    assert hours(lines, prices={"gpus": 2}) == pytest.approx(12)


def test_a_run_on_several_gpus_leaves_the_others_to_evaluations() -> None:
    lines = [on_gpu("pretrain/a", 1.0, gpus=4), on_gpu("pretrain/b", 5.0, gpus=4), on_gpu("evaluate/a/linear", 2.0)]
    assert hours(lines, prices={"gpus": 4}) == pytest.approx(1 + 5 + 2)
    assert hours(lines, prices={"gpus": 5}) == pytest.approx(1 + 5)  # a's evaluation runs beside b


def test_gpus_wait_for_cores() -> None:
    lines = [on_gpu(f"pretrain/{run}", 6.0, cores=4.0) for run in "abc"]
    assert hours(lines, prices={"gpus": 3, "cores": 12}) == pytest.approx(6)
    assert hours(lines, prices={"gpus": 3, "cores": 8}) == pytest.approx(12)


def test_a_run_that_starts_from_another_waits_for_it() -> None:
    values = {
        "results": "results",
        "pretrain": {"a": RUN, "b": RUN | {"init": "results/x/pretrain/a/weights.safetensors"}},
    }
    lines = [on_gpu("pretrain/a", 6.0), on_gpu("pretrain/b", 5.0)]
    assert hours(lines, prices={"gpus": 2}, **values) == pytest.approx(11)


def test_by_default_the_hardware_has_the_gpus_of_the_largest_run() -> None:
    large = RUN | {"processes": 4, "nodes": 2}
    config = parse_config({"name": "x", "dataset": {"source": "moving-shapes"}, "pretrain": {"a": RUN, "b": large}})
    assert Hardware.of(config).gpus == 8
