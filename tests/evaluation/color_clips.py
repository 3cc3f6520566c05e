"""Small splits whose labels are colours, and the tasks that are done on them."""

import json
from pathlib import Path
from typing import Any

from clip_metrics import check_clip_values
from training_shards import make_run, make_shard

from stm.config import FineTune, LinearProbe, PretrainRun
from stm.evaluation import EvaluationInputs, evaluate
from stm.training.pretraining import pretrain

LABELS = ["red", "green", "blue"]
RUN = make_run(optimisation={"epochs": 0})
PROBE = LinearProbe(task="linear", epochs=40, batch_size=8, views=2)


def make_splits(folder: Path) -> dict[str, Path]:
    """Fifteen training clips, nine test clips, and weights that nothing has trained."""
    train = make_shard(folder / "train" / "train-00000.parquet", LABELS * 5, seed=0, prefix="train")
    test = make_shard(folder / "test" / "test-00000.parquet", LABELS * 3, seed=1, prefix="test")
    pretrain(RUN, [train], folder / "run", 3, "cpu")
    return {"train": train, "test": test, "weights": folder / "run" / "weights.safetensors"}


def run_task(
    task: LinearProbe | FineTune, made: dict[str, Path], output: Path, run: PretrainRun = RUN, seed: int = 3
) -> dict[str, Any]:
    inputs = EvaluationInputs(made["weights"], [made["test"]], output, seed, train=[made["train"]], device="cpu")
    evaluate(task, run, inputs)
    check_clip_values(output)
    return json.loads((output / "metrics.json").read_text())


def fine_tuning(
    augmentation: dict[str, Any] | None = None, optimisation: dict[str, Any] | None = None, **changes: object
) -> FineTune:
    """Little augmentation and no mixing, where nothing else is said."""
    steps = {"epochs": 8, "batch_size": 5, "warmup_epochs": 1, "learning_rate": 0.05, "clip_grad": 1.0}
    plain = {"auto_augment": None, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    values = {"task": "finetune", "views": 2, "augmentation": plain | (augmentation or {}), **changes}
    return FineTune.model_validate({**values, "optimisation": steps | (optimisation or {})})
