"""A disk that fails while a stage reads an input stops the stage, and the next run ends with the same bytes.

The reads of one file fail in the whole process, C libraries included, by a small preloaded library.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from stage_outputs import Clip, make_stage_outputs
from synthetic_videos import make_row, make_video, write_slice
from trial import digests, run_here

import stm.datasets.probe_pool
import stm.preprocess.clip_outcomes
from stm.config import BadInput, Flow, Frames, HumanCaptions, Motion, MovingShapesDataset, Pack, parse_config
from stm.datasets import build_manifest, list_fingerprint
from stm.datasets.moving_shapes.generate import generate
from stm.manifest import read_shards, write_slices
from stm.plan.clips import count_clips
from stm.preprocess.captions.write import write_captions
from stm.preprocess.flow.estimate import write_flow
from stm.preprocess.frames.extract import extract_frames
from stm.preprocess.motion.measure import extract_motion
from stm.preprocess.packing.pack import pack_shard
from stm.shards.index import ClipIndex
from stm.storage.files import write_json

ROOT = Path(__file__).parents[2]
GRID = 4
KEEP_GOING = BadInput(max_failure_rate=1.0)
Run = Callable[[Path], object]  # takes the folder for the outputs


def jobs(folder: Path) -> dict[str, tuple[Run, list[Path]]]:
    """The stages with the files that they read."""
    folder.mkdir()
    files = make_stage_outputs(folder / "made", [Clip("a", captions=["one"]), Clip("b", captions=["two"])], GRID)
    human = HumanCaptions(kind="human")
    captions = folder / "captions.parquet"
    write_captions(files.slice, files.tar, files.index, captions, human, KEEP_GOING)
    root = folder / "root"
    root.mkdir()
    for name in ("one.mp4", "two.mp4"):
        noise = np.random.default_rng(0).integers(0, 256, (16, 96, 128, 3), np.uint8)  # takes several reads
        make_video(root / name, noise)
    video = root / "one.mp4"
    rows = write_slice(folder / "videos.parquet", [make_row("one.mp4"), make_row("two.mp4")])
    stored = Frames(every=2, short_side=64)
    index = folder / "stored.parquet"
    extract_frames(rows, root, folder / "stored.tar", index, stored, KEEP_GOING, 1)
    annotations = folder / "annotations.csv"
    annotations.write_text("path\none.mp4\ntwo.mp4\n")
    dataset = {"source": "folder", "root": str(root), "annotations": str(annotations), "split": "train"}
    config = parse_config({"name": "x", "dataset": dataset, "bad_input": {"max_failure_rate": 1.0}})
    shards = folder / "shards.json"
    write_json(shards, {"shards": {"train-00000": {}}})
    packed = Pack(captions="human", similarity=False, motion=True, flow=True)
    inputs = (files.slice, files.tar, files.index, {"human": captions}, {"motion": files.motion, "flow": files.flow})
    read_by_packing = [files.slice, files.tar, files.index, captions, files.motion, files.flow]

    def pack(out: Path) -> None:
        pack_shard(*inputs, out / "s.tar", out / "s.parquet", packed, GRID, KEEP_GOING)

    pack(folder)
    small = MovingShapesDataset(source="moving-shapes", clips={"train": 1}, frames=8, height=64, width=64)
    generate(small, 0, folder / "shapes", 1)
    made = folder / "shapes/videos/made.json"
    motion, flow = Motion(backend="mestimate"), Flow()
    return {
        "manifest": (
            lambda out: build_manifest(config, None, out / "manifest", out / "quarantine", 1),
            [annotations, video],
        ),
        "fingerprint": (lambda out: list_fingerprint(config), [annotations]),
        "shapes": (lambda out: generate(small, 0, folder / "shapes", 1), [made]),
        "split": (lambda out: write_slices(rows, out / "slices", out / "slices.json", 2), [rows]),
        "shard names": (lambda out: read_shards(shards), [shards]),
        "frames": (
            lambda out: extract_frames(rows, root, out / "f.tar", out / "f", stored, KEEP_GOING, 1),
            [rows, video],
        ),
        "motion": (
            lambda out: extract_motion(rows, root, index, out / "m", motion, 5, KEEP_GOING, 1),
            [rows, index, video],
        ),
        "captions": (
            lambda out: write_captions(files.slice, files.tar, files.index, out / "c", human, KEEP_GOING),
            [files.slice, files.index],
        ),
        "shards": (pack, read_by_packing),
        "index": (lambda out: ClipIndex([folder / "s.parquet"]), [folder / "s.parquet"]),
        "plan": (lambda out: count_clips(config), [annotations]),
        "flow": (
            lambda out: write_flow(files.tar, files.index, out / "flow", flow, GRID, KEEP_GOING, 1),
            [files.tar, files.index],
        ),
    }


@contextmanager
def worker_processes(used: bool) -> Iterator[None]:
    """Process items in this process unless worker processes, which take long to start, are to be used."""
    with ExitStack() as stack:
        for module in () if used else (stm.datasets.probe_pool, stm.preprocess.clip_outcomes):
            stack.enter_context(patch.object(module, "run_isolated", run_here))
        yield


def main(folder: Path) -> None:
    """Run every stage with each of its inputs on a failing disk, and print what happened."""
    os.environ["FAIL_ERRNO"] = str(errno.EIO)
    found = []
    for name, (run, inputs) in jobs(folder / "inputs").items():
        (folder / "undisturbed" / name).mkdir(parents=True)
        with worker_processes(False):
            run(folder / "undisturbed" / name)
        expected = digests(folder / "undisturbed" / name)
        # A video is read several times: for its hash, its header and its frames.
        cases = [(path, reads) for path in inputs for reads in ((0, 1, 3) if path.suffix == ".mp4" else (0,))]
        for file, reads in cases:
            out = folder / "out" / name / f"{file.name}-{reads}"
            out.mkdir(parents=True)
            with worker_processes(name == "flow"):
                os.environ["FAIL_FILE"], os.environ["FAIL_AFTER"] = str(file), str(reads)
                try:
                    run(out)
                    error = "none"
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"
                os.environ["FAIL_FILE"] = ""
                left = digests(out)
                run(out)
            found.append([name, file.name, error, left, digests(out) == expected])
    print(json.dumps(found))


@pytest.mark.slow
def test_a_failing_disk_stops_every_stage_and_costs_nothing(tmp_path: Path) -> None:
    library = tmp_path / "failing_disk.so"
    source = ROOT / "tests/helpers/failing_disk.c"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a C compiler")
    paths = [str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tests/faults")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "LD_PRELOAD": str(library), "FAIL_FILE": ""}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 29
    wrong = [(stage, file, error) for stage, file, error, *_ in found if "OSError: [Errno 5]" not in error]
    assert not wrong, wrong
    unnamed = [(stage, file, error) for stage, file, error, *_ in found if file not in error]
    assert not unnamed, unnamed
    assert not [(stage, file, left) for stage, file, _, left, _ in found if left], "an output although an input failed"
    assert not [(stage, file) for stage, file, *_, same in found if not same], "other bytes after the disk was mended"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
