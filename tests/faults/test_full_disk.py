"""A full disk leads to an error that names the file, no file under the final name, and the same bytes once there is room."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_inputs import EVERYTHING, GRID, KEEP_GOING, make_inputs, path_of
from synthetic_videos import make_pan, make_row, make_video, write_slice
from torch import nn
from trial import digests, run_here

import stm.preprocess.clip_outcomes
from stm.config import Flow, Frames, HumanCaptions, Optimisation
from stm.distributed.process import Process
from stm.jobs.journal import Journal
from stm.manifest import write_slices
from stm.preprocess.captions.write import write_captions
from stm.preprocess.flow.estimate import write_flow
from stm.preprocess.frames.extract import extract_frames
from stm.preprocess.packing.pack import pack_shard
from stm.storage.files import write_json
from stm.training.checkpoint import Checkpoints
from stm.training.loop import TrainingPlan, fit

Run = Callable[[Path], object]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes. Programs, including C++ libraries, see the same failure as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of `size` bytes at `folder`."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stm.preprocess.clip_outcomes, "run_isolated", run_here)


def frames(inputs: Path) -> Run:
    make_video(inputs / "a.mp4", make_pan(frames=16, width=96, height=64))
    slice_path = write_slice(inputs / "slice.parquet", [make_row("a.mp4")])
    run = partial(extract_frames, slice_path, inputs)
    return lambda out: run(out / "t.tar", out / "t.parquet", Frames(every=1, short_side=64), KEEP_GOING, 1)


def split(inputs: Path) -> Run:
    files = make_inputs(inputs)
    return lambda out: write_slices(files.slice, out / "slices", out / "slices.json", 2)


def captions(inputs: Path) -> Run:
    files, human = make_inputs(inputs), HumanCaptions(kind="human")
    return lambda out: write_captions(files.slice, files.tar, files.index, out / "c.parquet", human, KEEP_GOING)


def flow(inputs: Path) -> Run:
    files = make_inputs(inputs)
    return lambda out: write_flow(files.tar, files.index, out / "flow.parquet", Flow(), GRID, KEEP_GOING, 1)


def shards(inputs: Path) -> Run:
    files = make_inputs(inputs)
    parts = ("captions", "similarity", "text")
    arrays: dict[str, Any] = {
        part: {source: path_of(files.folder, part, source) for source in EVERYTHING.sources} for part in parts
    }
    arrays |= {"motion": files.motion, "flow": files.flow}
    run = partial(pack_shard, files.slice, files.tar, files.index, arrays.pop("captions"), arrays)
    return lambda out: run(tar=out / "s.tar", index=out / "s.parquet", pack=EVERYTHING, grid=GRID, bad_input=KEEP_GOING)


def weights(inputs: Path) -> Run:
    return lambda out: write_json(out / "metrics.json", {"values": list(range(2000))})


STAGES = [frames, split, captions, flow, shards, weights]


def check_error(error: OSError, folder: Path) -> None:
    assert error.errno in (errno.ENOSPC, errno.EFBIG)
    assert str(folder) in str(error), "does not say where"
    assert "make room and run again" in str(error), "does not say what to do"


@pytest.mark.parametrize("make", STAGES, ids=lambda make: make.__name__)
def test_a_full_disk_costs_nothing_that_was_finished(make: Callable[[Path], Run], tmp_path: Path) -> None:
    inputs, reference, output = (tmp_path / name for name in ("inputs", "reference", "output"))
    for folder in (inputs, reference, output):
        folder.mkdir()
    run = make(inputs)
    run(reference)
    expected = digests(reference)
    (output / "finished").write_bytes(b"earlier work")
    largest = max(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    for limit in (0, 100, largest // 3, largest - 1):
        before = digests(output)
        with pytest.raises(OSError) as caught, largest_file(limit):
            run(output)
        check_error(caught.value, output)
        after = digests(output)
        assert {name: after[name] for name in before} == before
        # Some of several outputs may be finished; each one that exists is complete.
        assert {name for name in after if after[name] != expected.get(name)} == {"finished"}
    run(output)
    assert digests(output) == expected | {"finished": digests(output)["finished"]}
    assert not list(output.rglob("*.journal"))


@pytest.mark.parametrize("make", [frames, shards], ids=lambda make: make.__name__)
def test_a_real_full_disk(make: Callable[[Path], Run], tmp_path: Path) -> None:
    for name in ("inputs", "reference"):
        (tmp_path / name).mkdir()
    run = make(tmp_path / "inputs")
    run(tmp_path / "reference")
    tar = max(path.stat().st_size for path in (tmp_path / "reference").glob("*.tar"))
    with small_disk(tmp_path / "disk", tar // 2):
        with pytest.raises(OSError) as caught:
            run(tmp_path / "disk")
        check_error(caught.value, tmp_path / "disk")
        assert digests(tmp_path / "disk") == {}


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(OSError), largest_file(10):
        write_json(tmp_path / "a.json", {"new": "x" * 100})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert "old" in (tmp_path / "a.json").read_text()


def test_the_journal_keeps_earlier_entries(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "output", {"stage": "x"})
    journal.put("first", b"a" * 100)
    with pytest.raises(OSError, match="make room"), largest_file(150):
        journal.put("second", b"b" * 1000)
    again = Journal(tmp_path / "output", {"stage": "x"})
    assert again.get("first") == b"a" * 100 and again.get("second") is None
    assert not list(journal.folder.glob("*.tmp"))


class Line(nn.Module):
    """A model whose loss decreases, large enough that its checkpoint does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3000))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        noise = torch.randn(3000)  # a resumed run must sample the same values as an uninterrupted one
        return {"loss": ((self.weight * batch["video"].mean() + 0.01 * noise) ** 2).mean()}


def train(output: Path) -> Line:
    module = Line()
    settings = Optimisation(epochs=1, batch_size=1, warmup_epochs=0, learning_rate=0.01)
    plan = TrainingPlan("made", settings, 6, 0, checkpoint_every=2, checkpoints_kept=1)
    batches = lambda step: iter([{"video": torch.full((1,), 1.0 + s)} for s in range(step, 6)])  # noqa: E731
    fit(module, batches, plan, output, Process(0, 1, torch.device("cpu")))
    return module


def test_a_checkpoint_that_does_not_fit_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = train(tmp_path / "uninterrupted")
    save = Checkpoints.save
    saved: list[int] = []

    def save_on_full_disk(self: Checkpoints, step: int, state: dict[str, object]) -> None:
        with largest_file(10_000 if step == 4 and not saved else 10**9):
            save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", save_on_full_disk)
    with pytest.raises(OSError) as caught:
        train(tmp_path / "run")
    check_error(caught.value, tmp_path / "run/checkpoints/step-000000004.pt")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["origin.json", "step-000000002.pt", "step-000000002.pt.sha256"]
    saved.append(True)
    resumed = train(tmp_path / "run")
    assert torch.equal(resumed.weight, uninterrupted.weight)
