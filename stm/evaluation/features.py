"""Runs a network once over all views of all clips of a dataset, which several processes share."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stm.config import Run
from stm.data.dataset import ClipDataset
from stm.data.loader import ClipLoader, move
from stm.data.loading_processes import explain_lost_processes
from stm.distributed.process import Process
from stm.distributed.shares import join_rows
from stm.jobs.progress import Progress
from stm.models.vit import VideoEncoder

VIEWS_PER_BATCH = 64


@torch.inference_mode()
def run_over(
    function: Callable[[Tensor], Tensor],
    dataset: ClipDataset,
    process: Process,
    *,
    what: str,
    workers: int = 0,
    precision: str = "float32",
) -> NDArray[np.float32]:
    """Applies `function` to the video of each view of each clip, in batches; each process to its share of the batches.

    Args:
        function: maps video uint8 [B, T, 3, S, S] on the process's device to [B, D].
        dataset: in test mode, so that its views are deterministic.
        what: label of the progress line.
        workers: number of loading processes.
        precision: `bf16` enables autocast.

    Returns:
        float32 [clips, views, D], in the dataset's order; of all processes, in each.
    """
    views = dataset.samples_per_clip
    # The views of a clip stay in one batch, because an item of the dataset is a clip with all its views.
    clips = max(1, VIEWS_PER_BATCH // views)
    numbers, outputs, device = [torch.zeros(0, dtype=torch.int64)], list[Tensor](), process.device
    with (
        explain_lost_processes(),
        # The batches are those of one process, so that a clip has the same bits whichever process computes it.
        ClipLoader(
            dataset, clips, shuffle=False, workers=workers, rank=process.rank, processes=process.count
        ) as loader,
        Progress(what, loader.clips_of_process, "clips") as progress,
    ):
        for batch in loader.batches():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                values = function(move(batch, device)["video"])
            outputs.append(values.float().cpu())
            numbers.append(batch["clip"] * views + batch["view"])
            progress.advance(len(values) // views)
    rows = torch.cat(outputs) if outputs else None
    joined = join_rows(process, torch.cat(numbers), rows, len(dataset) * views)
    return joined.unflatten(0, (len(dataset), views)).numpy()


def pooled_features(
    encoder: VideoEncoder, run: Run, dataset: ClipDataset, process: Process, what: str
) -> NDArray[np.float32]:
    """Means over all tokens after the encoder's last norm, for all views of all clips: float32 [clips, views, D].

    Args:
        encoder: the run's frozen encoder, on the process's device.
        what: which clips, for the progress line: `features of the {what}`.
    """
    label = f"features of the {what}"
    return run_over(
        encoder.forward_features, dataset, process, what=label, workers=run.workers, precision=run.precision
    )


def average_probabilities(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Mean over views of the softmax, as in VideoMAE's test: [clips, views, classes] -> float32 [clips, classes]."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return (exponentials / exponentials.sum(-1, keepdims=True)).mean(1).astype(np.float32)


def average_vectors(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """The normalised mean of the views' unit vectors: [clips, views, D] -> float32 [clips, D]."""
    return unit(unit(vectors).sum(1, dtype=np.float64))


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Vectors [..., D] normalised to length 1, float32; zero vectors stay zero."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
