"""Fine-tuning with a checkpoint that is selected on the validation split, never on the test split."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.storage.files import read_json, write_bytes, write_json
from stm.storage.receipts import hash_receipt
from stm.training.logs import say
from stm.training.loop import TrainingPlan, fit

Measure = Callable[[nn.Module], float]
"""A module in eval mode -> its score on the validation split; higher is better."""


class Best:
    """The best weights so far, stored next to the checkpoints, so that a resumed run knows them."""

    def __init__(self, folder: Path, measure: Measure | None, origin: str) -> None:
        """
        Args:
            measure: scores the module on the validation split; None: there is no such split, and the last weights are tested.
            origin: hash of everything that the run depends on; files of a run with another origin are ignored.
        """
        self.weights = folder / "best.safetensors"
        self.record = folder / "best.json"
        self.measure = measure
        self.origin = origin

    def update(self, module: nn.Module, epoch: int) -> None:
        """Scores the module after an epoch and stores its weights if it is better than all before; ties keep the earlier."""
        if self.measure is None or epoch <= self._last_epoch():
            return
        training = module.training
        score = self.measure(module.eval())
        module.train(training)
        best = self._read()
        if best is None or score > best["score"]:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
            write_bytes(self.weights, save(tensors))
            best = {"score": score, "epoch": epoch}
        # The epoch is recorded as scored: a resumed run may reach it again, with the same weights.
        write_json(self.record, {**best, "seen": epoch, "origin": self.origin})
        say(f"validation after epoch {epoch}: {score:.4f}; best: epoch {best['epoch']}, {best['score']:.4f}")

    def _read(self) -> dict[str, Any] | None:
        if not (self.record.is_file() and self.weights.is_file()):
            return None
        best = dict(read_json(self.record))
        return best if best.get("origin") == self.origin else None

    def _last_epoch(self) -> int:
        best = self._read()
        return 0 if best is None else int(best["seen"])

    def load(self, module: nn.Module) -> dict[str, Any]:
        """Loads the weights to test into the module; returns which ones these are, for `metrics.json`."""
        best = self._read()
        if self.measure is None or best is None:
            return {"chosen": "last", "why": "no validation split is named"}
        module.load_state_dict(load_file(self.weights))
        return {"chosen": "validation", "epoch": best["epoch"], "score": best["score"]}

    def discard(self) -> None:
        """Removes the stored weights, once the results are written."""
        self.weights.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)


def tune(
    module: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainingPlan,
    output: Path,
    process: Process,
    measure: Measure | None,
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Trains `module` in place and leaves it with the weights to test, in eval mode.

    Returns:
        Which weights these are, for `metrics.json`; and a function that removes the checkpoints, to be called once all
        results are written.
    """
    best = Best(output, measure, hash_receipt(dict(plan.origin)))

    def after(epoch: int) -> None:
        with torch.inference_mode():
            best.update(module, epoch)

    checkpoints = fit(module.train(), batches, plan, output, process, after_epoch=after)
    which = best.load(module)
    module.eval()

    def discard() -> None:
        checkpoints.discard()
        best.discard()

    return which, discard
