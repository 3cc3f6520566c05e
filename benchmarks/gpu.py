"""What one GPU does, in under ten minutes: training steps, the loader before them, the similarity stage, the tests of CUDA.

    python -m benchmarks gpu
    python -m benchmarks gpu --only mae,loader           # some sections
    python -m benchmarks gpu --device cpu --quick        # the same code at tiny sizes, to check that it runs

Training is that of `stm pretrain`: `stm.training.loop.fit` with AdamW, and its own log of clips per second; only the final
weights are not written. MAE (ViT-B, 16 frames) at three mask ratios, and UMT's first stage with its teacher (8 frames, CLIP's
ViT-B/16 with random weights), each plain and compiled, from a batch in pinned memory; then MAE 0.9 from shards of generated
frames, with one loading process per core. The peak is that of large products of bfloat16 matrices in the same run. The FLOP of
a step are computed by formula (`stm.models.cost`, `benchmarks.training_sweep`), which a test compares with what
`torch.utils.flop_counter` counts; work that is repeated or padded does not count.

Each section is a process with a time limit: its own time, and what the sections before it left. The table and its JSON are
written after each measurement; a section that fails, runs out of time or lacks a package is named, and the others still run.
"""

import argparse
import copy
import datetime
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

ROOT = Path(__file__).parents[1]
PEAK_SHARE = 0.40
CLIPS_PER_SECOND = {"MAE 0.9": 1500}
RATIOS = (0.9, 0.75, 0.6)
BATCHES = {0.9: 256, 0.75: 128, 0.6: 64}  # clips
UMT_BATCH = 128
LOADER_BATCH = 64  # each loading process holds four batches in shared memory
TINY_BATCH = 2
EVERY, LINES, WARM_UP = 5, 6, 2  # steps per line of the log, lines, and how many of them do not count

Record = dict[str, Any]


class Section(NamedTuple):
    """A part of the run: the time in seconds that is kept for it, and the packages that it needs besides torch and numpy."""

    seconds: float
    packages: tuple[str, ...]


TRAINING = ("pydantic", "yaml", "pyarrow", "cv2", "simplejpeg", "safetensors", "timm", "tensorboard")
SECTIONS = {
    "peak": Section(20, TRAINING),
    "mae": Section(200, TRAINING),
    "umt": Section(110, (*TRAINING, "open_clip")),
    "loader": Section(120, TRAINING),
    "similarity": Section(60, (*TRAINING, "open_clip")),
    "tests": Section(55, ("pytest", "hypothesis")),
}
LIMIT = 570.0  # seconds, of the whole run


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", help=f"sections, separated by commas: {', '.join(SECTIONS)}", metavar="NAME,NAME")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models and clips, only to check that everything runs"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="loading processes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the table")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)  # run it in this process
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)  # where the section writes, line by line
    parser.add_argument("--peak", type=float, default=0.0, help=argparse.SUPPRESS)  # FLOP/s, as measured before
    arguments = parser.parse_args(given)
    arguments.names = [name for name in (arguments.only or "").split(",") if name] or list(SECTIONS)
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu needs --quick: at the full sizes a processor would take hours")
    if unknown := set(arguments.names) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; available: {', '.join(SECTIONS)}")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    if arguments.section:
        return run_section(arguments)
    return run_all(arguments)


# ---------------------------------------------------------------------------------------------- the run and its table


def run_all(a: argparse.Namespace) -> int:
    """Run the sections one after the other; return 1 if one did not finish."""
    from benchmarks._machine import describe

    if a.device == "cuda" and not _has_cuda():
        sys.exit("torch finds no CUDA GPU; `--device cpu --quick` runs the same code at tiny sizes")
    if a.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    record: Record = {"date": str(datetime.date.today()), "machine": describe(), "sections": {}}
    # The peak comes first, because the others are compared with it.
    names = [name for name in SECTIONS if name in a.names or (name == "peak" and {"mae", "umt"} & set(a.names))]
    end = time.monotonic() + LIMIT
    for number, name in enumerate(names):
        print(f"\n== {name}", flush=True)
        section = record["sections"][name] = {"status": "running", "seconds": 0.0, "rows": []}
        started = time.monotonic()
        # What earlier sections did not need is this one's, too.
        seconds = end - started - sum(SECTIONS[later].seconds for later in names[number + 1 :])
        section["status"] = start_section(name, a, record, seconds)
        section["seconds"] = round(time.monotonic() - started, 1)
        if section["status"] != "finished":
            print(f"{name}: {section['status']}", file=sys.stderr, flush=True)
        save(a, record)
    print(f"\n{render(record)}\nwritten to {name_record(a, record).with_suffix('.md')}")
    return int(any(section["status"] != "finished" for section in record["sections"].values()))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def start_section(name: str, a: argparse.Namespace, record: Record, seconds: float) -> str:
    """Run a section in a process of its own, and write the record as its rows come; return how it ended."""
    if missing := [package for package in SECTIONS[name].packages if importlib.util.find_spec(package) is None]:
        return f"not run: this Python has no {', '.join(missing)} (requirements.lock names the packages)"
    if seconds < 5:
        return "not run: the time of the whole run is used up"
    peak = next((row["flops"] for row in record["sections"].get("peak", {}).get("rows", [])), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        records.touch()
        options = ["--device", a.device, "--workers", str(a.workers), *(["--quick"] if a.quick else [])]
        command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--records", str(records), *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        # A session of its own, so that the section's loading processes end with it.
        with subprocess.Popen(
            [*command, "--peak", str(peak)], cwd=ROOT, env=environment, start_new_session=True
        ) as process:
            try:
                return _wait(process, records, a, record, name, seconds)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def _wait(
    process: subprocess.Popen[bytes], records: Path, a: argparse.Namespace, record: Record, name: str, seconds: float
) -> str:
    rows = record["sections"][name]["rows"]
    end = time.monotonic() + seconds
    while True:
        status = process.poll()
        lines = records.read_text().splitlines(keepends=True)
        if complete := [line for line in lines[len(rows) :] if line.endswith("\n")]:
            rows += [json.loads(line) for line in complete]
            save(a, record)
        if status is not None:
            return "finished" if status == 0 else f"failed with status {status}; its error is in the output above"
        if time.monotonic() > end:
            return f"stopped after its time limit of {seconds:.0f} s"
        time.sleep(0.2)


def name_record(a: argparse.Namespace, record: Record) -> Path:
    output: Path = a.output
    return output / f"{record['date']}-one-{'gpu' if a.device == 'cuda' else 'cpu'}{'-quick' if a.quick else ''}.json"


def save(a: argparse.Namespace, record: Record) -> None:
    path = name_record(a, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(render(record))


def render(record: Record) -> str:
    """The machine, a Markdown table of all rows, and how each section ended."""
    lines = [f"# One GPU, {record['date']}", "", *(f"- {name}: {value}" for name, value in record["machine"].items())]
    columns = ("measurement", "clips/s", "ms per step", "GB", "TFLOP/s", "share of peak", "aims", "remarks")
    lines += ["", f"| {' | '.join(columns)} |", f"|---|{'---:|' * 5}---|---|"]
    for section in record["sections"].values():
        lines += [_render_row(row) for row in section["rows"]]
    ends = [f"- {name}: {part['status']}, {part['seconds']:.0f} s" for name, part in record["sections"].items()]
    aims = f"Aims: {PEAK_SHARE:.0%} of the measured peak; {CLIPS_PER_SECOND['MAE 0.9']:,} clips/s at mask ratio 0.9."
    return "\n".join([*lines, "", aims, "", *ends, ""])


def _render_row(row: Record) -> str:
    cells = [
        row["what"],
        _show(row.get("clips_per_second"), ".4g"),
        _show(row.get("seconds"), ".1f", 1000),
        _show(row.get("gigabytes"), ".1f"),
        _show(row.get("flops"), ".4g", 1e-12),
        _show(row.get("share"), ".1%"),
        row.get("aims", ""),
        row.get("remark", ""),
    ]
    return f"| {' | '.join(cells)} |"


def _show(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)


# -------------------------------------------------------------------------------------------------------- the sections


def run_section(a: argparse.Namespace) -> int:
    from stm.jobs.lifetime import end_with_parent

    end_with_parent(os.getppid())
    with tempfile.TemporaryDirectory() as folder:
        for row in MEASURE[a.section](a, Path(folder)):
            with a.records.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(_render_row(row), flush=True)
    return 0


def measure_peak(a: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """FLOP/s of products of bfloat16 matrices, the best of the sizes and rounds (float32 with --quick)."""
    import torch

    from benchmarks._table import wall_seconds

    device = torch.device(a.device)
    sides, kind, rounds = ((256,), torch.float32, 1) if a.quick else ((4096, 8192, 16384), torch.bfloat16, 5)
    rates: dict[int, float] = {}
    for side in sides:
        left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
        times = max(1, round(2 * (16384 / side) ** 3)) if not a.quick else 2

        def work(left: torch.Tensor = left, right: torch.Tensor = right, times: int = times) -> None:
            for _ in range(times):
                left @ right

        work()
        rates[side] = times * 2 * side**3 / min(wall_seconds(work) for _ in range(rounds))
    best = max(rates, key=lambda side: rates[side])
    yield {"what": f"matrix peak, {str(kind)[6:]}, {best} x {best}", "flops": rates[best]}


def measure_mae(a: argparse.Namespace, folder: Path) -> Iterator[Record]:
    yield from (measure_step(job, a, folder) for job in mae_jobs(a))


def measure_umt(a: argparse.Namespace, folder: Path) -> Iterator[Record]:
    from benchmarks import training_sweep as sweep

    teacher = sweep.TOY_TEACHER if a.quick else sweep.TEACHER
    run = sweep.umt_run(folder, teacher, **(QUICK_SIZE if a.quick else SIZE))
    batch = TINY_BATCH if a.quick else UMT_BATCH
    for compiled in (False,) if a.quick else (False, True):
        job = sweep.Job("UMT 0.8", run.model_copy(update={"compile": compiled}), batch, sweep.umt_flop(run, teacher))
        yield measure_step(job, a, folder)


def mae_jobs(a: argparse.Namespace) -> Iterator[Any]:
    """MAE at each mask ratio, plain and compiled; with --quick only plain, because compiling takes minutes on a CPU."""
    from benchmarks import training_sweep as sweep

    for ratio in RATIOS:
        for compiled in (False,) if a.quick else (False, True):
            run = mae_run(ratio, compiled, a)
            batch = TINY_BATCH if a.quick else BATCHES[ratio]
            yield sweep.Job(f"MAE {ratio:g}", run, batch, sweep.mae_flop(run))


SIZE: dict[str, Any] = {"model": "base", "image_size": 224}
QUICK_SIZE: dict[str, Any] = {"model": "tiny", "image_size": 32, "frames": 4}


def mae_run(ratio: float, compiled: bool, a: argparse.Namespace, **changes: Any) -> Any:
    from stm.config import PretrainRun

    size = QUICK_SIZE if a.quick else {**SIZE, "frames": 16}
    precision = "float32" if a.quick else "bf16"
    settings = {"mask": {"ratio": ratio}, "precision": precision, "compile": compiled, **changes}
    return PretrainRun.model_validate({**size, **settings})


def measure_step(job: Any, a: argparse.Namespace, folder: Path) -> Record:
    """The row of a job trained on one batch in memory; with half the batch, and again, while it does not fit."""
    import torch

    from benchmarks import training_sweep as sweep

    while job.batch:
        try:
            batch = sweep.draw_batch(job, torch.device("cpu"))
            if a.device == "cuda":
                batch = {name: _pin(value) for name, value in batch.items()}
            return measure_training(job, partial(_repeat, batch), a, folder)
        except torch.OutOfMemoryError:
            job = job._replace(batch=job.batch // 2)
    return {"what": job.name, "remark": "out of memory"}


def _pin(value: Any) -> Any:
    return {name: part.pin_memory() for name, part in value.items()} if isinstance(value, dict) else value.pin_memory()


def _repeat(batch: Record, process: Any) -> Iterator[Record]:
    while True:
        yield dict(batch)


class _Enough(Exception):
    """Ends a training that has been measured, before it writes a checkpoint."""


def measure_training(
    job: Any, make_batches: Callable[[Any], Iterator[Record]], a: argparse.Namespace, folder: Path, every: int = EVERY
) -> Record:
    """The row of some steps of `fit`, from the clips per second of its log.

    Args:
        make_batches: returns the batches for a process of a run.
        every: steps per line of the log; the first `WARM_UP` lines do not count.
    """
    import torch

    from benchmarks import training_sweep as sweep
    from stm.config import Optimisation
    from stm.distributed.process import Process, choose_device
    from stm.methods import build_method
    from stm.training.loop import TrainingPlan, fit

    process = Process(0, 1, choose_device(a.device))
    every = 1 if a.quick else every
    optimisation = Optimisation(batch_size=job.batch, epochs=1, warmup_epochs=0)
    plan = TrainingPlan(
        job.name, optimisation, 10**6, 0, precision=job.run.precision, compile=job.run.compile, log_every=every
    )
    with sweep.reset(process.device), tempfile.TemporaryDirectory(dir=folder) as output:
        torch.manual_seed(0)
        method = build_method(job.run).to(process.device)

        def batches(step: int) -> Iterator[Any]:
            source = map(method.prepare, make_batches(process))
            for _ in range(every * LINES):
                yield next(source)
            raise _Enough

        with suppress(_Enough):
            fit(method, batches, plan, Path(output), process)
        text = (Path(output) / "metrics.jsonl").read_text()
        memory = torch.cuda.max_memory_allocated() / 1e9 if a.device == "cuda" else None
    rates = [json.loads(line)["clips_per_second"] for line in text.splitlines()][WARM_UP:]
    return describe_training(job, rates, memory, a.peak)


def describe_training(job: Any, rates: Sequence[float], memory: float | None, peak: float) -> Record:
    """The row of a job: medians over the lines of the log.

    Args:
        rates: clips per second.
        memory: peak memory in GB.
        peak: FLOP/s of large matrix products; 0 if it was not measured.
    """
    rate = statistics.median(rates)
    aims = [f"{PEAK_SHARE:.0%}"] + [f"{n:,} clips/s" for name, n in CLIPS_PER_SECOND.items() if name == job.name]
    row = {
        "what": f"{job.name}, batch {job.batch}{', compiled' if job.run.compile else ''}",
        "clips_per_second": rate,
        "seconds": job.batch / rate,
        "flops": job.flop * rate,
        "aims": ", ".join(aims),
        "remark": f"{min(rates):.4g} to {max(rates):.4g} clips/s",
    }
    return row | ({"share": job.flop * rate / peak} if peak else {}) | ({"gigabytes": memory} if memory else {})


def measure_loader(a: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """MAE 0.9 from generated shards, with one setting of where frames are decoded and resized after the other."""
    from benchmarks import training_sweep as sweep
    from stm.training.pretraining import open_media

    batch, workers = (TINY_BATCH, 0) if a.quick else (LOADER_BATCH, a.workers)
    # As many steps per line of the log as there are loading processes: their batches arrive together.
    every = max(EVERY, workers)
    clips = (4, 4 * LINES) if a.quick else (64, every * LINES * batch)
    index = write_shard(folder / "shards/train-00000.parquet", clips)
    settings: Sequence[dict[str, str]] = ({}, {"resize_on": "device"}, {"decode_on": "device", "resize_on": "device"})
    for changes in settings:
        optimisation = {"batch_size": batch, "epochs": 1, "warmup_epochs": 0}
        run = mae_run(0.9, not a.quick, a, optimisation=optimisation, workers=workers, **changes)
        job = sweep.Job("MAE 0.9", run, batch, sweep.mae_flop(run))
        media = open_media(run, [index], [], 0)
        row = measure_training(job, partial(_load, run, media, 1 if a.quick else every), a, folder, every)
        where = ", ".join(f"{name}: {value}" for name, value in changes.items()) or "all in the loader"
        yield row | {"what": f"{row['what']}, from shards, {workers} processes, {where}"}


def _load(run: Any, media: Any, every: int, process: Any) -> Iterator[Record]:
    """One batch for the first line of the log, during which the model is compiled, and then all from loading processes.

    Processes that had started earlier would have loaded ahead meanwhile, and the steps after it would seem too fast.
    """
    from stm.training.batches import feed_media

    batches = feed_media(media, run.optimisation, process, 0, run.workers)
    with closing(cast("Generator[Record, None, None]", batches(0))) as loaded:
        first = copy.deepcopy(next(loaded))  # not in the memory of processes that end here
    for _ in range(every):
        yield dict(first)
    yield from batches(0)


def write_shard(index: Path, clips: tuple[int, int]) -> Path:
    """A shard of textured frames, 340 x 256 pixels; return its index.

    Args:
        clips: how many are written, and how many the index has: the others are the same bytes under other keys.
    """
    import numpy as np
    import pyarrow as pa
    import simplejpeg

    from stm.shards.checksums import checksum
    from stm.shards.schema import shard_schema
    from stm.storage.tables import write_table
    from stm.storage.tars import TarWriter

    index.parent.mkdir(parents=True)
    random = np.random.default_rng(0)
    members, sums = [], []
    with TarWriter(index.with_suffix(".tar")) as tar:
        for clip in range(clips[0]):
            texture = random.integers(0, 256, (32, 54, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            video = [np.ascontiguousarray(texture[:, shift : shift + 340]) for shift in range(64)]
            jpegs = [simplejpeg.encode_jpeg(image, quality=90) for image in video]
            members.append([tar.add(f"{clip:07d}.{n:04d}.jpg", jpeg) for n, jpeg in enumerate(jpegs)])
            sums.append([checksum(jpeg) for jpeg in jpegs])
    rows = [
        {
            **dict.fromkeys(shard_schema().names),
            **{"key": f"{number:07d}", "video_id": f"{number:07d}", "split": "train", "captions": []},
            **{"caption_sources": [], "frames": 64, "width": 340, "height": 256, "rows": 14, "columns": 19},
            **{"pts": [n / 6 for n in range(64)], "json_offset": 0, "json_size": 0, "crc32": sums[number % clips[0]]},
            "offsets": [member.offset for member in members[number % clips[0]]],
            "sizes": [member.size for member in members[number % clips[0]]],
            "sha256": [""] * 65,
        }
        for number in range(clips[1])
    ]
    write_table(index, pa.Table.from_pylist(rows, schema=shard_schema()), {"stage": "shards"})
    return index


def measure_similarity(a: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """The stage's patches per second by both methods, and the image tower's alone (see `benchmarks.similarity`)."""
    from benchmarks import similarity

    # Dense maps take so much less time that compiling does not pay; a frame is 266 patches of a batch.
    for method, compiled, batch in [("patches", False, 1024), ("patches", True, 1024), ("dense", False, 8192)]:
        if a.quick and compiled:
            continue
        place = folder / f"{method} {compiled}"
        place.mkdir()
        options = {"model": None, "small": a.quick, "compile": compiled, "grid": 3 if a.quick else 14, "method": method}
        options |= {"precision": "float32" if a.quick else "bfloat16", "batch_size": 8 if a.quick else batch}
        options |= {"clips": 1 if a.quick else 32, "rounds": 1 if a.quick else 3, "device": a.device}
        row = similarity.measure(place, argparse.Namespace(**options))[0]
        yield {"what": row.what, "remark": f"{row.speed}, {row.ratio:.2f} of {row.against}", "aims": row.aim}


def find_marked() -> list[Path]:
    """The test files with tests that are marked `cuda`: collecting all of them would take most of the section's time."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.cuda" in path.read_text()]


def run_tests(a: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """The tests that are marked `cuda`; without a GPU they are collected and skipped."""
    marked = find_marked()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "--basetemp"]
    printed = subprocess.run(
        [*command, str(folder / "pytest"), *map(str, marked)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(printed.stdout, printed.stderr, sep="\n", flush=True)
    last = printed.stdout.strip().splitlines()[-1:] or [f"pytest ended with status {printed.returncode}"]
    yield {"what": f"tests marked cuda, {len(marked)} files", "remark": last[0].strip("= ")}
    if printed.returncode:
        sys.exit(printed.returncode)


MEASURE: dict[str, Callable[[argparse.Namespace, Path], Iterator[Record]]] = {
    "peak": measure_peak,
    "mae": measure_mae,
    "umt": measure_umt,
    "loader": measure_loader,
    "similarity": measure_similarity,
    "tests": run_tests,
}


if __name__ == "__main__":
    sys.exit(main())
