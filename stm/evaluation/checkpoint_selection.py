"""Fine-tuning with checkpoint selection on the validation split, never on the test split."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from stm.config.evaluation import TaskSettings
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.storage.files import read_json, write_bytes, write_json
from stm.storage.receipts import hash_receipt
from stm.training.loop import TrainingPlan, fit_to_test

_log = logging.getLogger(__name__)

Measure = Callable[[nn.Module], float]
"""A module in eval mode -> its score on the validation split; higher is better."""


class Best:
    """The best weights so far, stored next to the checkpoints so that a resumed run can load them."""

    def __init__(self, folder: Path, measure: Measure | None, origin: str, process: Process) -> None:
        """
        Args:
            measure: scores the module on the validation split; None if there is no such split, so that the last weights
                are tested.
            origin: hash of everything that the run depends on; files of a run with a different origin are ignored.
            process: all processes measure; the first one decides and writes.
        """
        self.weights = folder / "best.safetensors"
        self.record = folder / "best.json"
        self.measure = measure
        self.origin = origin
        self.process = process

    def update(self, module: nn.Module, epoch: int) -> None:
        """Scores the module after an epoch and stores its weights if the score is a new best; ties keep the earlier ones."""
        # The first process decides for all: on a shared disk, others might see a file that is being written.
        if self.measure is None or epoch <= self.process.share(self._last_epoch() if self.process.first else 0):
            return
        training = module.training
        score = self.measure(module.eval())
        module.train(training)
        if not self.process.first:
            return
        best = self._read()
        if best is None or score > best["score"]:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
            write_bytes(self.weights, save(tensors))
            best = {"score": score, "epoch": epoch}
        # Record that the epoch has been scored: a resumed run may reach it again, with the same weights.
        write_json(self.record, {**best, "seen": epoch, "origin": self.origin})
        _log.info(f"validation after epoch {epoch}: {score:.4f}; best: epoch {best['epoch']}, {best['score']:.4f}")

    def _read(self) -> dict[str, Any] | None:
        if not (self.record.is_file() and self.weights.is_file()):
            return None
        best = dict(read_json(self.record))
        return best if best.get("origin") == self.origin else None

    def _last_epoch(self) -> int:
        best = self._read()
        return 0 if best is None else int(best["seen"])

    def load(self, module: nn.Module) -> dict[str, Any]:
        """Loads the weights to test into the module; returns their description for `metrics.json`."""
        best = self._read()
        if self.measure is None or best is None:
            return {"chosen": "last", "why": "no validation split is named"}
        module.load_state_dict(load_file(self.weights))
        return {"chosen": "validation", "epoch": best["epoch"], "score": best["score"]}

    def discard(self) -> None:
        """Removes the stored weights; called once the results are written."""
        self.weights.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)


def untrained(task: TaskSettings) -> dict[str, Any]:
    """The description, for `metrics.json`, of weights that the task tests as they are."""
    return {"chosen": "released, fine-tuned" if task.fine_tunes else "pretrained"}


def tune(
    module: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainingPlan,
    output: Path,
    process: Process,
    measure: Measure | None,
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Trains `module` in place, then loads the weights to test into it and switches it to eval mode.

    Returns:
        A description of these weights for `metrics.json`, and a function that removes the checkpoints, to be called
        once all results are written.
    """
    best = Best(output, measure, hash_receipt(dict(plan.origin)), process)

    def after(epoch: int) -> None:
        with torch.inference_mode():
            best.update(module, epoch)

    checkpoints = fit_to_test(module.train(), batches, plan, output, process, after_epoch=after)
    process.wait()  # for the first one to have written the best weights
    which = {**best.load(module), **checkpoints.resumed()}
    module.eval()

    def discard() -> None:
        checkpoints.discard()
        best.discard()

    return which, discard
