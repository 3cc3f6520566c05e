"""How long objects stay kept: closed forms, brute force, and masks of runs on clips with known boxes."""

import json
from itertools import combinations, product
from math import comb
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clip_metrics import check_clip_values
from language_runs import make_batch
from language_runs import make_run as language_run
from training_shards import make_run, make_shard

from stm.config import ConfigError, MaskPersistence, PretrainRun, parse_config
from stm.data.geometry import Geometry
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.masks.kept_objects import make_masker
from stm.evaluation.masks.persistence import (
    ClipCounts,
    average,
    bootstrap_ratio,
    count_kept,
    expect_random,
    object_tokens,
)
from stm.masking import get_strategy, to_boolean
from stm.methods import build_method
from stm.models.weights import zoo
from stm.storage.tables import write_table
from stm.training.pretraining import pretrain

SIDE, SLOTS = 4, 6
TOKENS = SIDE**2
CLIPS = 300


def on_tokens(*slots: tuple[int, ...]) -> np.ndarray:
    """[slots, TOKENS]: an object on the given tokens of each slot."""
    on = np.zeros((len(slots), TOKENS), bool)
    for slot, tokens in enumerate(slots):
        on[slot, list(tokens)] = True
    return on


def draw(strategy: str, ratio: float, slots: int = SLOTS, clips: int = CLIPS) -> np.ndarray:
    """Masks of a strategy that needs no guide: bool [clips, slots, TOKENS], True: hidden."""
    noise = torch.rand(clips, slots, TOKENS, generator=torch.Generator().manual_seed(0))
    return to_boolean(get_strategy(strategy)({"noise": noise}, ratio), slots, TOKENS).numpy()


def counts_of(on: np.ndarray, masks: np.ndarray) -> list[ClipCounts]:
    counts = [count_kept(on, mask) for mask in masks]
    return [count for count in counts if count is not None]


# --------------------------------------------------------------------------------------------- tokens on an object


def test_a_token_lies_on_an_object_that_covers_half_of_it() -> None:
    # Columns 1 and 2 of row 1 wholly, column 3 by 0.6, row 2 by 0.4.
    box = np.array([[0.25, 0.25, 0.75 + 0.6 / 4, 0.5 + 0.4 / 4]])
    assert np.flatnonzero(object_tokens(box, 4)[0]).tolist() == [5, 6, 7]


def test_an_object_smaller_than_a_token_lies_on_those_that_it_covers_most() -> None:
    inside, between = [0.30, 0.30, 0.35, 0.35], [0.45, 0.30, 0.55, 0.35]
    on = object_tokens(np.array([inside, between, [0.7, 0.3, 0.7, 0.9]]), 4)
    assert [np.flatnonzero(row).tolist() for row in on] == [[5], [5, 6], []]


def test_a_slot_of_several_frames_counts_their_mean() -> None:
    left, right, none = [0, 0, 0.25, 0.25], [0.25, 0, 0.5, 0.25], [0, 0, 0, 0]
    on = object_tokens(np.array([left, right, left, none, right, right]), 4, tubelet=2)
    assert [np.flatnonzero(row).tolist() for row in on] == [[0, 1], [0], [1]]


def test_tokens_that_float32_boxes_cover_alike_lie_on_the_object_alike() -> None:
    """A small object inside another token in each frame of a slot: both tokens, whatever rounding makes of its sides."""
    rng = np.random.default_rng(0)
    for left, top in rng.uniform(0, 0.05, (20, 2)):
        boxes = np.array([[0.25 + left, 0.25 + top, 0.42 + left, 0.42 + top], [0.5, 0.5, 0.67, 0.67]], dtype=np.float64)
        boxes = (160 * boxes).astype(np.float32).astype(np.float64) / 160
        assert np.flatnonzero(object_tokens(boxes, 4, tubelet=2)[0]).tolist() == [5, 10]


# --------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("ratio", [0.75, 0.85, 0.9])
def test_a_tube_keeps_what_does_not_move_always_or_never(ratio: float) -> None:
    counts = counts_of(on_tokens(*[(5, 6)] * SLOTS), draw("tube", ratio))
    assert {count.share for count in counts} == {0.0, 1.0}
    found = average(counts)
    assert found.persistence == 1 and found.by_lag == [1.0] * SLOTS
    kept = TOKENS - int(ratio * TOKENS)
    assert found.kept_share == pytest.approx(1 - comb(TOKENS - 2, kept) / comb(TOKENS, kept), abs=0.08)


@pytest.mark.parametrize("ratio", [0.75, 0.85, 0.9])
def test_random_masks_keep_an_object_of_n_tokens_with_the_hypergeometric_probability(ratio: float) -> None:
    """Also after they have kept it: they do not remember. 1 - r^n is the same for many tokens."""
    on = on_tokens((0,), (1, 2), (5, 6, 9), (5, 6, 9), (1, 2), (0,))
    kept = TOKENS - int(ratio * TOKENS)
    by_size = {n: 1 - comb(TOKENS - n, kept) / comb(TOKENS, kept) for n in (1, 2, 3)}
    expected = expect_random(on, kept)
    assert expected is not None
    assert expected.share == pytest.approx(np.mean([by_size[n] for n in (1, 2, 3, 3, 2, 1)]))
    found = average(counts_of(on, draw("random", ratio, clips=4000)))
    assert found.kept_share == pytest.approx(expected.share, abs=0.015)
    assert found.persistence == pytest.approx(average([expected]).persistence, abs=0.02)
    still = expect_random(on_tokens(*[(4,)] * SLOTS), kept)
    assert still is not None and average([still]).by_lag[1:] == pytest.approx([by_size[1]] * 5)
    many = np.zeros((2, 10_000), bool)
    many[:, :3] = True
    large = expect_random(many, 10_000 - int(ratio * 10_000))
    assert large is not None and large.share == pytest.approx(1 - ratio**3, abs=1e-3)


def test_random_masks_by_all_masks_there_are() -> None:
    """Every pair of masks of two slots that keep 2 of 5 tokens."""
    on = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]], bool)
    choices = [np.isin(np.arange(5), kept, invert=True) for kept in combinations(range(5), 2)]
    found = average(counts_of(on, np.array(list(product(choices, repeat=2)))))
    expected = expect_random(on, 2)
    assert expected is not None
    assert found.kept_share == pytest.approx(expected.share) and expected.share == pytest.approx((7 / 10 + 4 / 10) / 2)
    assert found.persistence == pytest.approx(average([expected]).persistence) and found.persistence == pytest.approx(
        4 / 10
    )


def test_counts_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    clips, pairs = [], [[0, 0] for _ in range(SLOTS)]
    shares = []
    for _ in range(50):
        on, hidden = rng.random((SLOTS, TOKENS)) < 0.1, rng.random((SLOTS, TOKENS)) < 0.6
        on[rng.integers(SLOTS)] = False
        counted = count_kept(on, hidden)
        if counted is None:
            continue
        clips.append(counted)
        seen = [slot for slot in range(SLOTS) if on[slot].any()]
        kept = {slot for slot in seen if any(on[slot, token] and not hidden[slot, token] for token in range(TOKENS))}
        shares.append(len(kept) / len(seen))
        for first, later in product(seen, seen):
            if first in kept and later >= first:
                pairs[later - first][1] += 1
                pairs[later - first][0] += later in kept
    found = average(clips)
    assert found.kept_share == pytest.approx(np.mean(shares))
    assert found.by_lag == pytest.approx([again / before for again, before in pairs])
    assert found.persistence == pytest.approx(sum(p[0] for p in pairs[1:]) / sum(p[1] for p in pairs[1:]))
    low, high = bootstrap_ratio(clips) or (1, 0)
    assert low < found.persistence < high and high - low < 0.3


def test_clips_without_the_object_do_not_count_and_objects_that_are_never_kept_have_no_persistence() -> None:
    assert count_kept(on_tokens((), ()), np.ones((2, TOKENS), bool)) is None
    assert expect_random(on_tokens((), ()), 4) is None
    never = count_kept(on_tokens((3,), (3,)), np.ones((2, TOKENS), bool))
    assert never is not None and never.share == 0
    assert np.isnan(average([never]).persistence) and bootstrap_ratio([never]) is None


# ------------------------------------------------------------------------------------------------------- the task


def write_boxes(folder: Path, keys: list[str], stored: int) -> tuple[Path, Path]:
    """The truth and the frames' table of clips whose object stays on the top left quarter of the frame."""
    boxes = np.tile([0.0, 0.0, 20.0, 16.0], (2 * stored, 1)).astype(np.float32)
    rows = [
        {
            "video_id": key,
            "split": "test",
            "camera": "fixed",
            "boxes": boxes.ravel().tolist(),
            "width": 40,
            "height": 32,
        }
        for key in keys
    ]
    write_table(folder / "truth.parquet", pa.Table.from_pylist(rows), {})
    frames = [
        {"key": key, "video_id": key, "kept": True, "decode_index": list(range(0, 2 * stored, 2))} for key in keys
    ]
    write_table(folder / "frames.parquet", pa.Table.from_pylist(frames), {})
    return folder / "truth.parquet", folder / "frames.parquet"


def measure(folder: Path, run: PretrainRun, **task: object) -> dict:
    index = make_shard(folder / "test/test-00000.parquet", ["red"] * 5, 0, "test")
    truth, frames = write_boxes(folder, [f"test-{number:03d}" for number in range(5)], 6)
    inputs = EvaluationInputs(
        folder / "none.safetensors", [index], folder / "out", 3, truth=truth, frames=[frames], device="cpu"
    )
    # The weights are not read, but hashed for the receipt.
    inputs.weights.write_bytes(b"")
    evaluate(MaskPersistence.model_validate({"task": "mask_persistence", **task}), run, inputs)
    check_clip_values(folder / "out")
    return json.loads((folder / "out/metrics.json").read_text())


def test_a_run_s_masks_are_measured_at_any_ratio(tmp_path: Path) -> None:
    """16 x 16 pixels, 4 x 4 tokens, of which the object covers 2 x 2 in every slot."""
    found = measure(tmp_path, make_run(mask={"strategy": "tube", "ratio": 0.5}), ratio=0.9)
    slots = found["slots"]
    assert found["persistence"] in (1.0, None) and found["by_lag"][0] in (1.0, None) and len(found["by_lag"]) == slots
    assert found["ratio"] == 0.9 and found["clips"] == 5 and found["headline"]["name"] == "kept_share"
    tokens = (make_run().image_size // make_run().patch_size) ** 2
    on, kept = tokens // 4, tokens - int(0.9 * tokens)
    assert found["chance"]["kept_share"] == pytest.approx(1 - comb(tokens - on, kept) / comb(tokens, kept))
    assert found["headline"]["chance"] == found["chance"]["kept_share"]
    assert {"task", "settings", "receipt"} <= set(found)


def test_counts_of_clips_give_the_metrics(tmp_path: Path) -> None:
    found = measure(tmp_path, make_run(mask={"strategy": "random", "ratio": 0.5}), ratio=0.7)
    table = {
        name: np.array(column) for name, column in pq.read_table(tmp_path / "out/kept.parquet").to_pydict().items()
    }
    assert table["key"].tolist() == [f"test-{number:03d}" for number in range(5)]
    assert found["kept_share"] == np.mean(table["kept"] / table["visible"])
    assert found["persistence"] == table["again"].sum() / table["before"].sum() and 0 < found["persistence"] < 1


def test_a_mask_that_hides_less_keeps_everything(tmp_path: Path) -> None:
    found = measure(tmp_path, make_run(mask={"strategy": "random", "ratio": 0.5}), ratio=0.05)
    assert found["kept_share"] == found["persistence"] == 1.0 and set(found["by_lag"]) == {1.0}


def test_other_datasets_have_no_boxes() -> None:
    run = {"model": "tiny", "image_size": 32, "patch_size": 8, "frames": 4}
    values = {
        "name": "mine",
        "dataset": {"source": "folder", "root": "videos"},
        "pretrain": {"tube": run},
        "evaluate": {"kept": {"task": "mask_persistence"}},
    }
    with pytest.raises(ConfigError, match="true boxes, which only moving-shapes has"):
        parse_config(values)
    shapes = {"source": "moving-shapes", "clips": {"train": 4, "test": 2}}
    assert parse_config({**values, "dataset": shapes}).evaluations() == [("tube", "kept")]
    with pytest.raises(ConfigError, match="at least two of them"):
        parse_config({**values, "dataset": shapes, "evaluate": {"kept": {"task": "mask_persistence", "frames": 3}}})


@pytest.mark.parametrize(
    ("method", "strategy"), [("umt", "attention"), ("umt", "cluster"), ("umt", "tube"), ("stm", "spatiotemporal")]
)
def test_masks_are_those_of_the_method(method: str, strategy: str, tmp_path: Path) -> None:
    run = language_run(
        method, None, mask={"strategy": strategy, "ratio": 0.5}, optimisation={"epochs": 0, "warmup_epochs": 0}
    )
    index = make_shard(tmp_path / "train/train-00000.parquet", ["red"] * 4, 0, "train")
    pretrain(run, [index], tmp_path / "run", 0, "cpu")
    batch = make_batch(3)
    masker = make_masker(run, tmp_path / "run/weights.safetensors", Geometry.of(run), torch.device("cpu"))
    built = build_method(run).eval()
    assert built.teacher is not None
    if method == "stm":
        state, _ = zoo.load_extra(tmp_path / "run/weights.safetensors", "branch")
        built.branch.load_state_dict(state)
    with torch.no_grad():
        kept, _ = built.branch.mask(batch, built.teacher(batch["video"]))
        assert torch.equal(masker(batch), to_boolean(kept, 4, 16))
