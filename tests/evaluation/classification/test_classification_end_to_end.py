"""Linear probe and fine-tuning with heads whose answers are known: what is held out, which settings arrive, how views count."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from color_clips import LABELS, PROBE, RUN, fine_tuning, make_splits, run_task
from timm.layers import DropPath
from torch import Tensor, nn
from training_shards import make_shard

from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.classification.finetune import Classifier
from stm.evaluation.classification.mixup import Mixing
from stm.models.weights import zoo
from stm.storage.files import sha256_file

CLASSES = sorted(LABELS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    splits = make_splits(folder)
    # Ten red clips, five green and five blue ones, and one without a label; of each class a fifth is held out.
    labels = ["red", "red", "green", "blue"] * 5
    splits["uneven"] = make_shard(folder / "uneven" / "train-00000.parquet", [*labels, None], seed=2, prefix="train")
    return splits


class Memory(nn.Module):
    """Knows the class of what it was trained on, and takes everything else for its own class."""

    def __init__(self, features: Tensor, targets: Tensor, own: int) -> None:
        super().__init__()
        self.features = features
        self.targets = targets
        self.own = own

    def forward(self, features: Tensor) -> Tensor:
        distances = torch.cdist(features, self.features)
        known = distances.min(dim=1)
        chosen = torch.where(known.values < 1e-6, self.targets[known.indices], self.own)
        return 10 * nn.functional.one_hot(chosen, len(CLASSES)).float()


def test_the_learning_rate_is_chosen_on_clips_that_its_head_has_not_seen(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = PROBE.model_copy(update={"learning_rates": (0.1, 0.3, 0.2)})  # the heads say: blue, red, green
    own = {0.1: 0, 0.3: 2, 0.2: 1}
    trained: list[tuple[float, Tensor, Tensor]] = []

    def train_head(features: Tensor, targets: Tensor, classes: int, rate: float, *_: Any) -> nn.Module:
        assert classes == 3
        trained.append((rate, features, targets))
        return Memory(features, targets, own[rate])

    monkeypatch.setattr("stm.evaluation.classification.linear.train_head", train_head)
    metrics = run_task(task, {**made, "train": made["uneven"]}, tmp_path)
    # Held out: two red clips, one green and one blue one.
    found = {one["learning_rate"]: one["held_out_top1"] for one in metrics["learning_rates"]}
    assert found == {0.1: 0.25, 0.3: 0.5, 0.2: 0.25}
    assert metrics["learning_rate"] == 0.3
    assert [(rate, len(features)) for rate, features, _ in trained] == [(0.1, 16), (0.3, 16), (0.2, 16), (0.3, 20)]
    assert torch.bincount(trained[0][2]).tolist() == [4, 4, 8] and torch.bincount(trained[-1][2]).tolist() == [5, 5, 10]
    assert metrics["train_clips"] == 20
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert {row["prediction"] for row in rows} == {"red"} and metrics["top1"] == pytest.approx(1 / 3)


def set_opinions(head: nn.Linear, features: Tensor) -> None:
    """Random weights whose answers differ between clips, and between the views of one."""
    with torch.no_grad():
        head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
        head.bias.copy_(-head.weight @ features.mean(0))


def expect_probabilities(logits_of: Any, test: ClipDataset) -> np.ndarray:
    """Mean over a clip's views of the softmax, one view at a time: [clips, classes]."""
    found, apart = [], 0.0
    for number in range(len(test)):
        with torch.inference_mode():
            logits = torch.cat([logits_of(torch.from_numpy(view["video"])[None]) for view in test[number]])
        assert len(logits) == 6  # two views of three crops
        found.append(logits.softmax(1).mean(0).numpy())
        apart = max(apart, float(np.abs(found[-1] - logits.mean(0).softmax(0).numpy()).max()))
    assert apart > 0.05  # averaging before the softmax would be noticed
    assert len(set(np.argmax(found, axis=1).tolist())) > 1
    return np.stack(found)


def check_predictions(folder: Path, expected: np.ndarray) -> None:
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    assert [row["label"] for row in rows] == LABELS * 3
    assert [row["prediction"] for row in rows] == [CLASSES[number] for number in expected.argmax(1)]
    assert [row["probability"] for row in rows] == pytest.approx(expected.max(1), abs=1e-3)


def test_a_probe_averages_probabilities_over_views_and_crops(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = zoo.load_encoder(made["weights"]).eval()
    head = nn.Linear(encoder.architecture.width, 3)

    def train_head(features: Tensor, *_: Any) -> nn.Module:
        set_opinions(head, features)
        return head

    monkeypatch.setattr("stm.evaluation.classification.linear.train_head", train_head)
    task = PROBE.model_copy(update={"learning_rates": (0.1,), "views": 2, "crops": 3})
    run_task(task, made, tmp_path)
    test = clips_to_test(task, RUN, [made["test"]], 3, CLASSES)
    check_predictions(tmp_path, expect_probabilities(lambda video: head(encoder(video).mean(1)), test))


class Tuned:
    """Takes the place of `fit`: keeps what it is given, and gives the classifier a head with strong opinions."""

    def __init__(self) -> None:
        self.module: Any = None
        self.plan: Any = None
        self.batches: Any = None

    def __call__(self, module: nn.Module, batches: Any, plan: Any, output: Path, process: Any) -> "Tuned":
        assert module.training
        self.module = module
        self.batches = batches
        self.plan = plan
        with torch.inference_mode():
            video = next(iter(batches(0)))["video"]
            pooled = self.module.encoder.eval().forward_features(video, final_norm=False)
            features = self.module.fc_norm(pooled)
        set_opinions(self.module.head, features)
        module.train()
        return self

    def resumed(self) -> dict[str, Any]:
        return {}

    def discard(self) -> None:
        pass


TASK = fine_tuning(
    {"flip": False, "scale": (0.9, 1.0), "mixup": 0.4, "mix_probability": 0.7},
    {"batch_size": 8, "accumulate": 2, "epochs": 4},
    drop_path=0.6,
    head_dropout=0.5,
    label_smoothing=0.3,
    layer_decay=0.6,
    repeats=2,
    crops=3,
    precision="float32",
)


@pytest.fixture(scope="module")
def tuned(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Path]:
    folder, training = tmp_path_factory.mktemp("tuned"), Tuned()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stm.evaluation.classification.finetune.fit_to_test", training)
        run_task(TASK, {**made, "train": made["uneven"]}, folder, RUN.model_copy(update={"checkpoint_every": 7}))
    return training, folder


def test_a_tuned_classifier_averages_probabilities_over_views_without_dropout(
    made: dict[str, Path], tuned: tuple[Tuned, Path]
) -> None:
    training, folder = tuned
    test = clips_to_test(TASK, RUN, [made["test"]], 3, CLASSES)
    assert not training.module.training
    check_predictions(folder, expect_probabilities(training.module.classify, test))


def test_settings_of_the_task_arrive_in_the_classifier_and_its_training(tuned: tuple[Tuned, Path]) -> None:
    module, plan = tuned[0].module, tuned[0].plan
    rates = [part.drop_prob or 0.0 for part in module.encoder.modules() if isinstance(part, DropPath)]
    depth = module.encoder.architecture.depth
    assert sorted(set(rates) | {0}) == pytest.approx([0.6 * block / (depth - 1) for block in range(depth)])
    assert module.dropout.p == 0.5
    assert (plan.layer_decay, plan.depth, plan.precision, plan.seed) == (0.6, depth, "float32", 3)
    # 20 labelled clips with two samples each, eight samples per step.
    assert (plan.steps_per_epoch, plan.optimisation, plan.checkpoint_every) == (5, TASK.optimisation, 7)
    video = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        loss = module({"video": video, "label": torch.tensor([2, 0])})["loss"]
        target = torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]])  # 0.3 evenly over three classes
        expected = -(target * module.classify(video).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_training_batches_have_the_task_s_repeats_crops_and_mixing(
    made: dict[str, Path], tuned: tuple[Tuned, Path]
) -> None:
    clips = ClipDataset(
        [made["uneven"]], Geometry.of(RUN, TASK), TASK.augmentation, 3, True, repeats=2, guides=(), classes=CLASSES
    )
    labels, mixing, mixed = clips.labels(), Mixing(TASK.augmentation, 3), 0
    for step in (0, 6):  # the seventh step is the second epoch's second
        for part, batch in zip(range(2), tuned[0].batches(step), strict=False):
            assert len(batch["video"]) == 4 and batch["clip"].tolist()[::2] == batch["clip"].tolist()[1::2]
            for number in range(4):
                clip, repeat = int(batch["clip"][number]), int(batch["view"][number])
                assert repeat == number % 2
                sample = clips[step // 5, clip][repeat]
                assert np.array_equal(batch["video"][number], sample["video"])
                assert batch["label"][number] == labels[clip] >= 0
            drawn = mixing.draw(2 * step + part, 32)
            assert batch["label_weights"].tolist() == pytest.approx([drawn.share, 1 - drawn.share])
            torch.testing.assert_close(batch["pixel_weights"], drawn.weights(32))
            mixed += drawn.share < 1
    assert 0 < mixed < 4


@pytest.mark.parametrize("task", [PROBE, TASK], ids=["linear", "finetune"])
def test_the_receipt_names_settings_weights_shards_and_seed(
    task: Any, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stm.evaluation.classification.finetune.fit_to_test", Tuned())
    metrics = run_task(task, made, tmp_path, seed=5)
    receipt = metrics["receipt"]
    assert receipt["stage"] == "evaluate" and receipt["seed"] == 5
    assert receipt["weights"] == sha256_file(made["weights"])
    for split in ("train", "test"):
        assert receipt[split] == {f"{split}-00000": sha256_file(made[split].with_suffix(".tar"))}
    assert receipt["settings"]["task"] == task.fingerprint() == metrics["settings"]
    run = RUN.model_dump(mode="json")
    shape = {"model", "image_size", "patch_size", "tubelet", "frames", "stride", "sampling", "precision"}
    assert receipt["settings"]["run"] == {key: run[key] for key in shape}
    assert pq.read_schema(tmp_path / "predictions.parquet").metadata


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_tuned_classifier_trains_and_is_tested_in_the_task_s_precision(
    precision: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own is the other one."""
    training, halved = Tuned(), []
    classify = Classifier.classify

    def note(self: Classifier, video: Tensor) -> Tensor:
        halved.append(torch.is_autocast_enabled("cpu"))
        return classify(self, video)

    monkeypatch.setattr("stm.evaluation.classification.finetune.fit_to_test", training)
    monkeypatch.setattr(Classifier, "classify", note)
    run = RUN.model_copy(update={"precision": "float32" if precision == "bf16" else "bf16"})
    run_task(TASK.model_copy(update={"precision": precision}), made, tmp_path, run)
    assert training.plan.precision == precision and set(halved) == {precision == "bf16"}


def test_each_layer_learns_at_its_own_rate(made: dict[str, Path], tmp_path: Path) -> None:
    """AdamW's first step is as long as the learning rate, whatever the gradient: it shows each block's share."""
    steps = {"epochs": 1, "batch_size": 15, "warmup_epochs": 0, "weight_decay": 0.0, "clip_grad": None}
    task = fine_tuning({"flip": False}, steps, layer_decay=0.5, label_smoothing=0.0)
    run_task(task, made, tmp_path)
    before = dict(zoo.load_encoder(made["weights"]).named_parameters())
    after = dict(zoo.load_encoder(tmp_path / "classifier.safetensors").named_parameters())
    depth = len({name.split(".")[1] for name in before if name.startswith("blocks.")})
    moved = [
        max((after[name] - before[name]).abs().max().item() for name in before if name.startswith(f"blocks.{block}."))
        for block in range(depth)
    ]
    assert moved == pytest.approx([0.05 * 15 / 256 * 0.5 ** (depth - block) for block in range(depth)], rel=0.02)
