"""Fine-tuning: the whole encoder and a linear head, trained end to end on the labels (VideoMAE's recipe).

Mean over all tokens, a norm, a linear layer that starts near zero; layer-wise learning rates; stochastic
depth; label smoothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import stm
from stm.config import FineTune, PretrainRun
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.evaluation.features import run_over
from stm.evaluation.results import check_labels, load_checked_encoder, write_results
from stm.files import sha256_file
from stm.models.vit import VideoEncoder
from stm.training.distributed import Process, choose_device
from stm.training.feeding import count_steps, feed, hash_shards
from stm.training.loop import Plan, fit

HEAD_SCALE = 1e-3
"""VideoMAE's `init_scale`: the head starts so small that the first predictions are even."""


class Classifier(nn.Module):
    """An encoder with a head on the mean of its tokens."""

    def __init__(self, encoder: VideoEncoder, classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        width = encoder.architecture.width
        self.encoder, self.label_smoothing = encoder, label_smoothing
        # The mean is normalised instead of the tokens, by a norm that is trained from scratch.
        self.encoder.norm.requires_grad_(False)
        self.fc_norm = nn.LayerNorm(width, eps=encoder.architecture.norm_eps)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * HEAD_SCALE, a=-2 * HEAD_SCALE, b=2 * HEAD_SCALE)
        nn.init.zeros_(self.head.bias)

    def classify(self, video: Tensor) -> Tensor:
        """Video uint8 [B, T, 3, S, S] -> logits [B, classes]."""
        return self.head(self.fc_norm(self.encoder.forward_features(video, final_norm=False)))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch with "video" and "label" int64 [B]; clips without a label (-1) count for nothing.

        Returns:
            {"loss": cross entropy, "top1": share of right predictions}, both float32 scalars.
        """
        logits, label = self.classify(batch["video"]).float(), batch["label"]
        labelled = (label >= 0).sum().clamp(min=1)
        total = functional.cross_entropy(
            logits, label, ignore_index=-1, reduction="sum", label_smoothing=self.label_smoothing
        )
        return {"loss": total / labelled, "top1": (logits.argmax(1) == label).sum() / labelled}


def fine_tune(
    task: FineTune,
    run: PretrainRun,
    weights: Path,
    train_indexes: Sequence[Path],
    test_indexes: Sequence[Path],
    output: Path,
    seed: int,
    device: str | None = None,
) -> None:
    """Fine-tunes and tests; goes on from a checkpoint like pretraining. See `stm.evaluation.evaluate`."""
    process = Process(0, 1, choose_device(device))
    shape, augmentation = Geometry.of(run), task.augmentation
    train = ClipDataset(train_indexes, shape, augmentation, seed, True, guides=())
    test = ClipDataset(test_indexes, shape, augmentation, seed, False, task.views, guides=(), classes=train.classes)
    check_labels(train, test)
    torch.manual_seed(seed)
    encoder = load_checked_encoder(weights, run, task.drop_path)
    classifier = Classifier(encoder, len(train.classes), task.label_smoothing).to(process.device)
    plan = Plan(
        name=f"fine-tune {output.parent.name}",
        optimisation=task.optimisation,
        steps_per_epoch=count_steps(train, task.optimisation),
        seed=seed,
        origin=_origin(task, run, weights, train_indexes, seed),
        precision=task.precision,
        compile=run.compile,
        layer_decay=task.layer_decay,
        depth=encoder.architecture.depth,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
    )
    batches = feed(train, task.optimisation, process, seed, run.workers)
    checkpoints = fit(classifier.train(), batches, plan, output, process)
    classifier.eval()
    probabilities = run_over(
        lambda video: classifier.classify(video).softmax(-1, dtype=torch.float32),
        test,
        process.device,
        what="test clips",
        workers=run.workers,
        precision=task.precision,
    )
    write_results(task, run, weights, train, test, probabilities.mean(1), output, seed)
    checkpoints.discard()


def _origin(
    task: FineTune, run: PretrainRun, weights: Path, train_indexes: Sequence[Path], seed: int
) -> dict[str, Any]:
    return {
        "task": task.model_dump(mode="json", exclude={"test_split", "views"}),
        "run": run.model_dump(mode="json", include={"frames", "stride", "compile"}),
        "weights": sha256_file(weights),
        "data": hash_shards(train_indexes),
        "seed": seed,
        "stm": stm.__version__,
    }
