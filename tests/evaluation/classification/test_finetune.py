"""Fine-tuning on small shards whose labels are colours."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from color_clips import LABELS, RUN, fine_tuning, make_splits, run_task
from torch import nn
from torch.nn import functional
from training_shards import make_shard

from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader
from stm.evaluation.classification.clips import LabelledClips
from stm.evaluation.classification.finetune import Classifier, load_head
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_splits(tmp_path_factory.mktemp("evaluation"))


def encoder_of_run() -> VideoEncoder:
    torch.manual_seed(0)
    return zoo.build(RUN).encoder


@pytest.mark.parametrize("augmentation", [{}, {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}], ids=["plain", "mixed"])
def test_fine_tuning_learns_colours(made: dict[str, Path], tmp_path: Path, augmentation: dict[str, float]) -> None:
    metrics = run_task(fine_tuning(augmentation), made, tmp_path)
    assert metrics["top1"] > 0.7
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 24
    assert not (tmp_path / "checkpoints").exists()


def test_fine_tuning_goes_on_from_a_checkpoint_with_all_that_is_random(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixup and cutmix, RandAugment, erasing, stochastic depth and dropout, with two passes a step."""
    task = fine_tuning(
        {"auto_augment": "rand-m7-n4-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0},
        {"batch_size": 6, "accumulate": 2, "epochs": 5},
        drop_path=0.5,
        head_dropout=0.5,
    )
    run = RUN.model_copy(update={"checkpoint_every": 3})
    expected = run_task(task, made, tmp_path / "straight", run)
    calls = 0

    def break_off(self: Classifier, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        assert "pixel_weights" in batch
        return original(self, batch)

    original = Classifier.forward
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Classifier, "forward", break_off)
        run_task(task, made, tmp_path / "broken", run)
    assert [p.stem for p in (tmp_path / "broken" / "checkpoints").glob("*.pt")] == ["step-000000003"]
    assert run_task(task, made, tmp_path / "broken", run) == expected
    for file in ("classifier.safetensors", "predictions.parquet"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_the_classifier_is_mean_norm_and_a_head_near_zero() -> None:
    encoder = encoder_of_run()
    classifier = Classifier(encoder, 5).eval()
    video = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    assert classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    assert classifier.classify(video).softmax(-1).sub(0.2).abs().max() < 1e-3
    pooled = encoder(video, final_norm=False).mean(1)
    expected = nn.functional.layer_norm(pooled, pooled.shape[1:], eps=1e-6) @ classifier.head.weight.T
    torch.testing.assert_close(classifier.classify(video), expected)


def test_the_loss_is_smoothed_cross_entropy() -> None:
    classifier = Classifier(encoder_of_run(), 3, label_smoothing=0.1).eval()
    nn.init.normal_(classifier.head.weight)
    video = torch.randint(0, 256, (3, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        losses = classifier({"video": video, "label": torch.tensor([2, 1, 0])})
        logits = classifier.classify(video)
    # Smoothing by its definition: 0.9 of the weight on the label, 0.1 spread over all classes.
    target = 0.9 * functional.one_hot(torch.tensor([2, 1, 0]), 3) + 0.1 / 3
    torch.testing.assert_close(losses["loss"], -(target * logits.log_softmax(1)).sum(1).mean())
    assert losses["top1"] == pytest.approx((logits.argmax(1) == torch.tensor([2, 1, 0])).float().mean().item())


def test_the_loss_of_a_mixed_batch_is_that_of_mixed_pixels_and_targets() -> None:
    classifier = Classifier(encoder_of_run(), 3, label_smoothing=0.1).eval()
    nn.init.normal_(classifier.head.weight)
    video, label = torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8), torch.tensor([2, 1, 0, 0])
    share = 0.75  # a box of half the width and height
    weights = torch.ones(2, 32, 32)
    weights[0, 8:24, 16:], weights[1] = 0, 0
    weights[1, 8:24, 16:] = 1
    mixed = {"pixel_weights": weights, "label_weights": torch.tensor([share, 1 - share])}
    with torch.inference_mode():
        losses = classifier({"video": video, "label": label, **mixed})
        pasted = video.clone()
        pasted[..., 8:24, 16:] = video.flip(0)[..., 8:24, 16:]
        logits = classifier.classify(pasted)
    target = 0.9 * functional.one_hot(label, 3) + 0.1 / 3
    target = share * target + (1 - share) * target.flip(0)
    torch.testing.assert_close(losses["loss"], -(target * logits.log_softmax(1)).sum(1).mean())
    assert set(losses) == {"loss"}


def test_clips_without_a_label_are_not_trained_on(made: dict[str, Path], tmp_path: Path) -> None:
    train = make_shard(tmp_path / "train" / "x-00000.parquet", [None, "red", None, "blue", "red"], prefix="train")
    clips = LabelledClips([train], Geometry.of(RUN), Augmentation(), 0, True, repeats=2, guides=())
    assert len(clips) == 3 and clips.labels().tolist() == [-1, 1, -1, 0, 1]
    assert [(s["key"], s["label"]) for s in clips[3, 1]] == [("train-003", 0)] * 2
    keys = [key for batch in ClipLoader(clips, 1, shuffle=True).batches(0) for key in batch["key"]]
    assert sorted(keys) == sorted(["train-001", "train-003", "train-004"] * 2)
    metrics = run_task(fine_tuning(optimisation={"batch_size": 3, "epochs": 2}), {**made, "train": train}, tmp_path)
    assert metrics["train_clips"] == 3


def test_dropout_is_before_the_head_and_only_in_training() -> None:
    classifier = Classifier(encoder_of_run(), 3, head_dropout=0.5)
    nn.init.normal_(classifier.head.weight)
    seen: list[torch.Tensor] = []
    classifier.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    video = torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        classifier.train().classify(video)
        classifier.eval().classify(video)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7 and (seen[1] != 0).all()
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], 2 * seen[1][kept])


def test_repeats_share_the_batch_and_views_and_crops_the_answer(made: dict[str, Path], tmp_path: Path) -> None:
    """15 clips with two samples each are five batches of 6 samples."""
    task = fine_tuning({"mixup": 0.8}, {"batch_size": 6, "epochs": 2}, repeats=2, crops=3)
    run_task(task, made, tmp_path)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    label, classifier = read_classifier(tmp_path / "classifier.safetensors")
    assert label == sorted(LABELS)
    clips = ClipDataset([made["test"]], Geometry.of(RUN, task), Augmentation(), 0, False, 2, guides=(), crops=3)
    table = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    for number in (0, 8):
        video = torch.from_numpy(np.stack([view["video"] for view in clips[number]]))
        assert len(video) == 6
        with torch.inference_mode():
            probability, place = classifier.eval().classify(video).softmax(1).mean(0).max(0)
        assert table["prediction"][number] == label[int(place)]
        assert table["probability"][number] == pytest.approx(float(probability), rel=1e-4)


def read_classifier(path: Path) -> tuple[list[str], Classifier]:
    weights = zoo.read(path)
    classifier = Classifier(zoo.load_encoder(path), weights.classes)
    classifier.load_state_dict(dict(weights.tensors))
    assert weights.labels is not None
    return list(weights.labels), classifier


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["green", "black", "blue", "red", "white"], [2, 0, 3]),  # by name
        (None, [0, 1, 2]),  # a release without names begins with these classes
    ],
)
def test_a_head_starts_from_the_rows_of_a_release(names: list[str] | None, rows: list[int], tmp_path: Path) -> None:
    release, own = Classifier(encoder_of_run(), 5), Classifier(encoder_of_run(), 3)
    for parameter in (*release.fc_norm.parameters(), *release.head.parameters()):
        nn.init.normal_(parameter)
    zoo.save(release, tmp_path / "classifier.safetensors", labels=names)
    load_head(own, tmp_path / "classifier.safetensors", ["blue", "green", "red"])
    assert torch.equal(own.head.weight, release.head.weight[rows]) and torch.equal(
        own.head.bias, release.head.bias[rows]
    )
    assert torch.equal(own.fc_norm.weight, release.fc_norm.weight) and torch.equal(
        own.fc_norm.bias, release.fc_norm.bias
    )


@pytest.mark.parametrize(("names", "lacking"), [(["green", "black"], "'blue'"), (None, "'red'")])
def test_a_release_without_all_classes_is_refused(names: list[str] | None, lacking: str, tmp_path: Path) -> None:
    zoo.save(Classifier(encoder_of_run(), 2), tmp_path / "classifier.safetensors", labels=names)
    with pytest.raises(zoo.WeightsError, match=f"2 classes, without .* of the 3 training labels, such as {lacking}"):
        load_head(Classifier(encoder_of_run(), 3), tmp_path / "classifier.safetensors", ["blue", "green", "red"])


def test_fine_tuning_starts_from_a_release_s_head(made: dict[str, Path], tmp_path: Path) -> None:
    """With a rate of almost 0 the classifier stays where it starts."""
    release = Classifier(zoo.load_encoder(made["weights"]), len(LABELS))
    nn.init.normal_(release.head.weight)
    zoo.save(release, tmp_path / "release.safetensors", labels=sorted(LABELS))
    rates = {"epochs": 1, "learning_rate": 1e-12, "min_learning_rate": 0.0, "warmup_epochs": 0}
    for initial_head, same in (("release", True), ("fresh", False)):
        task = fine_tuning(optimisation=rates, initial_head=initial_head)
        run_task(task, {**made, "weights": tmp_path / "release.safetensors"}, tmp_path / initial_head)
        head = zoo.read(tmp_path / initial_head / "classifier.safetensors").tensors["head.weight"]
        assert torch.allclose(head, release.head.weight, atol=1e-6) == same
    with pytest.raises(zoo.WeightsError, match="no classifier to start from: set initial_head to fresh"):
        run_task(fine_tuning(initial_head="release"), made, tmp_path / "none")


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
