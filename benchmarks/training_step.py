"""One pretraining step of `stm` compared with transformers' VideoMAEForPreTraining, in turns and with the same weights.

    python -m benchmarks.training_step                          # small images, minutes on two cores
    python -m benchmarks.training_step --size base --image-size 224 --frames 16 --batch 2
    python -m benchmarks.training_step --size base --image-size 224 --frames 16 --batch 64 --precision bf16 --compile

A step is forward, backward and fused AdamW, with a tube mask. Ours starts from uint8 pixels and guides, and computes the mask
and the normalised pixels within the step; the peer receives both ready-made, so the comparison favours it. The reported ratio
is the median over rounds of the ratios within a round: times on a shared machine drift, such ratios do not. A ratio above 1
means that ours is faster. Peak memory is that of two steps in a separate process, minus that of the libraries.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from benchmarks._machine import has_bf16
from benchmarks._table import Row, compare, report, take_turns, wall_seconds
from stm.config import Mask, PretrainRun
from stm.masking import to_boolean
from stm.methods import build_method
from stm.methods.mae import MAE
from stm.models.cost import pretraining_cost
from stm.models.weights import zoo
from stm.tubelets import Normalise

PEER, OURS = "transformers", "stm"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=sorted(zoo.SIZES))
    parser.add_argument("--image-size", type=int, default=112, help="pixels")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="clips")
    parser.add_argument("--ratio", type=float, default=0.9, help="mask ratio")
    parser.add_argument(
        "--decode-ratio", type=float, default=0.5, help="share of the hidden tokens that the third candidate decodes"
    )
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="use torch.compile for ours; transformers' model breaks into several graphs",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=[PEER, OURS, "half"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_batch(run: PretrainRun, batch: int, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, run.frames, 3, run.image_size, run.image_size)
    tokens = (run.image_size // run.patch_size) ** 2
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    noise = torch.rand(batch, run.frames // run.tubelet, tokens, generator=generator)
    return {"video": video.to(device), "guides": {"noise": noise.to(device)}}


def peer_inputs(method: MAE, batch: dict, device: str) -> tuple[Tensor, Tensor]:
    """Normalised pixels and mask for transformers' model."""
    architecture = method.model.architecture
    kept, _ = method.mask(batch["guides"])
    mask = to_boolean(kept, architecture.slots, architecture.slot_tokens).flatten(1)
    return Normalise((3, 1, 1)).to(device)(batch["video"]), mask


def build_peer(method: MAE) -> nn.Module:
    """transformers' model with our weights."""
    peer = VideoMAEForPreTraining(VideoMAEConfig(**zoo.transformers_config(method.model.architecture)))
    peer.load_state_dict(zoo.to_transformers(method.model))
    return peer.train()


def make_peer(method: MAE, batch: dict, device: str, precision: str) -> Callable[[], Tensor]:
    """A training step of transformers' model."""
    peer, (pixels, mask) = build_peer(method).to(device), peer_inputs(method, batch, device)
    return make_step(peer, lambda: peer(pixels, mask).loss, device, precision)


def make_step(model: nn.Module, forward: Callable[[], Tensor], device: str, precision: str) -> Callable[[], Tensor]:
    """A step of forward, backward and AdamW that returns the loss."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def measure(step: Callable[[], Tensor]) -> float:
    """Seconds of one step."""
    return wall_seconds(step)


def make_ours(run: PretrainRun, batch: dict, device: str) -> tuple[MAE, Callable[[], Tensor]]:
    torch.manual_seed(0)
    method = build_method(run).to(device)
    assert isinstance(method, MAE)
    forward = torch.compile(method, dynamic=False, fullgraph=True) if run.compile else method
    return method, make_step(method, lambda: forward(batch)["loss"], device, run.precision)


def describe_run(a: argparse.Namespace) -> PretrainRun:
    return PretrainRun(
        model=a.size,
        image_size=a.image_size,
        frames=a.frames,
        mask=Mask(strategy="tube", ratio=a.ratio),
        precision=a.precision,
        compile=a.compile,
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = parse_arguments()
    run = describe_run(a)
    if a.memory_of:
        print(measure_memory(a.memory_of, run, a, device))
        return
    batch = make_batch(run, a.batch, device)
    method, ours = make_ours(run, batch, device)
    half = run.model_copy(update={"decode_ratio": a.decode_ratio})
    steps = {PEER: make_peer(method, batch, device, a.precision), OURS: ours}
    steps["half"] = make_ours(half, batch, device)[1]
    if a.precision == "float32" and (device == "cuda" or has_bf16()):
        steps["bf16"] = make_ours(run.model_copy(update={"precision": "bf16"}), batch, device)[1]
    elif a.precision == "float32":
        print(
            "bf16 is skipped: this processor has neither avx512_bf16 nor amx_bf16; emulating it is slower than float32"
        )
    losses = {name: step().item() for name, step in steps.items()}
    seconds = take_turns({name: partial(measure, step) for name, step in steps.items()}, a.rounds)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    geometry = f"{a.size}, {a.frames}x{a.image_size}^2, tube {a.ratio:g}, batch {a.batch}"
    print(f"{geometry}, {a.precision}, {where}, {a.rounds} rounds")
    print_steps(method, batch, a, seconds, losses)
    report([*compare_steps(seconds, geometry, a), *compare_memory(a), count_graphs()])


def print_steps(method: MAE, batch: dict, a: argparse.Namespace, seconds: dict, losses: dict[str, float]) -> None:
    kept, masked = method.mask(batch["guides"])
    print(f"{'':14}{'median s':>10}{'GFLOP/clip':>12}{'GFLOP/s':>10}{'first loss':>12}")
    for name, times in seconds.items():
        decoded = max(1, int(a.decode_ratio * masked.shape[1])) if name == "half" else masked.shape[1]
        flop = pretraining_cost(method.model.architecture, kept.shape[1], decoded).step / 1e9
        median = statistics.median(times)
        print(f"{name:14}{median:10.3f}{flop:12.1f}{flop * a.batch / median:10.0f}{losses[name]:12.5f}")


def compare_steps(seconds: dict[str, list[float]], geometry: str, a: argparse.Namespace) -> list[Row]:
    rates = {name: [1 / value for value in values] for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    times = {name: f"{value:.2f} s per step" for name, value in median.items()}
    step, peer = f"step, {geometry}, {a.precision}", f"transformers, {times[PEER]}"
    rows = [compare(step, times[OURS], rates[OURS], rates[PEER], peer, "1")]
    rows.append(compare(f"{step}, {a.decode_ratio:g} decoded", times["half"], rates["half"], rates[PEER], peer, "1.45"))
    if "bf16" in rates:
        name = f"step, {geometry}, bf16"
        rows.append(compare(name, times["bf16"], rates["bf16"], rates[OURS], f"our float32, {times[OURS]}", "2"))
    return rows


def compare_memory(a: argparse.Namespace) -> list[Row]:
    peaks = {name: _peak_memory_of(name) for name in (PEER, OURS, "half")}
    against, rows = f"transformers, {peaks[PEER]:.0f} MB", []
    for name, suffix in ((OURS, ""), ("half", f", {a.decode_ratio:g} decoded")):
        ratio = peaks[name] / peaks[PEER]
        rows.append(Row(f"peak memory{suffix}", f"{peaks[name]:.0f} MB", ratio, ratio, ratio, against, "below 1"))
    return rows


def _peak_memory_of(name: str) -> float:
    """Peak memory of a candidate, MB, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], "--memory-of", name]
    # Without the allocator's settings of `python -m benchmarks`, which keep freed memory resident.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    return float(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.split()[-1]
    )


def measure_memory(name: str, run: PretrainRun, a: argparse.Namespace, device: str) -> float:
    """Peak memory of two steps in this process, MB: weights, gradients, optimiser state, activations and inputs."""
    method = build_method(run if name != "half" else run.model_copy(update={"decode_ratio": a.decode_ratio}))
    assert isinstance(method, MAE)
    batch = make_batch(run, a.batch, "cpu")
    pixels, mask = peer_inputs(method, batch, "cpu")
    if name == PEER:
        model = build_peer(method)
        del method, batch
    else:
        model = method
        del pixels, mask
    before = 0.0 if device == "cuda" else _resident("VmRSS") - sum(p.nbytes for p in model.parameters()) / 2**20
    model.to(device)
    if name == PEER:
        pixels, mask = pixels.to(device), mask.to(device)
        step = make_step(model, lambda: model(pixels, mask).loss, device, run.precision)
    else:
        batch = {"video": batch["video"].to(device), "guides": {"noise": batch["guides"]["noise"].to(device)}}
        step = make_step(model, lambda: model(batch)["loss"], device, run.precision)
    for _ in range(2):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident("VmHWM") - before


def _resident(kind: str) -> float:
    """Resident memory of this process in MB, current (`VmRSS`) or peak (`VmHWM`); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


def count_graphs() -> Row:
    """Number of graphs of both forward passes in torch.compile, at a small size, because it depends on the code only."""
    run = PretrainRun(model="tiny", image_size=32, frames=4)
    batch = make_batch(run, 2, "cpu")
    method = build_method(run)
    assert isinstance(method, MAE)
    pixels, mask = peer_inputs(method, batch, "cpu")
    compiled = torch.compile(method, dynamic=False, fullgraph=True, backend="eager")  # raises if there is a graph break
    compiled(batch)
    ours = torch._dynamo.explain(method)(batch).graph_count
    theirs = torch._dynamo.explain(build_peer(method))(pixels, mask).graph_count
    return Row(
        "graphs of a step", f"{ours} (fullgraph=True)", ours / theirs, None, None, f"transformers, {theirs}", "1 graph"
    )


if __name__ == "__main__":
    main()
