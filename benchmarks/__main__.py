"""Run all benchmarks in turn on this machine and collect their results in one table.

    python -m benchmarks                         # all; prints an estimate of the time first
    python -m benchmarks --only loader,motion --rounds 3
    python -m benchmarks --quick                 # small sizes, minutes: checks that everything runs
    python -m benchmarks gpu                     # one GPU in under ten minutes, see benchmarks/gpu.py

The table is written to `benchmarks/results/{date}-{cpu or gpu}.md`, with the machine and the versions, and as JSON. A part that
is run again on the same day replaces its earlier rows; a part that fails is named, and the others still run.
Compare ratios only: absolute speeds depend on the machine.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._machine import describe
from benchmarks._table import ROWS, Row, render

FOLDER = Path(__file__).parent
GPU = "gpu"  # a run of its own, with its own arguments and table
AVAILABLE = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_") and path.stem != GPU)


class Part(NamedTuple):
    """A benchmark: minutes on two idle cores or with a GPU, and its arguments."""

    minutes: float
    cpu: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()  # replaces either


VIT_B = ("--size", "base", "--image-size", "224", "--frames", "16")
PARTS = {
    "similarity": Part(
        6, gpu=("--precision", "bfloat16", "--batch-size", "1024", "--clips", "32", "--compile"), quick=("--small",)
    ),
    "training_step": Part(
        4, (*VIT_B, "--batch", "2"), (*VIT_B, "--batch", "64", "--precision", "bf16"), ("--size", "tiny")
    ),
    "loader": Part(3, quick=("--clips", "1", "--seconds", "4", "--visits", "1")),
    "motion": Part(4, quick=("--clips", "1", "--frames", "48")),
    "dense": Part(5, quick=("--clips", "2", "--crops", "4")),
    "captions": Part(1, quick=("--clips", "4")),
    "dag": Part(12, quick=("--videos", "1000", "--rounds", "1")),
    "growth": Part(16, quick=("--clips", "2", "--stages", "frames", "motion")),
    "training_sweep": Part(20, ("--toy",), quick=("--toy",)),
    "masking": Part(
        12,
        ("--rounds", "2"),
        ("--step-batch", "32", "--precision", "bf16"),
        ("--batch", "2", "--step-batch", "1", "--rounds", "1"),
    ),
    "memory": Part(4, quick=("--config", "tgm", "--names", "tube-k400")),
    "language_masking": Part(
        12, ("--rounds", "2"), ("--step-batch", "32", "--precision", "bf16"), ("--batch", "2", "--rounds", "1")
    ),
}
NAMES = [*(name for name in PARTS if name in AVAILABLE), *(name for name in AVAILABLE if name not in PARTS)]


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="part", help=f"parts to run; default: all of {', '.join(NAMES)}")
    parser.add_argument("--only", help="the same, separated by commas", metavar="PART,PART")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement; default: each part's own")
    parser.add_argument("--quick", action="store_true", help="small sizes, only to check that everything runs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if available")
    parser.add_argument("--threads", type=int, help="threads of torch and numpy; default: their own")
    parser.add_argument("--output", type=Path, default=FOLDER / "results", help="folder for the table")
    arguments = parser.parse_args(given)
    arguments.names += [name for name in (arguments.only or "").split(",") if name]
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; available: {', '.join(NAMES)}")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    if given[:1] == [GPU]:
        from benchmarks import gpu

        return gpu.main(given[1:])
    arguments = parse_arguments(given)
    device = arguments.device or _find_device()
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    selected = [name for name in NAMES if name in (arguments.names or NAMES)]
    record = open_record(arguments.output, device)
    for topic, value in record["machine"].items():
        print(f"{topic}: {value}")
    announce(selected, arguments.quick)
    failed = []
    for name in selected:
        print(f"\n== {name}", flush=True)
        result = run_part(name, make_command(name, device, arguments), arguments.threads)
        record["parts"][name] = result
        save_record(arguments.output, device, record)
        if result["status"]:
            failed.append(name)
    print(f"\n{render([Row(**row) for part in record['parts'].values() for row in part['rows']])}")
    print(f"\nwritten to {name_record(arguments.output, device).with_suffix('.md')}")
    if failed:
        print(f"failed: {', '.join(failed)}; their output is in the table's file", file=sys.stderr)
    return 1 if failed else 0


def _find_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def announce(selected: Sequence[str], quick: bool) -> None:
    """Print how long it will take on an idle machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        print(
            f"\nthe machine is not idle (load {load:.1f} on {cores} cores): ratios are approximate, speeds are not valid"
        )
    if not quick:
        estimates = {name: f"{PARTS[name].minutes:g} min" if name in PARTS else "unknown" for name in selected}
        print("\nestimated: " + ", ".join(f"{name} {time}" for name, time in estimates.items()))


def make_command(name: str, device: str, arguments: argparse.Namespace) -> list[str]:
    part = PARTS.get(name, Part(0))
    options = part.quick if arguments.quick else part.gpu if device == "cuda" else part.cpu
    rounds: tuple[str, ...] = ()
    # Not every part has rounds.
    if arguments.rounds and '"--rounds"' in (FOLDER / f"{name}.py").read_text():
        rounds = ("--rounds", str(arguments.rounds))
    return [sys.executable, "-m", f"benchmarks.{name}", *options, *rounds]


def run_part(name: str, command: Sequence[str], threads: int | None) -> dict[str, Any]:
    """Run a part in a process of its own, print its output, and return its rows, output, status and time."""
    # By default glibc returns large arrays to the system after each step and fetches them again page by page, which slows
    # peers down as much as ours.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    if threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    load = os.getloadavg()[0]
    began = time.monotonic()
    printed = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**environment, ROWS: str(rows)}
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                printed.append(line)
        results = json.loads(rows.read_text()) if rows.exists() else []
    if process.returncode:
        print(f"{name} ended with status {process.returncode}", file=sys.stderr)
    return {
        "status": process.returncode,
        "command": " ".join(["python", *command[1:]]),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "load": round(load, 1),
        "rows": results,
        "printed": "".join(printed),
    }


def name_record(folder: Path, device: str) -> Path:
    return folder / f"{datetime.date.today()}-{'gpu' if device == 'cuda' else 'cpu'}.json"


def open_record(folder: Path, device: str) -> dict[str, Any]:
    """Today's record of this machine, or a new one."""
    path, machine = name_record(folder, device), describe()
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        if record["machine"] != machine:
            sys.exit(f"{path} is from another machine or other versions; choose another folder with --output")
        return record
    return {"date": str(datetime.date.today()), "machine": machine, "parts": {}}


def save_record(folder: Path, device: str, record: dict[str, Any]) -> None:
    path = name_record(folder, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(render_record(record))


def render_record(record: dict[str, Any]) -> str:
    """The machine, the table, and the output of each part."""
    parts: dict[str, dict[str, Any]] = record["parts"]
    rows = [Row(**row) for part in parts.values() for row in part["rows"]]
    machine = [f"- {topic}: {value}" for topic, value in record["machine"].items()]
    lines = [f"# Speed, {record['date']}", "", *machine, "", render(rows), ""]
    lines += ["Ratios are medians over rounds of one run, with their minimum and maximum.", ""]
    for name, part in parts.items():
        status = f", ended with status {part['status']}" if part["status"] else ""
        lines += [
            f"## {name}",
            "",
            f"`{part['command']}`: {part['minutes']} min, load before it {part['load']}{status}",
        ]
        lines += ["", "```", part["printed"].strip(), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
