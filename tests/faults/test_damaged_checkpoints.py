"""Every damage to a checkpoint is detected, and the previous checkpoint is used."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damage_bytes
from trial import Tally, deadline

from stm.training.checkpoint import Checkpoints

FILES = ("step-000000010.pt", "step-000000010.pt.sha256", "origin.json")


@pytest.mark.parametrize("count", [25, pytest.param(240, marks=pytest.mark.slow)])
def test_the_previous_checkpoint_is_used(count: int, tmp_path: Path, table: Callable[[Tally], None]) -> None:
    intact, folder = Checkpoints(tmp_path / "intact", {"seed": 1}, 2), tmp_path / "checkpoints"
    for step in (5, 10):
        intact.save(step, {"model": torch.full((50,), float(step))})
    rng, tally = np.random.default_rng(0), Tally("checkpoints")
    damages = {name: damage_bytes((intact.folder / name).read_bytes(), rng) for name in FILES}
    for number in range(count):
        name = FILES[number % len(FILES)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(intact.folder, folder)
        (folder / name).write_bytes(next(islice(damages[name], 1)).data)
        checkpoints = Checkpoints(folder, {"seed": 1}, 2)
        with deadline():
            step = checkpoints.newest()
        # The second word in the checksum's file is a file name, and origin.json is for human readers: nothing depends on either.
        assert step == 5 or (step == 10 and name != FILES[0]), name
        assert torch.equal(checkpoints.load(step)["model"], torch.full((50,), float(step)))
        tally.add("previous checkpoint used" if step == 5 else "no difference")
    table(tally)


def test_checkpoints_of_other_settings_are_moved_aside_even_if_their_origin_is_damaged(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "checkpoints", {"seed": 1}, 2).save(5, {})
    (tmp_path / "checkpoints/origin.json").write_bytes(b'{"seed"\xff')
    assert Checkpoints(tmp_path / "checkpoints", {"seed": 2}, 2).newest() == 0
    assert list(tmp_path.glob("checkpoints-of-*/step-000000005.pt"))
