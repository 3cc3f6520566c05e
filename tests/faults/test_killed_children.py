"""Single worker processes that are killed change nothing: a stage ends with the same bytes as undisturbed.

`STM_CHILD_KILLS=50 pytest tests/faults/test_killed_children.py` kills 50 children per stage.
"""

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
from synthetic_videos import make_pan, make_row, make_video, write_slice
from trial import digests

import stm.preprocess.frames.extract
from stm.config import BadInput, Flow, Frames, Motion, MovingShapesDataset, parse_config
from stm.datasets import build_manifest
from stm.datasets.moving_shapes.generate import generate
from stm.jobs.workers import ItemKilledError, WorkerStartError
from stm.preprocess.flow.estimate import write_flow
from stm.preprocess.frames.extract import FrameTask, extract_clip, extract_frames
from stm.preprocess.motion.measure import extract_motion

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("STM_CHILD_KILLS", "2"))
NONE_FAIL = BadInput(max_failure_rate=0.0)
PROCESSES = 2


class Inputs(NamedTuple):
    root: Path
    rows: Path
    tar: Path
    table: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    root = folder / "root"
    root.mkdir()
    make_video(root / "0.mp4", make_pan(40, width=160, height=128))
    for number in range(1, 12):
        shutil.copy(root / "0.mp4", root / f"{number}.mp4")
    rows = write_slice(folder / "train-00000.parquet", [make_row(f"{number}.mp4") for number in range(12)])
    made = Inputs(root, rows, folder / "frames.tar", folder / "frames.parquet")
    extract_frames(rows, root, made.tar, made.table, FRAMES, NONE_FAIL, PROCESSES)
    return made


FRAMES = Frames(every=2, short_side=64)


def frames(inputs: Inputs, out: Path) -> None:
    extract_frames(inputs.rows, inputs.root, out / "f.tar", out / "f.parquet", FRAMES, NONE_FAIL, PROCESSES)


def motion(inputs: Inputs, out: Path) -> None:
    settings = Motion(backend="transcode")
    extract_motion(inputs.rows, inputs.root, inputs.table, out / "m.parquet", settings, 5, NONE_FAIL, PROCESSES)


def flow(inputs: Inputs, out: Path) -> None:
    write_flow(inputs.tar, inputs.table, out / "flow.parquet", Flow(), 5, NONE_FAIL, PROCESSES)


def manifest(inputs: Inputs, out: Path) -> None:
    dataset = {"source": "folder", "root": str(inputs.root), "split": "train"}
    config = parse_config({"name": "x", "dataset": dataset, "bad_input": {"max_failure_rate": 0.0}})
    build_manifest(config, None, out / "manifest.parquet", out / "quarantine.parquet", PROCESSES)


def moving_shapes(inputs: Inputs, out: Path) -> None:
    dataset = MovingShapesDataset(source="moving-shapes", clips={"train": 12}, frames=8, height=64, width=64)
    generate(dataset, 0, out, PROCESSES)


def workers() -> list[int]:
    """Ids of this process's worker processes."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    found = []
    for pid in map(int, text.split()):
        try:
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:  # it has ended
            continue
    return found


@contextmanager
def killing(kills: list[int], seed: str) -> Iterator[None]:
    """Kill workers at random times during the block, until KILLS have been killed."""
    choose, stop = random.Random(seed), threading.Event()

    def kill() -> None:
        while len(kills) < KILLS and not stop.wait(choose.uniform(0.0, 1.2)):
            alive = workers()
            if alive:
                kills.append(choose.choice(alive))
                os.kill(kills[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("stage", [frames, motion, flow, manifest, moving_shapes], ids=lambda stage: stage.__name__)
def test_killed_children_change_nothing(stage: Callable[[Inputs, Path], None], inputs: Inputs, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    stage(inputs, undisturbed)
    kills: list[int] = []
    refused: list[str] = []
    attempts = 0
    while len(kills) < KILLS:
        disturbed = tmp_path / f"disturbed-{attempts}"
        disturbed.mkdir()
        finished = False
        while not finished:
            attempts += 1
            with killing(kills, f"{stage.__name__} {attempts}"):
                try:
                    stage(inputs, disturbed)
                    finished = True
                # Killed twice at the same clip, or always before they started: the next attempt resumes.
                except (ItemKilledError, WorkerStartError) as error:
                    refused.append(str(error))
        assert digests(disturbed) == digests(undisturbed)
    assert len(kills) >= KILLS
    assert all("SIGKILL" in error for error in refused), refused


def die_at_seven(task: FrameTask) -> None:
    """Stands for a clip that does not fit into memory."""
    if task.row["path"] == "7.mp4":
        os.kill(os.getpid(), signal.SIGKILL)
    extract_clip(task)


def only_seven(task: FrameTask) -> None:
    assert task.row["path"] == "7.mp4", "finished by the first attempt"
    extract_clip(task)


def test_a_clip_that_is_killed_twice_stops_the_stage_and_the_next_attempt_does_only_it(
    inputs: Inputs, tmp_path: Path
) -> None:
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    frames(inputs, tmp_path / "undisturbed")
    with (
        patch.object(stm.preprocess.frames.extract, "extract_clip", die_at_seven),
        pytest.raises(ItemKilledError, match=r"  7\.mp4: .* SIGKILL.*\n.*with more memory"),
    ):
        frames(inputs, tmp_path / "disturbed")
    assert digests(tmp_path / "disturbed") == {}
    with patch.object(stm.preprocess.frames.extract, "extract_clip", only_seven):
        frames(inputs, tmp_path / "disturbed")
    assert digests(tmp_path / "disturbed") == digests(tmp_path / "undisturbed")
