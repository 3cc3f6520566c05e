"""Fine-tuning: the whole encoder and a linear head, trained end to end on the labels (VideoMAE's recipe).

The head is a mean over all tokens, a norm and a linear layer initialised near zero. Training uses layer-wise learning
rates, stochastic depth, mixup and cutmix, label smoothing and several augmented samples per clip. Testing averages
several views per clip after softmax.

`optimisation.batch_size` counts samples, including repeats, and the learning rate is specified per 256 samples.
VideoMAE's scripts count clips: their batch of 384 clips with 2 repeats at 5e-4 is a batch of 768 at 2.5e-4 here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import stm
from stm.config import FineTune, Run
from stm.data.geometry import Geometry
from stm.distributed.process import Process, choose_device
from stm.evaluation.classification.clips import LabelledClips, clips_to_test
from stm.evaluation.classification.mixup import Mixing, mix, soft_targets
from stm.evaluation.features import average_probabilities, run_over
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.results import check_labels, load_checked_encoder, write_classification
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.storage.files import sha256_file
from stm.training.batches import count_steps, feed, hash_shards
from stm.training.loop import TrainingPlan, fit
from stm.tubelets import to_unit

HEAD_SCALE = 1e-3
"""VideoMAE's `init_scale`: so small that the initial predictions are almost uniform."""


class Classifier(nn.Module):
    """An encoder with a classification head on the mean of its tokens."""

    def __init__(
        self, encoder: VideoEncoder, classes: int, label_smoothing: float = 0.0, head_dropout: float = 0.0
    ) -> None:
        super().__init__()
        width = encoder.architecture.width
        self.encoder = encoder
        self.classes = classes
        self.label_smoothing = label_smoothing
        # A norm trained from scratch normalises the mean; the encoder's norm of the tokens is not used.
        self.encoder.norm.requires_grad_(False)
        self.fc_norm = nn.LayerNorm(width, eps=encoder.architecture.norm_eps)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * HEAD_SCALE, a=-2 * HEAD_SCALE, b=2 * HEAD_SCALE)
        nn.init.zeros_(self.head.bias)

    def classify(self, video: Tensor) -> Tensor:
        """Video [B, T, 3, S, S], uint8 or float in [0, 1] -> logits [B, classes]."""
        features = self.encoder.forward_features(video, final_norm=False)
        return self.head(self.dropout(self.fc_norm(features)))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch: "video" uint8 [B, T, 3, S, S], "label" int64 [B], and for mixup or cutmix the entries that
                `Mixing.mixed` adds.

        Returns:
            {"loss": cross entropy, "top1": share of correct predictions}, float32 scalars; for a mixed batch only the
            loss, because each clip has two labels.
        """
        label = batch["label"]
        if "pixel_weights" in batch:
            logits = self.classify(mix(to_unit(batch["video"]), batch["pixel_weights"])).float()
            targets = mix(soft_targets(label, self.classes, self.label_smoothing), batch["label_weights"])
            return {"loss": functional.cross_entropy(logits, targets)}
        logits = self.classify(batch["video"]).float()
        loss = functional.cross_entropy(logits, label, label_smoothing=self.label_smoothing)
        return {"loss": loss, "top1": (logits.argmax(1) == label).float().mean()}


def fine_tune(task: FineTune, run: Run, inputs: EvaluationInputs) -> None:
    """Fine-tunes and tests a classifier; resumes from a checkpoint, as pretraining does. See `stm.evaluation.evaluate`.

    In addition to the results, writes `classifier.safetensors`, which `stm.models.weights.zoo` can read and convert.
    """
    process, settings = Process(0, 1, choose_device(inputs.device)), task.optimisation
    train = LabelledClips(
        inputs.train,
        Geometry.of(run, task),
        task.augmentation,
        inputs.seed,
        True,
        repeats=task.repeats,
        guides=(),
        kept_gigabytes=run.kept_gigabytes,
    )
    test = clips_to_test(task, run, inputs.test, inputs.seed, classes=train.classes)
    check_labels(test, train)
    torch.manual_seed(inputs.seed)
    encoder = load_checked_encoder(inputs.weights, run, task.drop_path)
    classifier = Classifier(encoder, len(train.classes), task.label_smoothing, task.head_dropout).to(process.device)
    plan = TrainingPlan(
        name=f"fine-tune {inputs.output.parent.name}",
        optimisation=settings,
        steps_per_epoch=count_steps(train, settings),
        seed=inputs.seed,
        origin=_origin(task, run, inputs),
        precision=task.precision,
        compile=run.compile,
        layer_decay=task.layer_decay,
        depth=encoder.architecture.depth,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
    )
    batches = feed(train, settings, process, inputs.seed, run.workers)
    mixing = Mixing(task.augmentation, inputs.seed)
    if mixing.on:
        batches = mixing.mixed(batches, settings.accumulate)
    checkpoints = fit(classifier.train(), batches, plan, inputs.output, process)
    zoo.save(classifier, inputs.output / "classifier.safetensors", labels=train.classes)
    logits = run_over(
        classifier.eval().classify,
        test,
        process.device,
        what="test clips",
        workers=run.workers,
        precision=task.precision,
    )
    write_classification(task, run, inputs, test, average_probabilities(logits), train)
    checkpoints.discard()


def _origin(task: FineTune, run: Run, inputs: EvaluationInputs) -> dict[str, Any]:
    # Settings that affect only the test: changing them must not discard a checkpoint.
    test_only = {"test_split", "views", "crops", *task.cache_neutral}
    return {
        "task": task.model_dump(mode="json", exclude=test_only),
        "run": run.model_dump(mode="json", include={"frames", "stride", "sampling", "compile"}),
        "weights": sha256_file(inputs.weights),
        "data": hash_shards(inputs.train),
        "seed": inputs.seed,
        "stm": stm.__version__,
    }
