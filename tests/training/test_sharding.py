"""FSDP: two processes that share a model learn what two do that each hold it, and what one learns from the joined batch."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from joined import Values, run_joined
from made_language import make_small_bert
from safetensors.numpy import load_file
from sharded import LANGUAGE, RUNS, break_off, run_of, train, work

from stm.training.distributed import Process
from stm.training.sharding import find_blocks

pytestmark = pytest.mark.slow
ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def bert(folder: Path) -> str:
    return make_small_bert(folder / "bert")


@pytest.fixture(scope="module")
def two(folder: Path, bert: str) -> Values:
    """What the first of two processes has at the end of each run."""
    break_off(run_of("contrast", bert), folder / "alone", ALONE, "ddp")
    first, second = run_joined(partial(work, folder=folder, bert=bert), folder)
    assert second == {}
    return first


def select(values: Values, prefix: str) -> Values:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def check_curve(found: Values, expected: Values, tolerance: float) -> None:
    for name in ("loss", "norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def check_equal(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", [*RUNS, *LANGUAGE])
def test_sharing_the_model_changes_nothing_but_rounding(two: Values, name: str) -> None:
    shared, held = select(two, f"{name}/fsdp/"), select(two, f"{name}/ddp/")
    assert len(shared["loss"]) == 6 and shared.keys() == held.keys()
    # Only the norms of the blocks are rounded elsewhere in bf16.
    check_curve(shared, held, 2e-2 if name == "bf16" else 1e-5)


@pytest.mark.parametrize("name", ["mae", "contrast", "observed", "contrast only", "accumulated"])
def test_two_processes_learn_what_one_does(two: Values, name: str, bert: str, tmp_path: Path) -> None:
    alone = train(run_of(name, bert), tmp_path, ALONE, "fsdp")
    assert len(set(alone["loss"])) == 6
    for parallel in ("ddp", "fsdp"):
        check_curve(select(two, f"{name}/{parallel}/"), alone, 1e-5)


@pytest.mark.parametrize("name", ["mae", "contrast", "umt"])
def test_what_is_written_is_the_whole_model(two: Values, name: str, folder: Path) -> None:
    shared, held = (load_file(folder / f"{name}-{parallel}" / "weights.safetensors") for parallel in ("fsdp", "ddp"))
    assert {k: (v.shape, v.dtype) for k, v in shared.items()} == {k: (v.shape, v.dtype) for k, v in held.items()}
    for key, value in shared.items():
        np.testing.assert_allclose(value, held[key], atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["contrast", "stm"])
def test_a_run_that_died_ends_bit_for_bit_as_one_that_did_not(two: Values, name: str) -> None:
    check_equal(select(two, f"{name}/resumed/"), select(two, f"{name}/fsdp/"))


def test_a_checkpoint_goes_from_two_processes_to_one_and_back(
    two: Values, folder: Path, bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = select(two, "contrast/fsdp/")
    check_curve(select(two, "contrast/from one/"), straight, 1e-5)
    alone = train(run_of("contrast", bert), folder / "contrast-left", ALONE, "ddp", seed=99)
    assert "goes on after step 2 of 6, with 1 processes instead of 2" in capsys.readouterr().err
    check_curve(alone, straight, 1e-5)


def test_the_blocks_are_the_transformers_layers(bert: str) -> None:
    from stm.methods import build_method

    kinds = [type(block).__name__ for block in find_blocks(build_method(run_of("umt", bert), 96))]
    depth = len(build_method(run_of("mae", bert)).model.encoder.blocks)
    assert kinds.count("Block") == depth and kinds.count("BertLayer") == 3 and len(kinds) == depth + 3
