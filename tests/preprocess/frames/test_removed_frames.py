"""Frames that are removed once packed, and those that are taken from another dataset: the same bytes as without."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_videos import X264, make_pan, make_row, make_video, write_slice

from stm.config import parse_config
from stm.preprocess.frames import extract, removal, stage
from stm.preprocess.frames.removal import remove_frames, restore_frames
from stm.preprocess.frames.stage import FRAMES, Lender, find_lenders, removes_frames
from stm.preprocess.frames.table import are_removed, read_jpegs, read_kept
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages
from stm.storage.files import sha256_file
from stm.storage.tables import DamagedError

STAGES: dict[str, Any] = {"short_side": 64, "every": 4}
FRAMES_ONLY = {"similarity": False, "motion": False}
ROWS = [
    make_row("a.mp4"),
    make_row("a.mp4", video_id="part", start=0.2, end=0.8),
    make_row("b.mp4"),
    make_row("no.mp4"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate("abc"):
        make_video(
            folder / f"{name}.mp4", make_pan(24, 2, number, 96, 64), [*X264, "-g", "8", "-movflags", "+faststart"]
        )
    (folder / "b.mp4").write_bytes((folder / "b.mp4").read_bytes()[:-300])  # kept, with a note
    return folder


def make_job(folder: Path, videos: Path, frames: Mapping[str, Any], rows: Any = ROWS, **other: Any) -> Job:
    """A job of the dataset `one`, and its slices; `other` are further datasets with their settings of frames."""
    datasets = {
        name: {"dataset": {"source": "folder", "root": str(videos)}, "frames": {**STAGES, **own}}
        for name, own in {"one": frames, **other}.items()
    }
    values = {"name": "all", "results": str(folder / "results"), "pack": FRAMES_ONLY, "datasets": datasets}
    config = parse_config({**values, "bad_input": {"max_failure_rate": 1}})
    jobs = Jobs(config, lambda dataset: ["train-00000"])
    job = jobs.make(dataset="one", shard="train-00000", split="train")
    job.layout.slices.mkdir(parents=True, exist_ok=True)
    write_slice(job.layout.slice(job.shard), rows)
    return job


def run(job: Job) -> tuple[Path, Path]:
    outputs = FRAMES.outputs(job)
    outputs["tar"].parent.mkdir(parents=True, exist_ok=True)
    FRAMES.run(job, FRAMES.inputs(job), outputs, 1)
    return outputs["tar"], outputs["index"]


def pack(job: Job) -> None:
    shards = all_stages()["shards"]
    outputs = shards.outputs(job)
    outputs["tar"].parent.mkdir(parents=True, exist_ok=True)
    shards.run(job, shards.inputs(job), outputs, 1)


@pytest.fixture(scope="module")
def stored(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(tmp_path_factory.mktemp("stored"), videos, {"keep": False})
    run(job)
    return job


def test_removed_frames_come_back_with_the_same_bytes_and_time(stored: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    tar, index = stored.layout.frames_tar(stored.shard), stored.layout.frames(stored.shard)
    before, modified, table = tar.read_bytes(), tar.stat().st_mtime_ns, sha256_file(index)
    pack(stored)
    assert (tar.stat().st_size, tar.stat().st_mtime_ns) == (0, modified), "nothing that Snakemake would see"
    with pytest.raises(DamagedError, match=r"removed once they were packed \(frames\.keep: false\)"):
        read_jpegs(tar, read_kept(index)[0])
    decoded: list[str] = []
    monkeypatch.setattr(extract, "run_shard", note_tasks(extract.run_shard, decoded))
    restore_frames(stored, 1)
    assert decoded == ["no.mp4"], "the others come from the packed shard"
    assert tar.read_bytes() == before and tar.stat().st_mtime_ns == modified and sha256_file(index) == table
    assert sorted(path.name for path in tar.parent.iterdir()) == [index.name, tar.name]
    packed = stored.layout.shard_tar(stored.shard)
    packed.write_bytes(packed.read_bytes()[:2000])
    tar.unlink()  # by hand
    restore_frames(stored, 1)
    assert tar.read_bytes() == before and set(decoded) == {"a.mp4", "part", "b.mp4", "no.mp4"}
    for path in packed.parent.iterdir():
        path.unlink()


def test_a_job_waits_for_another_one_that_makes_the_same_frames(stored: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    tar, calls = stored.layout.frames_tar(stored.shard), 0
    remove_frames(tar)

    @contextmanager
    def locked(path: Path) -> Iterator[None]:
        nonlocal calls
        calls += 1
        if calls == 3:  # the other process has finished
            removal._extract_again(stored, tar, stored.layout.frames(stored.shard), 1)
        raise removal.JobRunningError(f"another process is writing {path}")
        yield

    monkeypatch.setattr(removal, "only_job", locked)
    monkeypatch.setattr(removal, "_WAIT_SECONDS", 0.01)
    restore_frames(stored, 1)
    assert calls == 3 and not are_removed(tar)


def test_frames_that_come_out_differently_are_refused(stored: Job, videos: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, videos, {"keep": False}, [make_row("a.mp4")])
    tar, index = run(job)
    remove_frames(tar)
    write_slice(job.layout.slice(job.shard), [make_row("c.mp4", video_id="a.mp4")])
    why = r"differently now: 1 of 1 clips have changed, for instance 'a.mp4' \(a.mp4\): has other frames.*--forcerun frames"
    with pytest.raises(DamagedError, match=why):
        restore_frames(job, 1)
    write_slice(job.layout.slice(job.shard), [make_row("gone.mp4", video_id="a.mp4")])
    with pytest.raises(DamagedError, match=r"'a.mp4' \(a.mp4\): no such file; bring the videos back"):
        restore_frames(job, 1)
    assert are_removed(tar) and index.exists() and len(list(tar.parent.iterdir())) == 2


def test_a_link_into_a_shared_cache_stays(stored: Job, tmp_path: Path) -> None:
    restore_frames(stored, 1)
    tar = stored.layout.frames_tar(stored.shard)
    link = tmp_path / "frames.tar"
    link.symlink_to(tar)
    remove_frames(link)
    assert link.is_symlink() and not are_removed(link)


@pytest.mark.parametrize(
    ("keys", "removed"),
    [
        ({}, True),
        ({"frames": {**STAGES, "keep": True}}, False),
        ({"mask_quality": {}}, False),
        ({"captions": {"texts": {"kind": "human"}}, "pack": {"captions": "texts"}, "crop_agreement": {}}, False),
        ({"captions": {"texts": {"kind": "human"}}, "pack": {"captions": "texts"}}, True),
    ],
)
def test_frames_stay_where_later_stages_read_them(keys: dict[str, Any], removed: bool) -> None:
    base = {"name": "one", "dataset": {"source": "moving-shapes"}, "frames": {**STAGES, "keep": False}}
    job = Jobs(parse_config({**base, **keys}), lambda _: [f"train-0000{n}" for n in range(6)]).make(dataset="one")
    shards = [removes_frames(replace(job, shard=f"train-0000{number}")) for number in range(6)]
    # Crops are compared in four shards of the split.
    assert shards == ([False] * 4 + [True] * 2 if "crop_agreement" in keys else [removed] * 6)


# ------------------------------------------------------------------------------------------------ another dataset's


def test_taken_frames_are_those_that_would_be_decoded(stored: Job, videos: Path, tmp_path: Path) -> None:
    restore_frames(stored, 1)
    rows = [
        make_row("a.mp4", video_id="question 1"),
        make_row("a.mp4", video_id="question 2"),
        make_row("a.mp4", video_id="other part", start=0.2, end=0.7),
        make_row("b.mp4"),
        make_row("c.mp4"),
        make_row("no.mp4"),
    ]
    alone = run(make_job(tmp_path / "alone", videos, {}, rows))
    job = make_job(tmp_path / "shared", videos, {}, rows)
    tar, index = job.layout.frames_tar(job.shard), job.layout.frames(job.shard)
    lender = Lender.of(stored.layout, stored.shard)
    tar.parent.mkdir(parents=True)
    arguments = (job.layout.slice(job.shard), videos, tar, index, job.config.frames, job.config.bad_input, 1)
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as said:
        patch.setattr("sys.stderr", said)
        patch.setattr(extract, "run_shard", note_tasks(extract.run_shard, opened))
        extract.extract_frames(*arguments, lenders=[lender])
        assert "3 of 6 clips have frames that are stored already" in said.getvalue()
    assert sorted(opened) == ["c.mp4", "no.mp4", "other part"], "the others are not decoded"
    assert [tar.read_bytes(), index.read_bytes()] == [path.read_bytes() for path in alone]
    assert {row["video_id"]: row["status"] for row in read_kept(index)}["b.mp4"] == "truncated"


def note_tasks(run_shard: Any, opened: list[str]) -> Any:
    def noting(title: str, function: Any, tasks: Any, journal: Any, *more: Any) -> Any:
        journal.refresh()
        opened.extend(task.name for task in tasks if journal.get(task.item) is None)
        return run_shard(title, function, tasks, journal, *more)

    return noting


def test_a_replaced_video_is_not_taken(stored: Job, videos: Path, tmp_path: Path) -> None:
    lender = Lender.of(stored.layout, stored.shard)
    task = extract.FrameTask(make_row("a.mp4", ends_hash="0" * 16), videos, stored.config.frames, {})  # type: ignore[arg-type]
    assert extract.borrow_frames("frames", [task], [lender], {}) == [task]  # type: ignore[arg-type]


def test_packed_frames_can_be_taken_as_well(stored: Job, videos: Path, tmp_path: Path) -> None:
    restore_frames(stored, 1)
    pack(stored)
    opened: list[str] = []
    job = make_job(tmp_path, videos, {}, [make_row("a.mp4", video_id="question"), make_row("b.mp4")])
    lender = Lender.of(stored.layout, stored.shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "find_lenders", lambda job: [lender])
        patch.setattr(extract, "run_shard", note_tasks(extract.run_shard, opened))
        tar, _ = run(job)
    assert opened == [] and are_removed(lender.tar)
    assert [row["frames"] for row in read_kept(job.layout.frames(job.shard))] == [5, 6]
    assert [len(read_jpegs(tar, row)) for row in read_kept(job.layout.frames(job.shard))] == [5, 6]


def test_a_dataset_that_lends_is_done_first(videos: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, videos, {"keep": False, "from_dataset": "two"}, two={"keep": False})
    inputs, lender = FRAMES.inputs(job), job.jobs.layouts["two"]
    assert inputs["lenders"] == [lender.frames("train-00000")]
    assert [one.tar for one in find_lenders(job)] == [lender.frames_tar("train-00000")]
    assert "lenders" not in FRAMES.inputs(job.on("two"))
