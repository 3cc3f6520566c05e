"""Values computed by two processes connected by gloo, to compare with one process on the concatenated batch. In float64."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from torch import nn
from torch._dynamo import lookup_backend
from torch.nn.functional import normalize

from stm.config import Contrast, Mask, PretrainRun, Reconstruction
from stm.distributed.process import Process
from stm.methods import build_method
from stm.methods.mae import MAE
from stm.models.head import GlobalBatchNorm
from stm.objectives.contrast import match_pairs
from stm.training.pretraining import pretrain

# New processes are copies of one that has imported, once for all tests, what takes each of them seconds.
PREPARED = get_context("forkserver")
PREPARED.set_forkserver_preload(["stm.training.pretraining", "stm.models.text.split_bert", "torch.distributed.fsdp"])
PROCESSES = 2
ROWS = 5
WIDTH = 7
TEMPERATURE = 0.3
CLIPS = 3  # per process
# Whether each row has a caption, by process.
PRESENT = {
    "all": None,
    "some": [[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]],
    "one side": [[0] * 5, [1] * 5],
    "none": [[0] * 5] * 2,
}

Values = dict[str, Any]


def run_in_two_processes(function: Callable[[int], Values], folder: Path) -> list[Values]:
    """Run `function(rank)` in each process and return the results by rank; `folder` holds the file for the rendezvous."""
    results: Queue[tuple[int, Values]] = PREPARED.Queue()
    rendezvous = (folder / "rendezvous").as_uri()
    arguments = (rendezvous, results, function)
    processes = [PREPARED.Process(target=_run_rank, args=(rank, *arguments)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    # Before joining: a process does not end while its result is in the queue.
    by_rank = dict(results.get(timeout=900) for _ in processes)
    for process in processes:
        process.join()
    failed = [f"rank {rank}: {values['error']}" for rank, values in by_rank.items() if "error" in values]
    assert not failed, failed
    return [by_rank[rank] for rank in range(PROCESSES)]


def _run_rank(
    rank: int, rendezvous: str, results: "Queue[tuple[int, Values]]", function: Callable[[int], Values]
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    try:
        values = function(rank)
        # As arrays: a queue passes tensors through shared memory, which is freed when the process ends.
        results.put((rank, {name: v.detach().numpy() if torch.is_tensor(v) else v for name, v in values.items()}))
    except Exception as error:
        results.put((rank, {"error": repr(error)}))
    finally:
        torch.distributed.destroy_process_group()


def pretrain_in_two_processes(run: PretrainRun, shards: list[Path], output: Path, seed: int) -> None:
    """As `pretrain` under torchrun, without torchrun's start; see tests/training/test_launch.py for that."""
    output.mkdir(parents=True)
    run_in_two_processes(partial(_pretrain_as, run=run, shards=shards, output=output, seed=seed), output)


def _pretrain_as(rank: int, run: PretrainRun, shards: list[Path], output: Path, seed: int) -> Values:
    joined = Process(rank, PROCESSES, torch.device("cpu"))
    with patch("stm.training.pretraining.join_processes", lambda *_: nullcontext(joined)):
        pretrain(run, shards, output, seed, "cpu")
    return {}


def random_pairs(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random unit vectors of videos and texts, float64 [ROWS, WIDTH] each."""
    generator = torch.Generator().manual_seed(rank)
    pairs = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    video, text = normalize(pairs, dim=2)
    return video, text


def caption_presence(case: str, rank: int) -> torch.Tensor | None:
    rows = PRESENT[case]
    return None if rows is None else torch.tensor(rows[rank], dtype=torch.bool)


def measure_contrast(video: torch.Tensor, text: torch.Tensor, present: torch.Tensor | None, name: str) -> Values:
    video, text = video.clone().requires_grad_(), text.clone().requires_grad_()
    temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    match = match_pairs(video, text, temperature, present)
    match.loss.backward()
    values = {"loss": match.loss, "accuracy": match.accuracy, "video": video.grad, "text": text.grad}
    return {f"{name}/{key}": value for key, value in {**values, "temperature": temperature.grad}.items()}


def measure_norm(rows: torch.Tensor, norm: nn.Module, name: str) -> Values:
    """Outputs of a norm and gradients of a sum with a different weight per output; two training steps, then eval."""
    for step in range(2):
        x = (rows * (step + 1)).clone().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        (y * (x.detach() * 3).sin()).sum().backward()
    values = {"output": y, "input": x.grad, **{k: p.grad for k, p in norm.named_parameters()}}
    values |= {key: buffer.clone() for key, buffer in norm.named_buffers()}
    values["eval"] = norm.eval()(rows)
    return {f"{name}/{key}": value for key, value in values.items()}


def random_rows(rows: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 + rank)
    return 100 + 3 * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


NORM_ROWS = {"equal": (4, 4), "unequal": (6, 3), "empty": (5, 0)}


def make_norm(kind: type[nn.BatchNorm1d], affine: bool) -> nn.Module:
    norm = kind(WIDTH, eps=1e-5, affine=affine).double()
    for parameter in norm.parameters():
        with torch.no_grad():
            parameter.copy_(torch.linspace(-1, 2, WIDTH))
    return norm


def make_method(weight: float = 1.0, reconstruction: float = 1.0) -> MAE:
    run = PretrainRun(
        model="tiny", image_size=32, frames=4, decoder_depth=1,
        mask=Mask(strategy="text_top", ratio=0.5),
        reconstruction=Reconstruction(weight=reconstruction),
        contrast=Contrast(weight=weight, learnable=True, hidden=16, layers=3),
    )  # fmt: skip
    torch.manual_seed(0)
    method = build_method(run, WIDTH)
    assert isinstance(method, MAE)
    return method.double()


def random_batch(rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(20 + rank)
    guides = {name: torch.rand(CLIPS, 2, 4, generator=generator) for name in ("noise", "similarity")}
    return {
        "video": torch.randint(0, 256, (CLIPS, 4, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "guides": guides,
        "text": normalize(torch.randn(CLIPS, WIDTH, generator=generator), dim=1),
        "caption_index": torch.tensor([[0, 2, 1], [1, -1, 0]][rank]),
    }


def measure_method(model: nn.Module, method: MAE, batch: dict[str, Any], name: str) -> Values:
    values = model(batch)
    values["loss"].backward()
    measured = {f"loss/{key}": value for key, value in values.items()}
    measured |= {f"gradient/{key}": p.grad for key, p in method.named_parameters() if p.grad is not None}
    measured |= {f"buffer/{key}": b.clone() for key, b in method.named_buffers() if "running" in key}
    return {f"{name}/{key}": value for key, value in measured.items()}


def work(rank: int) -> Values:
    """All values that one process measures."""
    from open_clip.loss import ClipLoss

    measured: Values = {}
    video, text = random_pairs(rank)
    for case in PRESENT:
        measured |= measure_contrast(video, text, caption_presence(case, rank), case)

    peer = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=PROCESSES)
    for name, loss_of in {"peer": lambda v, t: peer(v, t, 1 / TEMPERATURE), "ours": lambda v, t: match_pairs(v, t, TEMPERATURE).loss}.items():  # fmt: skip # noqa: E501
        v, t = video.clone().requires_grad_(), text.clone().requires_grad_()
        loss = loss_of(v, t)
        loss.backward()
        measured |= {f"{name}/loss": loss, f"{name}/video": v.grad, f"{name}/text": t.grad}

    for case, rows in NORM_ROWS.items():
        for affine in (True, False):
            measured |= measure_norm(
                random_rows(rows[rank], rank), make_norm(GlobalBatchNorm, affine), f"{case}/{affine}"
            )

    for name, weights in METHODS.items():
        method = make_method(*weights)
        wrapped = Process(rank, PROCESSES, torch.device("cpu")).wrap(method)
        measured |= measure_method(wrapped, method, random_batch(rank), name)

    method = make_method(*METHODS["both"])
    measured["nested"] = 0  # graphs nested in the graphs that the backend receives

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        parts = [getattr(graph, node.target, None) for node in graph.graph.nodes if node.op == "get_attr"]
        measured["nested"] += sum(isinstance(part, torch.fx.GraphModule) for part in parts)
        return lookup_backend("aot_eager")(graph, inputs)

    method.compile(fullgraph=True, backend=backend, dynamic=False)
    wrapped = Process(rank, PROCESSES, torch.device("cpu")).wrap(method)
    return measured | measure_method(wrapped, method, random_batch(rank), "compiled")


# Weights of contrast and reconstruction.
METHODS = {"both": (0.5, 1.0), "observed": (0.0, 1.0), "contrast only": (1.0, 0.0)}
