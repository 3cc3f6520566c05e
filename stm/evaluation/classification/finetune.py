"""Fine-tuning: the whole encoder and a linear head, trained end to end on the labels (VideoMAE's recipe).

The head is a mean over all tokens, a norm and a linear layer initialised near zero. Training uses layer-wise learning
rates, stochastic depth, mixup and cutmix, label smoothing and several augmented samples per clip. Testing averages
several views per clip after softmax.

`optimisation.batch_size` counts samples, including repeats, and the learning rate is specified per 256 samples.
VideoMAE's scripts count clips: their batch of 384 clips with 2 repeats at 5e-4 is a batch of 768 at 2.5e-4 here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import stm
from stm.config import FineTune, Run
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.distributed.process import Process
from stm.distributed.shares import Share, share_noise
from stm.evaluation.classification.clips import LabelledClips, clips_to_test
from stm.evaluation.classification.mixup import Mixing, mix, soft_targets
from stm.evaluation.features import average_probabilities, run_over
from stm.evaluation.inputs import DIVISION, EvaluationInputs
from stm.evaluation.results import check_architecture, check_labels, load_checked_encoder, write_classification
from stm.models.checkpointing import set_checkpointing
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.models.weights.checks import build_encoder
from stm.storage.files import sha256_file
from stm.training.batches import count_steps, feed, hash_shards
from stm.training.loop import TrainingPlan, fit_to_test
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


def fine_tune(task: FineTune, run: Run, inputs: EvaluationInputs, process: Process) -> None:
    """Fine-tunes and tests a classifier; resumes from a checkpoint, as pretraining does. See `stm.evaluation.evaluate`.

    In addition to the results, writes `classifier.safetensors`, which `stm.models.weights.zoo` can read and convert. With 0
    epochs, only tests the classifier of a release.
    """
    settings = task.optimisation
    if not task.trains:
        _test_release(task, run, inputs, process)
        return
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
    set_checkpointing(encoder, task.gradient_checkpointing)
    classifier = Classifier(encoder, len(train.classes), task.label_smoothing, task.head_dropout).to(process.device)
    if task.initial_head == "release":
        load_head(classifier, inputs.weights, train.classes)
    # A pair of clips that are mixed is in one process.
    share_noise(classifier, Share(process.rank, process.count, paired=task.augmentation.mixes))
    plan = TrainingPlan(
        name=f"fine-tune {inputs.output.parent.name}",
        optimisation=settings,
        steps_per_epoch=count_steps(train, settings),
        seed=inputs.seed,
        origin=_origin(task, run, inputs),
        precision=task.precision,
        compile=run.compile,
        parallel=task.parallel,
        layer_decay=task.layer_decay,
        depth=encoder.architecture.depth,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
        shared_noise=True,
        trackers=inputs.trackers,
    )
    batches = feed(train, settings, process, inputs.seed, run.workers, paired=task.augmentation.mixes)
    if task.augmentation.mixes:
        batches = Mixing(task.augmentation, inputs.seed).mixed(batches, settings.accumulate)
    checkpoints = fit_to_test(classifier.train(), batches, plan, inputs.output, process)
    if process.first:
        zoo.save(classifier, inputs.output / "classifier.safetensors", labels=train.classes)
    probabilities = _classify(classifier, test, task, run, process)
    if process.first:
        write_classification(task, run, inputs, test, probabilities, train, extra=checkpoints.resumed())
        checkpoints.discard()


def load_head(classifier: Classifier, path: Path, labels: Sequence[str]) -> None:
    """Copies a released classifier's norm, and the rows of its head that belong to `labels`, into a classifier of these labels.

    A release without class names is taken to begin with these classes, as Kinetics-710 does with those of Kinetics-400.

    Raises:
        WeightsError: the weights have no classifier, or not all of the classes.
    """
    weights = zoo.read(path)
    if weights.kind != "classifier":
        raise zoo.WeightsError(f"{path} has no classifier to start from: set initial_head to fresh")
    names = weights.labels
    missing = sorted(set(labels) - set(names)) if names else list(labels[weights.classes :])
    if missing:
        raise zoo.WeightsError(
            f"initial_head: the classifier in {path} has {weights.classes} classes, without {len(missing)} of the "
            f"{len(labels)} training labels, such as {missing[0]!r}: set initial_head to fresh"
        )
    rows = [names.index(label) for label in labels] if names else list(range(len(labels)))
    classifier.fc_norm.load_state_dict({key: weights.tensors[f"fc_norm.{key}"] for key in ("weight", "bias")})
    classifier.head.load_state_dict({key: weights.tensors[f"head.{key}"][rows] for key in ("weight", "bias")})


def _classify(
    classifier: Classifier, test: ClipDataset, task: FineTune, run: Run, process: Process
) -> NDArray[np.float32]:
    """Probabilities [test clips, classes], averaged over views."""
    logits = run_over(
        classifier.eval().classify,
        test,
        process,
        what="test clips",
        workers=run.workers,
        precision=task.precision,
    )
    return average_probabilities(logits)


def _test_release(task: FineTune, run: Run, inputs: EvaluationInputs, process: Process) -> None:
    """Tests the classifier in the run's weights.

    Raises:
        WeightsError: the weights have no classifier, or its number of classes is not that of the names.
    """
    weights = zoo.read(inputs.weights)
    if weights.kind != "classifier":
        raise zoo.WeightsError(
            f"{inputs.weights} has no classifier to test: set optimisation.epochs, or evaluate a run whose `release` is a "
            "fine-tuned classifier"
        )
    names = _class_names(task, weights, clips_to_test(task, run, inputs.test, inputs.seed).classes)
    test = clips_to_test(task, run, inputs.test, inputs.seed, classes=names)
    check_labels(test)
    classifier = Classifier(build_encoder(weights), weights.classes)
    check_architecture(classifier.encoder, inputs.weights, run)
    classifier.load_state_dict(dict(weights.tensors))
    probabilities = _classify(classifier.to(process.device), test, task, run, process)
    if process.first:
        write_classification(task, run, inputs, test, probabilities)


def _class_names(task: FineTune, weights: zoo.Weights, labels: Sequence[str]) -> Sequence[str]:
    """The names of a released classifier's classes, in the order of its logits.

    Args:
        labels: the labels of the test split, in alphabetical order, which is that of Kinetics and Something-Something.

    Raises:
        WeightsError: the number of names is not that of the classes, or a name occurs twice.
    """
    if task.classes is not None:
        names: Sequence[str] = [line.strip() for line in Path(task.classes).read_text(encoding="utf-8").splitlines()]
        origin = task.classes
    else:
        names, origin = (weights.labels, "the weights") if weights.labels else (labels, "the labels of the test split")
    if len(set(names)) != len(names) or len(names) != weights.classes:
        raise zoo.WeightsError(
            f"the classifier has {weights.classes} classes, and {origin} {len(names)} names, {len(set(names))} of them "
            "different: give a file with one name per line, in the order of the logits, as `classes` of the evaluation"
        )
    return names


def _origin(task: FineTune, run: Run, inputs: EvaluationInputs) -> dict[str, Any]:
    # Settings that affect only the test, or the division of the work: changing them must not discard a checkpoint.
    test_only = {"test_split", "views", "crops", *DIVISION, *task.cache_neutral}
    return {
        "task": task.model_dump(mode="json", exclude=test_only),
        "run": run.model_dump(mode="json", include={"frames", "stride", "sampling", "compile"}),
        "weights": sha256_file(inputs.weights),
        "data": hash_shards(inputs.train),
        "seed": inputs.seed,
        "stm": stm.__version__,
    }
