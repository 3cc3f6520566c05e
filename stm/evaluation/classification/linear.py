"""Linear probe: a linear classifier on frozen features.

Neither TGM nor MGM describes its linear probe, so the recipe is a common one instead of a video paper's. As in MAE
(main_linprobe.py), it uses batch norm without parameters before the layer, weights initialised with standard deviation
0.01, 90 epochs and no weight decay. It differs from MAE in three ways: there is no augmentation, only a centre crop, so
that features are computed once; the optimiser is AdamW instead of LARS; and the learning rate is selected on a fifth of
the TRAINING clips, never on the test split. The features are the mean over all tokens after the encoder's last norm,
because VideoMAE has no class token.

Several processes share the clips, whose features each of them then has, and the learning rates, which each trains as a whole: the
batch norm sees whole batches, and the classifier is the one that a single process trains.
"""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from stm.config import Augmentation, LinearProbe, Run
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.distributed.process import Process
from stm.distributed.shares import join_rows
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import average_probabilities, pooled_features
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.results import check_labels, load_checked_encoder, write_classification
from stm.jobs.progress import track

_log = logging.getLogger(__name__)


def probe(task: LinearProbe, run: Run, inputs: EvaluationInputs, process: Process) -> None:
    """Trains and tests a linear probe; see `stm.evaluation.evaluate`."""
    device = process.device
    train = ClipDataset(inputs.train, Geometry.of(run, task), Augmentation(), inputs.seed, False, guides=())
    test = clips_to_test(task, run, inputs.test, inputs.seed, classes=train.classes)
    check_labels(test, train)
    encoder = load_checked_encoder(inputs.weights, run).to(device).eval()
    features = [
        torch.from_numpy(pooled_features(encoder, run, dataset, process, f"{name} clips"))
        for name, dataset in (("training", train), ("test", test))
    ]
    labelled = np.flatnonzero(train.labels() >= 0)
    vectors = features[0][labelled, 0].to(device)
    targets = torch.from_numpy(train.labels()[labelled]).to(device)
    classes = len(train.classes)
    rates, best = {}, task.learning_rates[0]
    if len(task.learning_rates) > 1:
        rates = try_learning_rates(vectors, targets, classes, task, inputs.seed, process)
        best = max(task.learning_rates, key=lambda rate: rates[rate])
        _log.info(f"linear probe: learning rate {best:g} is best on held-out training clips")
    if not process.first:
        return
    head = train_head(vectors, targets, classes, best, task, inputs.seed)
    with torch.inference_mode():
        logits = head(features[1].to(device).flatten(0, 1)).unflatten(0, features[1].shape[:2])
    probabilities = average_probabilities(logits.cpu().numpy())
    tried = [{"learning_rate": r, "held_out_top1": rates[r][0], "held_out_loss": -rates[r][1]} for r in rates]
    extra = {"learning_rate": best, "learning_rates": tried}
    write_classification(task, run, inputs, test, probabilities, train, extra=extra)


def hold_out(targets: NDArray[np.integer], seed: int) -> NDArray[np.bool_]:
    """Holds out a fifth of the clips, stratified by class, but never all clips of a class: bool [n], True if held out.

    Raises:
        ValueError: no class has at least two clips.
    """
    _, place, count = np.unique(targets, return_inverse=True, return_counts=True)
    # Select every fifth clip, ordered by class: this never selects all clips of a class with at least two.
    spare = np.flatnonzero(count[place] > 1)
    if not len(spare):
        raise ValueError(
            "each class has a single training clip, so none can be held out to select the linear probe's learning "
            "rate: give one learning rate (`learning_rates`), or more clips"
        )
    noise = np.random.default_rng(seed).random(len(targets))
    held = np.zeros(len(targets), dtype=bool)
    held[spare[np.lexsort((noise[spare], targets[spare]))[::5]]] = True
    return held


def try_learning_rates(
    features: Tensor, targets: Tensor, classes: int, task: LinearProbe, seed: int, process: Process
) -> dict[float, tuple[float, float]]:
    """Top-1 accuracy and negative loss on the held-out fifth, for each learning rate; the processes share the rates.

    The greatest pair is best: the loss breaks ties in top-1 accuracy.
    """
    held = torch.from_numpy(hold_out(targets.cpu().numpy(), seed)).to(targets.device)
    numbers = list(range(process.rank, len(task.learning_rates), process.count))
    results = []
    for number in track(numbers, "linear probe", len(numbers), "learning rates"):
        rate = task.learning_rates[number]
        head = train_head(features[~held], targets[~held], classes, rate, task, seed)
        with torch.inference_mode():
            logits = head(features[held])
        top1 = (logits.argmax(1) == targets[held]).double().mean().item()
        results.append([top1, -functional.cross_entropy(logits, targets[held]).item()])
    rows = torch.tensor(results, dtype=torch.float64) if results else None
    scores = join_rows(process, torch.tensor(numbers, dtype=torch.int64), rows, len(task.learning_rates)).tolist()
    return {rate: (top1, loss) for rate, (top1, loss) in zip(task.learning_rates, scores, strict=True)}


def train_head(
    features: Tensor, targets: Tensor, classes: int, learning_rate: float, task: LinearProbe, seed: int
) -> nn.Module:
    """Trains the classifier on cached features.

    Args:
        features: float32 [n, D].
        targets: int64 [n].
        learning_rate: AdamW's initial learning rate, which decays to 0 along a half cosine.

    Returns:
        The classifier in eval mode, which maps [n, D] to logits [n, classes].

    Raises:
        ValueError: there are fewer than two clips, which batch norm needs.
    """
    if len(features) < 2:
        raise ValueError(f"the linear probe needs at least 2 training clips, and there are {len(features)}")
    # Use the same initial weights for every learning rate, independent of the global generator's state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = nn.Linear(features.shape[1], classes)
        # MAE's initialisation, from MoCo v3.
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6), linear).to(features.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    # Use batches of nearly equal size: batch norm has poor statistics for a small last batch, and none for a single
    # clip.
    batches = max(1, min(round(len(features) / task.batch_size), len(features) // 2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        # Sampled on the CPU, so that the order does not depend on the device.
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for part in torch.tensor_split(order, batches):
            functional.cross_entropy(head(features[part]), targets[part]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return head.eval()
