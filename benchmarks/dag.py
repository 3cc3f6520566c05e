"""Time and memory of Snakemake itself by number of videos, at the default shard size.

Every offline stage is enabled, and two runs are pretrained and evaluated. The videos are empty files and the results
placeholders: no stage runs. Two commands are measured in turns: a dry run after the clips have been split into shards and
before anything else has run, and a run with nothing to do. The targets at 240,000 videos are 10 and 20 seconds. The
ratio compares CPU time with a dry run of a bare workflow with as many jobs, in chains of eight rules without params,
functions or configs: the minimum that Snakemake needs.

    python -m benchmarks.dag
    python -m benchmarks.dag --videos 240000 --rounds 1
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks._processes import Cost, run_measured
from benchmarks._table import Row, compare, report
from stm.config import parse_config
from stm.layout import Layout
from stm.manifest import MANIFEST_SCHEMA, QUARANTINE_SCHEMA, make_key, write_slices
from stm.storage.tables import write_table

ROOT = Path(__file__).parents[1]
VIDEOS_PER_FOLDER = 1000
AIMS = {"dry run": "10 s at 240,000", "nothing to do": "20 s at 240,000"}
SNAKEMAKE = (sys.executable, "-m", "snakemake")
CHAIN = 8  # rules per shard: frames, captions, embeddings, similarity, text, motion, flow, shards
RUN = {
    "model": "small",
    "image_size": 224,
    "frames": 16,
    "mask": {"strategy": "text_top", "ratio": 0.6},
    "optimisation": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0},
}
CONFIG: dict[str, Any] = {
    "name": "many",
    "dataset": {"source": "folder", "root": "../videos", "annotations": "../clips.parquet"},
    "captions": {"blip2": {"kind": "blip2", "model": "Salesforce/blip2-opt-2.7b"}},
    "similarity": {"keep_embeddings": True},
    "pack": {"captions": "blip2", "similarity": True, "motion": True, "flow": True, "text": True},
    "pretrain": {"text": RUN, "flow": {**RUN, "mask": {"strategy": "flow", "ratio": 0.9}}},
    "evaluate": {"linear": {"task": "linear"}},
}
# Snakemake's --touch marks files as finished results; this removes its pause of 0.1 s per job.
TOUCH = (
    "from snakemake.executors import touch; touch.Executor.SLEEPING_TIME = 0; from snakemake.cli import main; main()"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, nargs="*", default=[1000, 10_000, 240_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3, help="medians over rounds are printed")
    arguments = parser.parse_args()
    print(f"{'videos':>9} {'shards':>6} {'jobs':>6}   {'':13} {'seconds':>8} {'CPU':>7} {'MB':>5}", flush=True)
    rows = []
    for videos in arguments.videos:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), videos, arguments.rounds)
    report(rows)


def measure(folder: Path, videos: int, rounds: int) -> list[Row]:
    """The two rows for one number of videos."""
    todo, done, bare = folder / "todo", folder / "done", folder / "bare"
    write_videos(folder, videos)
    shards = write_manifest(todo)
    shutil.copytree(todo, done)
    finish(done)
    write_chains(bare, shards)
    costs: dict[str, list[Cost]] = {"dry run": [], "nothing to do": [], "bare": []}
    for _ in range(rounds):
        costs["bare"].append(run_measured([*SNAKEMAKE, "--cores", "1", "--dry-run"], bare / "printed", bare))
        costs["dry run"].append(snakemake(todo, "--dry-run")[0])
        cost, printed = snakemake(done)
        assert "Nothing to be done" in printed, printed[-4000:]
        costs["nothing to do"].append(cost)
    jobs = re.findall(r"^total +(\d+)", (todo / "printed").read_text(), re.M)[-1]
    for name, measured in costs.items():
        print(f"{videos:9,} {shards:6,} {int(jobs):6,}   {name:13} {_columns(measured)}", flush=True)
    return [make_row(f"{name}, {videos:,} videos", costs[name], costs["bare"], aim) for name, aim in AIMS.items()]


def make_row(what: str, costs: list[Cost], bare: list[Cost], aim: str) -> Row:
    cpu, bare_cpu = [cost.cpu for cost in costs], [cost.cpu for cost in bare]
    speed = f"{median(cost.wall for cost in costs):.1f} s, {median(cpu):.1f} s of CPU"
    return compare(what, speed, cpu, bare_cpu, f"bare workflow, {median(bare_cpu):.1f} s of CPU", aim)


def _columns(costs: list[Cost]) -> str:
    return (
        f"{median(c.wall for c in costs):8.1f} {median(c.cpu for c in costs):7.1f} {max(c.memory for c in costs):5.0f}"
    )


def write_chains(folder: Path, shards: int) -> None:
    """A workflow of as many jobs that has nothing of ours."""
    rules = [f"rule all:\n    input: expand('{CHAIN - 1}/{{shard}}', shard=range({shards}))\n"]
    for number in range(CHAIN):
        needs = f"    input: '{number - 1}/{{shard}}'\n" if number else ""
        rules.append(f"rule stage{number}:\n{needs}    output: '{number}/{{shard}}'\n    shell: ':'\n")
    folder.mkdir()
    (folder / "Snakefile").write_text("\n".join(rules))


def write_videos(folder: Path, count: int) -> None:
    """Empty files and their annotations: every tenth is a test clip."""
    paths = [f"{number // VIDEOS_PER_FOLDER:04d}/{number:07d}.mp4" for number in range(count)]
    for path in paths:
        video = folder / "videos" / path
        video.parent.mkdir(parents=True, exist_ok=True)
        video.touch()
    splits = ["test" if number % 10 == 9 else "train" for number in range(count)]
    labels = [str(number % 400) for number in range(count)]
    pq.write_table(pa.table({"path": paths, "split": splits, "label": labels}), folder / "clips.parquet")


def write_manifest(folder: Path) -> int:
    """Write the results of the manifest and split rules as if every video were intact; return the number of shards."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    config = parse_config(CONFIG)
    layout = Layout(folder / Layout.of(config).root)
    clips = pq.read_table(folder.parent / "clips.parquet")
    names = [path.removesuffix(".mp4") for path in clips["path"].to_pylist()]
    values = {
        **dict(zip(clips.column_names, clips.columns, strict=True)),
        "video_id": names,
        "key": map(make_key, names),
    }
    columns = [
        pa.array(values[f.name], f.type) if f.name in values else pa.nulls(len(names), f.type) for f in MANIFEST_SCHEMA
    ]
    table = pa.table(columns, schema=MANIFEST_SCHEMA)
    write_table(layout.manifest, table, {})
    write_table(layout.quarantine, QUARANTINE_SCHEMA.empty_table(), {})
    shards = write_slices(layout.manifest, layout.root / "slices", layout.shard_index, config.shard_size)
    snakemake(
        folder, "--touch", *(path.relative_to(folder).as_posix() for path in (layout.manifest, layout.shard_index))
    )
    return len(shards)


def finish(folder: Path) -> None:
    """Create an empty file for every result and mark all of them as finished."""
    _, printed = snakemake(folder, "--summary")
    lines = [line.split("\t") for line in printed.splitlines()]
    outputs = [folder / line[0] for line in lines if line[0].startswith("results/")]
    assert len(outputs) > 10, printed[-4000:]
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
    # Many cores, so that the scheduler, which looks at all jobs that are ready, runs only a few times.
    snakemake(folder, "--touch", "--scheduler", "greedy", "--cores", "1000", program=("-c", TOUCH))


def snakemake(folder: Path, *arguments: str, program: tuple[str, ...] = ()) -> tuple[Cost, str]:
    """Run Snakemake on the repository's workflow; return its cost and its output."""
    command = [
        sys.executable,
        *(program or SNAKEMAKE[1:]),
        "--snakefile",
        str(ROOT / "workflow/Snakefile"),
        "--cores",
        "1",
        *arguments,
    ]
    command += ["--configfile", "config.yaml"]
    cost = run_measured(command, folder / "printed", folder, {"PYTHONPATH": str(ROOT)})
    return cost, (folder / "printed").read_text()


if __name__ == "__main__":
    main()
