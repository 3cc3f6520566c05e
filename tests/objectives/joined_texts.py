"""What two processes joined by gloo compute of the text objectives, for comparison with one on the joined batch."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import normalize
from two_processes import PREPARED

from stm.objectives.contrast import contrast_ids
from stm.objectives.masked_language import mask_words, masked_language_loss

ROWS, WIDTH = 5, 7
LARGE = 2**40  # in float32 its neighbours are the same number
# Clips of each process; some are on both, and some twice on one.
IDS = {"apart": [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], "shared": [[0, 1, LARGE, 3, 1], [LARGE, 6, 0, LARGE + 1, 1]]}
WORDS = 11
HIDDEN = (0.2, 0.7)  # share of the words that each process hides

Values = dict[str, np.ndarray]


def draw(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors of videos and texts float64 [ROWS, WIDTH], and logits of words float64 [ROWS, 6, WORDS]."""
    generator = torch.Generator().manual_seed(rank)
    video, text = normalize(torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64), dim=2)
    return video, text, torch.randn(ROWS, 6, WORDS, generator=generator, dtype=torch.float64)


def draw_targets(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 + rank)
    tokens = torch.randint(4, WORDS, (ROWS, 6), generator=generator)
    return mask_words(tokens, HIDDEN[rank], 3, (0, 1), WORDS, torch.rand(3, ROWS, 6, generator=generator))[1]


def measure(video: Tensor, text: Tensor, ids: Tensor, logits: Tensor, targets: Tensor) -> Values:
    """Both losses, and their gradients."""
    video, text, logits = (x.clone().requires_grad_() for x in (video, text, logits))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    contrast = contrast_ids(video, text, ids, temperature)
    words = masked_language_loss(logits, targets)
    (contrast + words).backward()
    found = {"contrast": contrast, "words": words, "temperature": temperature.grad}
    found |= {"video": video.grad, "text": text.grad, "logits": logits.grad}
    return {name: value.detach().numpy() for name, value in found.items() if value is not None}


def work(rank: int, meeting: str) -> dict[str, Values]:
    """All that one process measures."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    video, text, logits = draw(rank)
    found = {
        case: measure(video, text, torch.tensor(ids[rank]), logits, draw_targets(rank)) for case, ids in IDS.items()
    }
    torch.distributed.destroy_process_group()
    return found


def measure_weights(rank: int, divisor: int | None) -> Values:
    """Gradients, averaged over the processes, of a layer below the embeddings and of the temperature.

    Args:
        divisor: of `contrast_ids`; None: UMT's released code instead, from its description: all rows are gathered, the
            whole loss is computed in every process, and in the backward pass each keeps its own rows' part of the gradient.
    """
    inputs = torch.cat(draw(rank)[:2])
    generator = torch.Generator().manual_seed(5)
    layer = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor(IDS["shared"][rank])
    video, text = normalize(inputs @ layer, dim=1).chunk(2)
    if divisor is None:
        loss = release_contrast(rank, video, text, ids, temperature)
    else:
        loss = contrast_ids(video, text, ids, temperature, divisor)
    loss.backward()
    found = {"loss": loss.detach(), "layer": layer.grad, "temperature": temperature.grad}
    for value in found.values():
        assert value is not None
        torch.distributed.all_reduce(value)
    return {name: (value / 2).numpy() for name, value in found.items() if value is not None}


def release_contrast(rank: int, video: Tensor, text: Tensor, ids: Tensor, temperature: Tensor) -> Tensor:
    def join(own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(2)]
        torch.distributed.all_gather(parts, own.detach())
        return torch.cat([own if number == rank else part for number, part in enumerate(parts)])

    scores, everyone = join(video) @ join(text).T / temperature, join(ids)
    target = (everyone[:, None] == everyone).double()
    target = target / target.sum(dim=1, keepdim=True)
    by_video, by_text = ((target * one.log_softmax(dim=1)).sum(dim=1).mean() for one in (scores, scores.T))
    return -(by_video + by_text) / 2


def work_on_weights(rank: int, meeting: str) -> dict[str, Values]:
    """The averaged gradients of one process: the release's, and ours as released and joined."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    found = {
        name: measure_weights(rank, divisor) for name, divisor in (("release", None), ("divided", 2), ("joined", 1))
    }
    torch.distributed.destroy_process_group()
    return found


def run_joined(function: Callable[[int, str], dict[str, Values]], folder: Path) -> list[dict[str, Values]]:
    """What `function` returns in each of two processes, which meet in `folder`."""
    meeting = (folder / "meeting").as_uri()
    with ProcessPoolExecutor(2, mp_context=PREPARED) as pool:
        waiting = [pool.submit(function, rank, meeting) for rank in range(2)]
        return [result.result(timeout=300) for result in waiting]
