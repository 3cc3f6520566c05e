"""What all pretraining runs have in common: their clips, the loop's plan, the line that introduces a run, the record beside
its weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import stm
from stm.config import LanguageRun, PretrainRun, Run
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import Batch
from stm.distributed.process import Process
from stm.methods import dataset_needs
from stm.storage.files import make_receipt, write_json
from stm.training.initialise import Start
from stm.training.logs import say
from stm.training.loop import Plan

# Settings that do not decide what comes out of a run; its seed is told apart from them.
_INDIFFERENT = {*Run.indifferent, "seed"}

# How the work is divided changes the result by rounding and by each process's noise. A run may go on under another
# division: a cluster does not always give the same nodes.
_DIVISION = {"processes", "nodes", "parallel"}

_LIBRARIES = ("torch", "timm", "numpy", "opencv-python-headless", "simplejpeg")


def open_clips(
    run: PretrainRun | LanguageRun, indexes: Sequence[Path], seed: int, frames: int | None = None
) -> ClipDataset:
    """The clips that a run trains on, with what its method needs of them.

    Args:
        indexes: of the shards.
        frames: of a sample; the run's when not given, 1 for images.

    Raises:
        ValueError: a shard cannot be used, or clips lack what is needed.
    """
    needs, shape = dataset_needs(run), Geometry.of(run)
    return ClipDataset(
        indexes,
        shape if frames is None else replace(shape, frames=frames),
        run.augmentation,
        seed,
        True,
        repeats=run.repeats,
        guides=needs.guides,
        text=needs.text,
        captions=run.captions,
        kept_gigabytes=run.kept_gigabytes,
        resize=run.resize_on == "loader",
    )


def make_plan(
    run: Run,
    steps_per_epoch: int,
    seed: int,
    data: Mapping[str, Any],
    start: Start | None,
    teacher: Mapping[str, str] | None,
    output: Path,
    **more: Any,
) -> Plan:
    """The loop's plan of a run.

    Args:
        data: SHA-256 of its shards.
        start: weights that it starts from, if any.
        teacher: what identifies its teacher, if it has one.
        more: further things that decide what comes out.
    """
    origin = {
        "run": run.model_dump(mode="json", exclude=_INDIFFERENT | _DIVISION),
        "seed": seed,
        "data": data,
        "stm": stm.__version__,
    }
    return Plan(
        name=f"pretrain {output.name}",
        optimisation=run.optimisation,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        origin=origin | ({"init": asdict(start)} if start else {}) | ({"teacher": teacher} if teacher else {}) | more,
        precision=run.precision,
        compile=run.compile,
        parallel=run.parallel,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
    )


def no_batches(step: int) -> Iterator[Batch]:
    """Those of a run without epochs."""
    return iter(())


def introduce(plan: Plan, clips: str, parameters: int, process: Process) -> None:
    """Says what is about to be trained."""
    if process.first:
        say(
            f"{plan.name}: {parameters / 1e6:.1f} million parameters, {clips}, "
            f"{plan.optimisation.epochs} epochs of {plan.steps_per_epoch} steps, {process.count} x {process.device}"
        )


def write_record(run: Run, plan: Plan, output: Path) -> None:
    """Writes `config.json`: the run and the receipt."""
    receipt = make_receipt(
        "pretrain",
        run.model_dump(mode="json", exclude=_INDIFFERENT),
        _LIBRARIES,
        seed=plan.seed,
        step=plan.steps,
        **{name: value for name, value in plan.origin.items() if name not in ("run", "seed", "stm")},
    )
    write_json(output / "config.json", {"run": run.model_dump(mode="json"), "receipt": receipt})
