"""Optical flow by torchvision's RAFT-small (Teed and Deng, ECCV 2020), as in MGMAE."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torchvision.models.optical_flow import raft_small

from stm.distributed.process import choose_device
from stm.jobs.progress import Progress
from stm.preprocess.batches import prefetch
from stm.preprocess.flow.cells import to_cells
from stm.preprocess.flow.dis import FlowMaps, FlowTask
from stm.preprocess.frames.table import load_frame
from stm.pretrained.hub import ModelError, exact_convolutions
from stm.storage.files import sha256_file

# Pairs of stored frames per forward pass, all from one clip, so that its flow does not depend on other clips.
_STEPS = 8
# RAFT's features have 1/8 of the image resolution, and its correlation pyramid halves them three times, so torchvision
# requires sides that are divisible by 8 and at least 128 pixels.
_MULTIPLE = 8
_MIN_SIDE = 128


class Raft:
    """A loaded RAFT-small model."""

    def __init__(self, weights: Path, iterations: int, device: str | None = None) -> None:
        """
        Args:
            weights: path of a state dict of torchvision's `raft_small`, as .safetensors or written by `torch.save`.
            iterations: number of flow refinements.
            device: defaults to CUDA if available.

        Raises:
            ModelError: the file does not exist or does not contain RAFT-small weights.
        """
        self._device = choose_device(device)
        self._iterations = iterations
        model = raft_small(weights=None)
        try:
            model.load_state_dict(_read_weights(weights))
        except RuntimeError as error:
            raise ModelError(f"flow.weights {str(weights)!r}: not torchvision's RAFT-small ({error})") from error
        self._model = model.to(self._device).eval().requires_grad_(False)
        self.identity = {"model": weights.name, "weights_sha256": sha256_file(weights)}

    @torch.inference_mode()
    def estimate(self, frames: NDArray[np.uint8], pairs: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """Estimate the flow from the first frame of each pair to the second.

        Args:
            frames: uint8 [T, H, W, 3], RGB.
            pairs: frame indices, at least one pair.

        Returns:
            float32 [pairs, H, W, 2], x right, y down, pixels.
        """
        height, width = frames.shape[1:3]
        pixels = torch.from_numpy(frames).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        left, right = _margins(width)
        top, bottom = _margins(height)
        # Pad with repeated border pixels, because the edge of zero padding would look like static content.
        padded = functional.pad(pixels, (left, right, top, bottom), mode="replicate")
        first, second = zip(*pairs, strict=True)
        with exact_convolutions(self._device):
            flow = self._model(padded[list(first)], padded[list(second)], num_flow_updates=self._iterations)[-1]
        return flow[..., top : top + height, left : left + width].permute(0, 2, 3, 1).cpu().numpy()


def _margins(length: int) -> tuple[int, int]:
    """Return the padding before and after a side, in pixels, that extends it to a length accepted by RAFT."""
    missing = max(_MIN_SIDE, -(-length // _MULTIPLE) * _MULTIPLE) - length
    return missing // 2, missing - missing // 2


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"flow.weights {str(path)!r}: no such file (paths are relative to {Path.cwd()})")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle and safetensors raise many unrelated exception types
        raise ModelError(f"flow.weights {str(path)!r} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ModelError(f"flow.weights {str(path)!r}: holds a {type(state).__name__}, not a state dict")
    return state


def run_raft(raft: Raft, title: str, tasks: Sequence[FlowTask]) -> None:
    """Estimate the flow of every clip that is not yet in the journal, in this process.

    Each clip is processed a few frames at a time, so that memory use does not grow with its length; meanwhile, a thread
    decodes the next frames.

    Raises:
        DamagedError: the stored frames cannot be read.
    """
    todo = [task for task in tasks if task.journal.get(task.item) is None]
    chunks = [(task, start) for task in todo for start in range(0, max(task.frames["frames"] - 1, 1), _STEPS)]
    with Progress(title, total=len(tasks), unit="clips") as progress:
        progress.resume(len(tasks) - len(todo))
        for (task, start), frames in zip(chunks, prefetch(partial(_load, *chunk) for chunk in chunks), strict=True):
            if start == 0:
                maps = task.empty()
            _measure(raft, task, start, frames, maps)
            if start + _STEPS >= task.frames["frames"] - 1:
                task.finish(maps)
                progress.advance()


def _load(task: FlowTask, start: int) -> NDArray[np.uint8]:
    """Load the frames of the next _STEPS pairs, starting at frame `start`: one more frame than pairs."""
    numbers = range(start, min(start + _STEPS + 1, task.frames["frames"]))
    return np.stack([load_frame(task.tar, task.frames, number) for number in numbers])


def _measure(raft: Raft, task: FlowTask, start: int, frames: NDArray[np.uint8], maps: FlowMaps) -> None:
    """Fill `maps` with the flow between `frames`, the first of which has index `start`."""
    steps = len(frames) - 1
    if not steps:  # a single-frame clip has no pairs, so its flow stays zero
        return
    forward = [(n, n + 1) for n in range(steps)]
    backward = [(n + 1, n) for n in range(steps)]
    shape = (*task.map_shape, task.settings.cells)
    both = [to_cells(flow, *shape) for flow in raft.estimate(frames, [*forward, *backward])]
    maps.forward[start : start + steps] = both[:steps]
    maps.backward[start + 1 : start + 1 + steps] = both[steps:]
