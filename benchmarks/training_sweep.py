"""Training steps of ViT-B on a GPU by batch size: time, clips per second, memory and share of the measured matrix peak.

    python -m benchmarks.training_sweep --device cuda
    python -m benchmarks.training_sweep --toy            # the same code at a small size, on a CPU, to check that it runs

MAE at three mask ratios, and UMT's first stage with its teacher (8 frames, CLIP's ViT-B/16, random weights), each with and
without torch.compile. A step is the training loop's: bf16, forward, backward, gradient norm, fused AdamW. The peak is
that of a large product of bfloat16 matrices in the same run. The FLOP of a step are computed by formula (stm/models/cost.py),
including the teacher's forward pass. Finally, the fastest variant of each method gets its batches from the loader, from shards
of generated videos: that ratio is to the same step on a batch in memory.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks._table import Row, compare, report, wall_seconds
from stm.config import Augmentation, LanguageRun, Optimisation, PretrainRun
from stm.data.dataset import ClipDataset, Sample
from stm.data.geometry import Geometry
from stm.data.loader import Batch, ClipLoader, move_ahead
from stm.masking import count_masked
from stm.methods import build_method
from stm.models.cost import blocks_cost, pretraining_cost
from stm.models.weights import zoo
from stm.training.loop import clip_gradient
from stm.training.optimizer import build_optimizer

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}  # text is not used here
TEACHER = {"embed_dim": 512, "width": 768, "layers": 12, "patch": 16, "aligned": 6}
TOY_TEACHER = {"embed_dim": 16, "width": 64, "layers": 2, "patch": 8, "aligned": 2}


class Job(NamedTuple):
    """One row of the table."""

    name: str
    run: PretrainRun | LanguageRun
    batch: int  # clips
    flop: float  # per clip and step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.9, 0.75, 0.6], help="mask ratios of MAE")
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="loading processes")
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="use a tiny model and tiny clips")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.batches = [2]
        arguments.steps = 1
        arguments.workers = 0
    return arguments


def main() -> None:
    a = parse_arguments()
    device = torch.device(a.device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        peak = measure_peak(device, a)
        print(f"bf16 matrix peak: {peak / 1e12:.4g} TFLOP/s", flush=True)
        best: dict[str, tuple[float, Job]] = {}
        for job in make_jobs(Path(folder), a):
            measured = measure(job, device, a)
            if measured is None:
                rows.append(Row(job.name, "out of memory", None, None, None, ""))
                continue
            seconds, memory = measured
            median = statistics.median(seconds)
            speed = f"{1000 * median:.0f} ms, {job.batch / median:.0f} clips/s, {memory:.1f} GB"
            print(f"{job.name}: {speed}", flush=True)
            rates = [job.flop * job.batch / value for value in seconds]
            against = f"bf16 matrix peak, {peak / 1e12:.4g} TFLOP/s"
            rows.append(compare(job.name, speed, rates, [peak] * len(rates), against, "0.35"))
            kind = job.name.partition(", batch")[0]
            if kind not in best or job.batch / median > best[kind][0]:
                best[kind] = (job.batch / median, job)
        fastest = [best[kind] for kind in ("MAE 0.9", "UMT 0.8") if kind in best]
        rows += [loader_row(job, rate, Path(folder), device, a) for rate, job in fastest]
    report(rows)


def measure_peak(device: torch.device, a: argparse.Namespace) -> float:
    """FLOP/s of a product of square bfloat16 matrices (float32 with --toy), the best of the rounds."""
    side, kind = (256, torch.float32) if a.toy else (8192, torch.bfloat16)
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    times = 20

    def work() -> None:
        for _ in range(times):
            left @ right

    work()
    return times * 2 * side**3 / min(wall_seconds(work) for _ in range(a.rounds))


def make_jobs(folder: Path, a: argparse.Namespace) -> Iterator[Job]:
    """MAE by ratio, then UMT, each by batch size, plain and compiled."""
    size: dict[str, Any] = (
        {"model": "tiny", "image_size": 32, "frames": 4} if a.toy else {"model": "base", "image_size": 224}
    )
    runs: list[tuple[str, PretrainRun | LanguageRun, float]] = []
    for ratio in a.ratios:
        run = PretrainRun.model_validate({"frames": 16, **size, "mask": {"ratio": ratio}, "precision": "bf16"})
        runs.append((f"MAE {ratio:g}", run, mae_flop(run)))
    teacher = TOY_TEACHER if a.toy else TEACHER
    umt = umt_run(folder, teacher, size["model"], size["image_size"])
    runs.append(("UMT 0.8", umt, umt_flop(umt, teacher)))
    for name, run_config, flop in runs:
        for batch in a.batches:
            for compiled in (False, True):
                title = f"{name}, batch {batch}{', compiled' if compiled else ''}"
                yield Job(title, run_config.model_copy(update={"compile": compiled}), batch, flop)


def umt_run(folder: Path, teacher: dict[str, int], model: str, image_size: int, frames: int = 8) -> LanguageRun:
    """UMT's first stage, with a teacher of random weights that is saved in `folder`."""
    return LanguageRun.model_validate(
        {
            "model": model,
            "image_size": image_size,
            "frames": frames,
            "method": "umt",
            "patch_size": teacher["patch"],
            "precision": "bf16",
            "mask": {"strategy": "attention", "ratio": 0.8},
            "objectives": {"contrastive": 0, "matching": 0, "masked_language": 0},
            "teacher": {"model": save_teacher(folder / "teacher", teacher, image_size), "layers": teacher["aligned"]},
        }
    )


def save_teacher(folder: Path, teacher: dict[str, int], image_size: int) -> str:
    vision = {
        "image_size": image_size,
        "layers": teacher["layers"],
        "width": teacher["width"],
        "patch_size": teacher["patch"],
    }
    vision["head_width"] = min(64, teacher["width"])
    from benchmarks.similarity import save_clip  # needs open_clip, which MAE does not

    return save_clip(folder, {"embed_dim": teacher["embed_dim"], "vision_cfg": vision, "text_cfg": TEXT})


def mae_flop(run: PretrainRun) -> float:
    shape = zoo.describe(run)
    hidden = shape.slots * count_masked(shape.slot_tokens, run.mask.ratio)
    return pretraining_cost(shape, shape.tokens - hidden, hidden).step


def umt_flop(run: LanguageRun, teacher: dict[str, int]) -> float:
    """FLOP of a step per clip, including the teacher's forward pass on each of its frames."""
    tokens = zoo.describe(run).slot_tokens
    patches = 2 * tokens * 3 * teacher["patch"] ** 2 * teacher["width"]
    joint = teacher["aligned"] * 2 * tokens * teacher["width"] * teacher["embed_dim"]
    teacher_frame = patches + joint + blocks_cost(tokens + 1, teacher["width"], teacher["layers"], 4.0)
    return umt_student_flop(run, teacher) + run.frames * teacher_frame


def umt_student_flop(run: LanguageRun, teacher: dict[str, int]) -> float:
    """FLOP per clip of student and linear decoders, forward and backward."""
    shape = zoo.describe(run)
    kept = shape.tokens - shape.slots * count_masked(shape.slot_tokens, run.mask.ratio)
    embedding = 2 * kept * shape.token_values * shape.width
    student = embedding + blocks_cost(kept, shape.width, shape.depth, shape.mlp_ratio)
    decoders = teacher["aligned"] * 2 * kept * shape.width * teacher["embed_dim"]
    return 3 * (student + decoders) - embedding


def build_step(job: Job, device: torch.device) -> Callable[[Batch], Tensor]:
    """The training loop's step on a batch."""
    torch.manual_seed(0)
    method: nn.Module = build_method(job.run).to(device)
    optimizer = build_optimizer(method, Optimisation(batch_size=job.batch))
    if job.run.compile:
        method.compile(dynamic=False)

    def step(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = method(batch)["loss"]
        loss.backward()
        clip_gradient(method, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def draw_batch(job: Job, device: torch.device) -> dict[str, Any]:
    run = job.run
    video = torch.randint(0, 256, (job.batch, run.frames, 3, run.image_size, run.image_size), dtype=torch.uint8)
    noise = torch.rand(job.batch, run.frames // run.tubelet, (run.image_size // run.patch_size) ** 2)
    return {"video": video.to(device), "guides": {"noise": noise.to(device)}}


def measure(job: Job, device: torch.device, a: argparse.Namespace) -> tuple[list[float], float] | None:
    """Seconds per step, by round, and peak memory in GB; None if the job does not fit."""
    with reset(device):
        try:
            step, batch = build_step(job, device), draw_batch(job, device)
            for _ in range(3):  # compiles and initialises the optimiser's state
                step(batch)
            seconds = [wall_seconds(lambda: [step(batch) for _ in range(a.steps)]) / a.steps for _ in range(a.rounds)]
        except torch.OutOfMemoryError:
            return None
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return seconds, memory / 1e9


@contextlib.contextmanager
def reset(device: torch.device) -> Iterator[None]:
    """Free what earlier jobs left in the caches of the device and of the compiler."""
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield


class Repeated(torch.utils.data.Dataset[list[Sample]]):
    """A dataset of a few clips repeated up to `clips`; each repetition is decoded again, with another crop and offset."""

    def __init__(self, dataset: ClipDataset, clips: int) -> None:
        self.dataset = dataset
        self.clips = clips

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, item: tuple[int, int]) -> list[Sample]:
        epoch, number = item
        visit, clip = divmod(number, len(self.dataset))
        return self.dataset[epoch * self.clips + visit, clip]


def loader_row(job: Job, in_memory: float, folder: Path, device: torch.device, a: argparse.Namespace) -> Row:
    """The row of the same steps with batches from the loader; `in_memory` is the rate with a batch in memory, clips/s."""
    from benchmarks.loader import make_shard, make_videos  # need decord and PyAV, which the other rows do not

    shards = folder / "videos of the loader"
    if not shards.exists():
        shards.mkdir()
        names = make_videos(shards / "videos", 2 if a.toy else 8, 2.0 if a.toy else 10.0, 250)
        make_shard(shards, names)
    run, steps = job.run, a.steps * a.rounds
    geometry = Geometry(run.image_size, run.patch_size, run.tubelet, run.frames, 1)
    index = shards / "shards/train-00000.parquet"
    dataset = ClipDataset([index], geometry, Augmentation(), 0, True, guides=())
    repeated = cast(ClipDataset, Repeated(dataset, job.batch * (steps + 3)))
    loader = ClipLoader(repeated, job.batch, shuffle=True, workers=a.workers)
    with reset(device):
        step = build_step(job, device)
        batches = move_ahead(loader.batches(0), device)
        for _ in range(3):
            step(next(batches))
        seconds = wall_seconds(lambda: [step(next(batches)) for _ in range(steps)]) / steps
    rate = job.batch / seconds
    against = f"the same with a batch in memory: {in_memory:.0f} clips/s; {a.workers} loading processes"
    return compare(f"{job.name}, from the loader", f"{rate:.0f} clips/s", [rate], [in_memory], against)


if __name__ == "__main__":
    main()
