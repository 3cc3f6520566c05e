"""Linear probe, and what it shares with fine-tuning, on small shards whose labels are colours."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from color_clips import LABELS, PROBE, RUN, fine_tuning, make_splits, run_task
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from training_shards import make_run, make_shard

from stm.config import Augmentation, LinearProbe
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.distributed.process import Process
from stm.evaluation.classification.linear import hold_out, train_head
from stm.evaluation.features import run_over
from stm.models.weights import zoo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_splits(tmp_path_factory.mktemp("evaluation"))


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
    found = run_over(encoder.forward_features, dataset, Process(0, 1, torch.device("cpu")), what="features")
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


@given(st.lists(st.integers(0, 40), min_size=2, max_size=60), st.integers(0, 100))
def test_no_class_loses_all_its_clips_to_the_choice(labels: list[int], seed: int) -> None:
    targets = np.array(labels)
    if len(set(labels)) == len(labels):
        with pytest.raises(ValueError, match="each class has a single training clip"):
            hold_out(targets, seed)
        return
    held = hold_out(targets, seed)
    assert set(targets[~held]) == set(labels)
    spare = sum(labels.count(label) for label in set(labels) if labels.count(label) > 1)
    assert held.sum() == -(-spare // 5)


def test_a_single_learning_rate_is_not_chosen(made: dict[str, Path], tmp_path: Path) -> None:
    train = make_shard(tmp_path / "train" / "train-00000.parquet", LABELS, prefix="train")
    metrics = run_task(PROBE.model_copy(update={"learning_rates": (0.01,)}), {**made, "train": train}, tmp_path)
    assert metrics["learning_rate"] == 0.01 and metrics["learning_rates"] == []


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


def test_no_batch_of_the_probe_is_a_single_clip() -> None:
    task = LinearProbe(task="linear", epochs=1, batch_size=1)
    head = train_head(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0]), 2, 1e-3, task, seed=0)
    assert head(torch.randn(3, 4)).isfinite().all()


def test_a_task_may_have_a_sampling_and_a_stride_of_its_own(made: dict[str, Path], tmp_path: Path) -> None:
    same = run_task(PROBE, made, tmp_path / "same")
    for changes in ({"stride": 2}, {"sampling": "tsn"}):
        run_task(PROBE.model_copy(update=changes), made, tmp_path / "other")
        tables = [pq.read_table(tmp_path / name / "predictions.parquet").to_pydict() for name in ("same", "other")]
        assert tables[0]["key"] == tables[1]["key"] and tables[0]["probability"] != tables[1]["probability"]
    assert same["settings"]["stride"] is None
