"""Linear probe and fine-tuning on small shards whose labels are colours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_clips import make_run, make_shard
from torch import nn
from torch.nn import functional

from stm.config import Augmentation, FineTune, LinearProbe, PretrainRun
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.evaluation import evaluate
from stm.evaluation.features import run_over
from stm.evaluation.finetune import Classifier
from stm.evaluation.linear import hold_out, train_head
from stm.models import zoo
from stm.models.vit import VideoEncoder
from stm.training import pretrain
from stm.training.optimizer import build_optimizer

LABELS = ["red", "green", "blue"]
RUN = make_run(optimisation={"epochs": 0})
PROBE = LinearProbe(task="linear", epochs=40, batch_size=8, views=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    train = make_shard(folder / "train" / "train-00000.parquet", LABELS * 5, seed=0, prefix="train")
    test = make_shard(folder / "test" / "test-00000.parquet", LABELS * 3, seed=1, prefix="test")
    pretrain(RUN, [train], folder / "run", 3, "cpu")
    return {"train": train, "test": test, "weights": folder / "run" / "weights.safetensors"}


def run_task(
    task: LinearProbe | FineTune, made: dict[str, Path], output: Path, run: PretrainRun = RUN, seed: int = 3
) -> dict[str, Any]:
    evaluate(task, run, made["weights"], [made["train"]], [made["test"]], output, seed, "cpu")
    return json.loads((output / "metrics.json").read_text())


def fine_tuning(**changes: object) -> FineTune:
    optimisation = {"epochs": 8, "batch_size": 5, "warmup_epochs": 1, "learning_rate": 0.05, "clip_grad": 1.0}
    values = {"task": "finetune", "augmentation": {"crop": "random_resized", "flip": True}, "views": 2, **changes}
    return FineTune.model_validate({**values, "optimisation": optimisation})


def test_a_probe_finds_colours_in_random_features(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = run_task(PROBE, made, tmp_path)
    assert metrics["top1"] > 0.7 and metrics["top5"] == 1.0 and metrics["top5_of"] == 3
    assert (metrics["train_clips"], metrics["test_clips"], metrics["classes"]) == (15, 9, 3)
    assert metrics["learning_rate"] in PROBE.learning_rates
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert table["key"] == [f"test-{n:03d}" for n in range(9)] and table["label"] == LABELS * 3
    right = [label == found for label, found in zip(table["label"], table["prediction"], strict=True)]
    assert np.mean(right) == pytest.approx(metrics["top1"])
    assert all(1 / 3 <= p <= 1 for p in table["probability"])


def test_the_same_arguments_give_the_same_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    for task in (PROBE, fine_tuning()):
        for name, workers in (("first", 0), ("second", 2)):
            run_task(task, made, tmp_path / task.task / name, RUN.model_copy(update={"workers": workers}))
        for file in ("metrics.json", "predictions.parquet"):
            first, second = (tmp_path / task.task / name / file for name in ("first", "second"))
            assert first.read_bytes() == second.read_bytes()


def test_fine_tuning_learns_colours(made: dict[str, Path], tmp_path: Path) -> None:
    metrics = run_task(fine_tuning(), made, tmp_path)
    assert metrics["top1"] > 0.7
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 24
    assert not (tmp_path / "checkpoints").exists()


def test_fine_tuning_goes_on_from_a_checkpoint_with_stochastic_depth(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, run = fine_tuning(drop_path=0.5), RUN.model_copy(update={"checkpoint_every": 7})
    expected = run_task(task, made, tmp_path / "straight", run)
    calls = 0

    def break_off(self: Classifier, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return original(self, batch)

    original = Classifier.forward
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Classifier, "forward", break_off)
        run_task(task, made, tmp_path / "broken", run)
    assert [p.stem for p in (tmp_path / "broken" / "checkpoints").glob("*.pt")] == ["step-000000007"]
    assert run_task(task, made, tmp_path / "broken", run) == expected


def test_unseen_and_missing_test_labels_are_counted_and_said(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [*LABELS, "violet", None, None]
    test = make_shard(tmp_path / "test" / "test-00000.parquet", labels, seed=1, prefix="test")
    metrics = run_task(PROBE, {**made, "test": test}, tmp_path / "out")
    assert (metrics["test_clips"], metrics["unseen_clips"], metrics["unlabelled_clips"]) == (4, 1, 2)
    assert metrics["unseen_labels"] == ["violet"]
    assert metrics["top1"] <= 0.75 and metrics["top5"] == 0.75  # the unseen one can never be right
    said = capsys.readouterr().err
    assert "counted as wrong: violet" in said and "2 of 6 clips of the test split have no label" in said


@pytest.mark.parametrize("task", [PROBE, fine_tuning()], ids=["linear", "finetune"])
@pytest.mark.parametrize(("split", "name"), [("train", "training"), ("test", "test")])
def test_splits_without_labels_are_refused(
    made: dict[str, Path], tmp_path: Path, task: LinearProbe, split: str, name: str
) -> None:
    bare = make_shard(tmp_path / split / "x-00000.parquet", [None, None], prefix="bare")
    with pytest.raises(ValueError, match=f"none of the 2 clips of the {name} split has a label"):
        run_task(task, {**made, split: bare}, tmp_path / "out")


def test_one_class_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    bare = make_shard(tmp_path / "train" / "x-00000.parquet", ["red", "red"], prefix="bare")
    with pytest.raises(ValueError, match="all training clips have the label 'red'"):
        run_task(PROBE, {**made, "train": bare}, tmp_path / "out")


def test_weights_of_another_architecture_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"patch_size 16 instead of 8"):
        run_task(PROBE, made, tmp_path, make_run(patch_size=8))


def test_the_probe_learns_from_training_clips_alone(made: dict[str, Path], tmp_path: Path) -> None:
    """Other test clips change neither the learning rate nor what is predicted for a clip."""
    first = run_task(PROBE, made, tmp_path / "first")
    fewer = make_shard(tmp_path / "test" / "test-00000.parquet", LABELS, seed=1, prefix="test")
    second = run_task(PROBE, {**made, "test": fewer}, tmp_path / "second")
    assert first["learning_rates"] == second["learning_rates"]
    tables = [pq.read_table(tmp_path / n / "predictions.parquet").to_pylist() for n in ("first", "second")]
    for one, two in zip(tables[0], tables[1], strict=False):
        assert one["prediction"] == two["prediction"]
        assert one["probability"] == pytest.approx(two["probability"], rel=1e-4)


def test_features_are_the_mean_over_all_tokens_of_each_view(made: dict[str, Path]) -> None:
    encoder = zoo.load_encoder(made["weights"]).eval()
    dataset = ClipDataset([made["test"]], Geometry.of(RUN), Augmentation(), 0, False, 3, guides=())
    found = run_over(encoder.forward_features, dataset, torch.device("cpu"), what="features")
    assert found.shape == (9, 3, encoder.architecture.width)
    sample = dataset[4][2]
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(sample["video"])[None]).mean(1)[0]
    np.testing.assert_allclose(found[4, 2], expected, rtol=1e-4, atol=1e-5)


def test_a_fifth_of_each_class_is_held_out() -> None:
    targets = np.repeat([0, 1, 2], [50, 25, 10])
    held = hold_out(targets, seed=1)
    assert [int(held[targets == c].sum()) for c in range(3)] == [10, 5, 2]
    assert not (held == hold_out(targets, seed=2)).all()
    assert hold_out(np.array([0, 1]), seed=1).sum() == 1


def test_the_head_separates_what_is_separable_and_has_no_scale() -> None:
    rng = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    features = torch.randn(60, 8, generator=rng) + 4 * functional.one_hot(targets, 8)
    head = train_head(features, targets, 3, 1e-2, PROBE, seed=0)
    assert (head(features).argmax(1) == targets).float().mean() > 0.95
    # Batch norm takes out any scale and shift of a feature.
    scaled = train_head(features * 100 + 7, targets, 3, 1e-2, PROBE, seed=0)
    torch.testing.assert_close(scaled(features * 100 + 7), head(features), rtol=1e-2, atol=1e-2)
    assert [name for name, _ in head.named_parameters()] == ["1.weight", "1.bias"]


def encoder_of_run() -> VideoEncoder:
    torch.manual_seed(0)
    return zoo.build(RUN).encoder


def test_no_batch_of_the_probe_is_a_single_clip() -> None:
    task = LinearProbe(task="linear", epochs=1, batch_size=1)
    head = train_head(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0]), 2, 1e-3, task, seed=0)
    assert head(torch.randn(3, 4)).isfinite().all()


def test_the_classifier_is_mean_norm_and_a_head_near_zero() -> None:
    encoder = encoder_of_run()
    classifier = Classifier(encoder, 5).eval()
    video = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    assert classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    assert classifier.classify(video).softmax(-1).sub(0.2).abs().max() < 1e-3
    pooled = encoder(video, final_norm=False).mean(1)
    expected = nn.functional.layer_norm(pooled, pooled.shape[1:], eps=1e-6) @ classifier.head.weight.T
    torch.testing.assert_close(classifier.classify(video), expected)


def test_the_loss_leaves_out_clips_without_a_label() -> None:
    classifier = Classifier(encoder_of_run(), 3, label_smoothing=0.1).eval()
    nn.init.normal_(classifier.head.weight)
    video = torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        losses = classifier({"video": video, "label": torch.tensor([2, -1, 0])})
        logits = classifier.classify(video)[[0, 2]]
        nothing = classifier({"video": video, "label": torch.tensor([-1, -1, -1])})
    # Smoothing by its definition: 0.9 of the weight on the label, 0.1 spread over all classes.
    target = 0.9 * functional.one_hot(torch.tensor([2, 0]), 3) + 0.1 / 3
    torch.testing.assert_close(losses["loss"], -(target * logits.log_softmax(1)).sum(1).mean())
    assert nothing["loss"] == 0 and nothing["top1"] == 0


def test_layer_decay_reaches_every_part_of_the_classifier() -> None:
    classifier = Classifier(encoder_of_run(), 3)
    depth = classifier.encoder.architecture.depth
    optimizer = build_optimizer(classifier, fine_tuning().optimisation, layer_decay=0.5, depth=depth)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in classifier.named_parameters():
        if not parameter.requires_grad:
            assert name.startswith("encoder.norm.")
            continue
        part = name.split(".")
        layer = depth + 1
        if part[0] == "encoder":
            layer = 0 if part[1] == "embedding" else int(part[2]) + 1
        assert scales[id(parameter)] == pytest.approx(0.5 ** (depth + 1 - layer)), name
