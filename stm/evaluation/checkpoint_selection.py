"""Fine-tuning with a checkpoint that is chosen on the validation split, never on the test split."""

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
"""A module in evaluation mode -> its score on the validation split, the higher the better."""


class Best:
    """The best weights of a run so far, kept beside its checkpoints, so that a run that goes on knows them."""

    def __init__(self, folder: Path, measure: Measure | None, origin: str) -> None:
        """
        Args:
            origin: what the run is made from; what another run has left here counts for nothing.
        """
        self.weights, self.record, self.measure = folder / "best.safetensors", folder / "best.json", measure
        self.origin = origin

    def look(self, module: nn.Module, epoch: int) -> None:
        """Measures the module after an epoch, and keeps its weights when none before were better; equals: the earlier."""
        if self.measure is None or epoch <= self._seen():
            return
        training = module.training
        score = self.measure(module.eval())
        module.train(training)
        known = self._read()
        if known is None or score > known["score"]:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
            write_bytes(self.weights, save(tensors))
            known = {"score": score, "epoch": epoch}
        write_json(self.record, {**known, "seen": epoch, "origin": self.origin})
        say(f"validation after epoch {epoch}: {score:.4f}; best: epoch {known['epoch']}, {known['score']:.4f}")

    def _read(self) -> dict[str, Any] | None:
        if not (self.record.is_file() and self.weights.is_file()):
            return None
        known = dict(read_json(self.record))
        return known if known.get("origin") == self.origin else None

    def _seen(self) -> int:
        known = self._read()
        return 0 if known is None else int(known["seen"])

    def take(self, module: nn.Module) -> dict[str, Any]:
        """Gives the module the weights that are to be tested, and says which they are."""
        known = self._read()
        if self.measure is None or known is None:
            return {"chosen": "last", "why": "no validation split is named"}
        module.load_state_dict(load_file(self.weights))
        return {"chosen": "validation", "epoch": known["epoch"], "score": known["score"]}

    def forget(self) -> None:
        """Removes what was kept, once the results are written."""
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
    """Trains `module` in place and leaves it with the weights to test, in evaluation mode.

    Returns:
        Which weights these are, for `metrics.json`; and what removes the checkpoints, to be called when all is written.
    """
    best = Best(output, measure, hash_receipt(dict(plan.origin)))

    def after(epoch: int) -> None:
        with torch.inference_mode():
            best.look(module, epoch)

    checkpoints = fit(module.train(), batches, plan, output, process, after_epoch=after)
    which = best.take(module)
    module.eval()

    def discard() -> None:
        checkpoints.discard()
        best.forget()

    return which, discard
