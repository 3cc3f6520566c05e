"""One pretraining step of `stm` against transformers' VideoMAEForPreTraining, turn by turn with the same weights.

    python benchmarks/training_step.py                          # small pictures, minutes on two cores
    python benchmarks/training_step.py --size base --image-size 224 --frames 16 --batch 2
    python benchmarks/training_step.py --size base --image-size 224 --frames 16 --batch 64 --precision bf16 --compile

A step is forward, backward and AdamW, with a tube mask. Ours starts from bytes and guides, and makes the mask and the
normalised pixels inside the step; the peer is handed both ready-made, so the ratio is in its favour. What is stated is the
median of the ratios of neighbouring turns: times of a shared machine drift, and such ratios do not.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from stm.config import PretrainRun
from stm.data.pixels import Normalise
from stm.masking import to_boolean
from stm.methods import build_method
from stm.methods.mae import MAE
from stm.models import zoo
from stm.models.cost import pretraining_cost


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step against transformers' VideoMAE.")
    parser.add_argument("--size", default="small", choices=sorted(zoo.SIZES))
    parser.add_argument("--image-size", type=int, default=112, help="pixels")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="clips")
    parser.add_argument("--ratio", type=float, default=0.9, help="mask ratio")
    parser.add_argument("--decode-ratio", type=float, default=0.5, help="of the third candidate")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile for ours; transformers' breaks into graphs"
    )
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def make_batch(run: PretrainRun, batch: int, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, run.frames, 3, run.image_size, run.image_size)
    tokens = (run.image_size // run.patch_size) ** 2
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    noise = torch.rand(batch, run.frames // run.tubelet, tokens, generator=generator)
    return {"video": video.to(device), "guides": {"noise": noise.to(device)}}


def make_peer(method: MAE, batch: dict, device: str, precision: str) -> Callable[[], Tensor]:
    """transformers' model with our weights, on ready-made pixels and mask."""
    architecture = method.model.architecture
    peer = VideoMAEForPreTraining(VideoMAEConfig(**zoo.transformers_config(architecture)))
    peer.load_state_dict(zoo.to_transformers(method.model))
    peer.to(device).train()
    kept, _ = method.mask(batch["guides"])
    mask = to_boolean(kept, architecture.slots, architecture.slot_tokens).flatten(1)
    pixels = Normalise((3, 1, 1)).to(device)(batch["video"])
    return make_step(peer, lambda: peer(pixels, mask).loss, device, precision)


def make_step(model: nn.Module, forward: Callable[[], Tensor], device: str, precision: str) -> Callable[[], Tensor]:
    """Forward, backward, AdamW; returns the loss."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def step() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def measure(step: Callable[[], Tensor]) -> float:
    """Seconds of a step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_ours(run: PretrainRun, batch: dict, device: str) -> tuple[MAE, Callable[[], Tensor]]:
    torch.manual_seed(0)
    method = build_method(run).to(device)
    forward = torch.compile(method, dynamic=False) if run.compile else method
    return method, make_step(method, lambda: forward(batch)["loss"], device, run.precision)


def describe_run(a: argparse.Namespace) -> PretrainRun:
    return PretrainRun(
        model=a.size,
        image_size=a.image_size,
        frames=a.frames,
        mask={"strategy": "tube", "ratio": a.ratio},
        precision=a.precision,
        compile=a.compile,
    )


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = parse_arguments()
    run = describe_run(a)
    batch = make_batch(run, a.batch, device)
    method, ours = make_ours(run, batch, device)
    partial = f"stm, decoding {a.decode_ratio:g}"
    steps = {"transformers": make_peer(method, batch, device, a.precision), "stm": ours}
    steps[partial] = make_ours(run.model_copy(update={"decode_ratio": a.decode_ratio}), batch, device)[1]
    losses = {name: step().item() for name, step in steps.items()}  # the first turn warms up, and compares
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(a.rounds):
        for name, step in steps.items():
            seconds[name].append(measure(step))
    kept, masked = method.mask(batch["guides"])
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{a.size}, {a.frames}x{a.image_size}^2, tube {a.ratio:g}, batch {a.batch}, {a.precision}, {where}, {a.rounds} rounds"
    )
    print(
        f"{'':24}{'median s':>10}{'x peer':>8}{'from':>7}{'to':>7}{'GFLOP/clip':>12}{'GFLOP/s':>10}{'first loss':>12}"
    )
    for name, times in seconds.items():
        ratios = [mine / peer for mine, peer in zip(times, seconds["transformers"], strict=True)]
        decoded = max(1, int(a.decode_ratio * masked.shape[1])) if name == partial else masked.shape[1]
        flop = pretraining_cost(method.model.architecture, kept.shape[1], decoded).step / 1e9
        median = statistics.median(times)
        print(
            f"{name:24}{median:10.3f}{statistics.median(ratios):8.2f}{min(ratios):7.2f}{max(ratios):7.2f}"
            f"{flop:12.1f}{flop * a.batch / median:10.0f}{losses[name]:12.5f}"
        )


if __name__ == "__main__":
    main()
