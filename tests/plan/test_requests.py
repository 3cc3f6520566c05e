"""What jobs request on a cluster, against arithmetic on the papers' configs."""

from math import ceil
from pathlib import Path

import pytest

from stm.config import load_config
from stm.data.loader import ClipLoader
from stm.plan.costs import LOAD_SECONDS_PER_PIXEL
from stm.plan.make import make_plan
from stm.plan.requests import HELD_BATCHES, Requests
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages

ROOT = Path(__file__).parents[2]
STAGES = all_stages()


def made(name: str) -> tuple[Requests, Jobs]:
    jobs = Jobs(load_config(ROOT / f"config/{name}.yaml"), lambda dataset: ["train-00000"])
    return Requests(jobs), jobs


@pytest.fixture(scope="module")
def tgm() -> tuple[Requests, Jobs]:
    return made("tgm")


def thousands(megabytes: float) -> int:
    return ceil(megabytes / 1000) * 1000


def tens(minutes: float) -> int:
    return ceil(minutes / 10) * 10


def test_a_run_requests_cores_and_memory_for_its_processes_loaders_and_batches(tgm: tuple[Requests, Jobs]) -> None:
    requests, jobs = tgm
    job, stage = jobs.make(dataset="k400", run="tube-k400"), STAGES["pretrain"]
    # Eight processes, each with eight loading processes, and each of those with five batches of 512 / 8 clips. The GPU decodes
    # their JPEGs, of 256 x 342 pixels and a fifth of the bytes.
    assert requests.threads(stage, job) == 8 + 8 * 8
    batch = 512 / 8 * 16 * 3 * 256 * 342 / 5 / 1e6
    expected = 16_000 + 8 * 8_000 + 64 * (1_000 + 5 * batch)
    assert requests.memory(stage, job, 72) == thousands(expected) == 162_000


def test_captions_by_a_large_model_request_the_memory_of_its_weights(tgm: tuple[Requests, Jobs]) -> None:
    requests, jobs = tgm
    found = {
        source: requests.memory(STAGES["captions"], jobs.make(dataset="ssv2", source=source), 1)
        for source in ("blip2", "label", "llm", "vlm")
    }
    assert found == {"blip2": None, "label": None, "llm": 30_000, "vlm": 30_000}  # 7 billion weights of two bytes


def test_a_run_without_steps_requests_no_loading_processes(tgm: tuple[Requests, Jobs]) -> None:
    requests, jobs = tgm
    job, stage = jobs.make(dataset="k400", run="random-k400"), STAGES["pretrain"]
    assert (requests.threads(stage, job), requests.memory(stage, job, 8)) == (8, 80_000)
    assert requests.minutes(stage, job, 8) == 40


def test_time_is_twice_the_planned_and_follows_the_cores(tgm: tuple[Requests, Jobs]) -> None:
    requests, jobs = tgm
    job, stage = jobs.make(dataset="k400", run="tube-k400"), STAGES["pretrain"]
    # 246,534 clips, 200 epochs, 16 frames of 340 x 256, which 64 loading processes read.
    loading = 246_534 * 200 * 16 * 340 * 256 * LOAD_SECONDS_PER_PIXEL["read"] / 3600
    line = next(line for line in make_plan(jobs.study).stages if line.stage == "pretrain/tube-k400")
    for threads, loaders in ((72, 64), (200, 64), (24, 16), (8, 1)):
        hours = max(line.gpu_hours / 8, loading / loaders)
        assert requests.minutes(stage, job, threads) == tens(30 + 120 * hours)
    frames = next(line for line in make_plan(jobs.study).stages if line.stage == "frames/k400")
    shard = jobs.make(dataset="k400", shard="train-00000")
    for threads in (1, 8):
        expected = 30 + 120 * frames.cpu_hours / frames.jobs / threads
        assert requests.minutes(STAGES["frames"], shard, threads) == tens(expected)
    assert requests.memory(STAGES["frames"], shard, 8) == 1_000 + 8 * 500


def test_a_run_longer_than_the_longest_job_is_started_again(tgm: tuple[Requests, Jobs]) -> None:
    requests, jobs = tgm
    stage = STAGES["pretrain"]
    longest = max(
        requests.minutes(stage, job, 72) or 0 for dataset in ("k400", "ssv2") for job in stage.each(jobs, dataset)
    )
    assert requests.further_attempts(stage, longest) == 0
    assert requests.further_attempts(stage, longest - 1) == 1
    assert requests.further_attempts(stage, ceil(longest / 4)) == 3
    assert requests.further_attempts(stage, longest, cores=8) > 0  # no core is left for loading


@pytest.mark.parametrize(("name", "nodes"), [("stm", 1), ("clusterstm", 1), ("stm", 2)])
def test_evaluations_request_by_their_own_processes(name: str, nodes: int) -> None:
    """What a node needs is requested per node."""
    requests, jobs = made(name)
    job, stage = jobs.make(dataset="webvid", run="umt", task="msrvtt"), STAGES["evaluate"]
    task = jobs.study.evaluate["msrvtt"]
    assert (task.processes, task.nodes) == (8, 1)
    processes = 8 // nodes
    jobs.study.evaluate["msrvtt"] = task.model_copy(update={"processes": processes, "nodes": nodes})
    optimisation = task.optimisation
    clips = max(32, optimisation.batch_size // optimisation.accumulate // 8)
    batch = clips * 12 * 3 * 224 * 224 / 1e6
    assert requests.threads(stage, job) == processes * 13
    assert requests.memory(stage, job, 13) == thousands(16_000 + processes * (8_000 + 12 * (1_000 + 5 * batch)))
    line = next(line for line in make_plan(jobs.study).stages if line.stage == "evaluate/umt/msrvtt")
    hours = max(line.gpu_hours / 8, line.loading_hours / (12 * 8))
    assert requests.minutes(stage, job, 13 * processes) == tens(30 + 120 * hours)
    run = jobs.make(dataset="webvid", run="umt")
    # Images: 2,048 frames of a step on eight GPUs; videos: as many clips of four frames.
    batch = 2048 / 8 * 4 * 3 * 224 * 224 / 1e6
    assert requests.threads(STAGES["pretrain"], run) == 8 * 13
    assert requests.memory(STAGES["pretrain"], run, 104) == thousands(16_000 + 8 * 8_000 + 96 * (1_000 + 5 * batch))


def test_nothing_is_planned_inside_the_jobs_and_without_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    _, jobs = made("umt")  # whose videos are in folders that are not here
    job: Job = jobs.make(dataset="k710", shard="train-00000")
    assert Requests(jobs, planned=False).minutes(STAGES["frames"], job, 8) is None
    assert capsys.readouterr().err == ""
    assert Requests(jobs).minutes(STAGES["frames"], job, 8) is None
    assert "jobs request the declared times" in capsys.readouterr().err


def test_memory_is_requested_for_the_batches_that_the_loader_holds() -> None:
    loader = ClipLoader([0] * 4, 2, shuffle=False, workers=1)  # type: ignore[arg-type]
    assert loader._make_loader().prefetch_factor == HELD_BATCHES - 1
