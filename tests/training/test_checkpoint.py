"""Checkpoints: corrupt ones are noticed, others' are not used, the last few stay."""

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stm.distributed.process import Process
from stm.training.checkpoint import Checkpoints, random_state, restore_random_state

ORIGIN = {"run": {"model": "tiny", "mask": {"ratio": 0.9}}, "data": ["abc"], "seed": 1}
ALONE = Process(0, 1, torch.device("cpu"))


def store(folder: Path, kept: int = 2, origin: dict[str, object] = ORIGIN) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", origin, kept)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = {"model": {"weight": torch.randn(3, 4)}, "meter": {"loss": [2.0, torch.tensor(1.5)]}}
    store(tmp_path).save(200, saved)
    assert store(tmp_path).newest() == 200
    loaded = store(tmp_path).load(200)
    assert torch.equal(loaded["model"]["weight"], saved["model"]["weight"])
    assert loaded["meter"]["loss"][0] == 2.0 and loaded["step"] == 200


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    assert store(tmp_path).newest() == 0


def test_the_newest_few_stay(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, kept=2)
    for step in (5, 10, 15, 1000):
        checkpoints.save(step, {})
    assert checkpoints.steps() == [15, 1000]
    assert len(list(checkpoints.folder.glob("*.sha256"))) == 2


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(5, {"model": torch.ones(3)})
    command = ["sha256sum", "-c", "step-000000005.pt.sha256"]
    assert subprocess.run(command, cwd=checkpoints.folder, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("damage", ["short", "flipped", "no sum", "empty"])
def test_a_corrupt_checkpoint_is_noticed_and_the_one_before_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = store(tmp_path)
    for step in (5, 10):
        checkpoints.save(step, {"model": torch.full((50,), float(step))})
    path = checkpoints.folder / "step-000000010.pt"
    data = bytearray(path.read_bytes())
    if damage == "short":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "no sum":
        path.with_name(f"{path.name}.sha256").unlink()
    else:
        path.write_bytes(b"")
    assert store(tmp_path).newest() == 5
    assert "step-000000010.pt: corrupt" in capsys.readouterr().err
    assert store(tmp_path).load(5)["model"][0] == 5


def test_leftovers_of_a_killed_write_are_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(5, {})
    (checkpoints.folder / ".step-000000010.pt.123.tmp").write_bytes(b"half")
    assert store(tmp_path).newest() == 5
    assert not list(checkpoints.folder.glob(".*.tmp"))


def test_checkpoints_of_other_settings_are_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path).save(5, {})
    other = store(tmp_path, origin={**ORIGIN, "run": {"model": "tiny", "mask": {"ratio": 0.75}}})
    assert other.newest() == 0
    assert "changed: run.mask.ratio" in capsys.readouterr().err
    assert not other.folder.exists()
    assert list(tmp_path.glob("checkpoints-of-*/step-000000005.pt"))


def test_a_kill_while_checkpoints_are_put_aside_or_brought_back_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each rename in turn, and then tried again."""
    other = {**ORIGIN, "seed": 2}
    for number in range(12):
        folder = tmp_path / str(number)
        for step in (5, 10):
            store(folder).save(step, {"model": torch.full((3,), float(step))})
        (folder / "metrics.jsonl").write_text("log")
        for origin, expected in ((other, 0), (ORIGIN, 10)):
            renames = iter(range(number, -1, -1))
            replace = Path.replace

            def killed(self: Path, target: Path, renames: Any = renames, replace: Any = replace) -> Path:
                if next(renames, None) == 0:
                    raise KeyboardInterrupt
                return replace(self, target)

            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(Path, "replace", killed)
                store(folder, origin=origin).newest()
            assert store(folder, origin=origin).newest() == expected
        assert store(folder).load(10)["model"][0] == 10
        assert (folder / "metrics.jsonl").read_text() == "log"
        kept = [path.name for path in folder.rglob("step-*.pt")]
        assert sorted(kept) == ["step-000000005.pt", "step-000000010.pt"]


def files_of(folder: Path) -> dict[str, str]:
    """What lies beside the checkpoints of a run and belongs to them."""
    paths = [*folder.glob("metrics.jsonl"), *folder.glob("best.*"), *folder.glob("tensorboard/*")]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def write_files(folder: Path, seed: int, step: int) -> dict[str, str]:
    (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "best.json", "best.safetensors", f"tensorboard/events.{seed}.{step}"):
        (folder / name).write_text(f"of seed {seed}, step {step}")
    return files_of(folder)


@pytest.mark.parametrize("walk", range(2))
def test_settings_changed_to_and_fro_with_kills_at_any_moment_mix_nothing(
    tmp_path: Path, walk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while checkpoints are moved, and the next attempt has other settings, or the same."""
    rng = np.random.default_rng(walk)
    saved: dict[int, tuple[int, dict[str, str]]] = {}  # by seed: the newest step and the files at that time
    killed = 0
    changes = {name: getattr(Path, name) for name in ("replace", "unlink", "rmdir")}

    def kill_at(number: int) -> None:
        """Have the next attempt killed before one of its changes to the disk."""
        left = iter(range(number, -1, -1))

        def wrap(change: Any) -> Any:
            def changed(*arguments: Any, **options: Any) -> Any:
                if next(left, None) == 0:
                    raise KeyboardInterrupt
                return change(*arguments, **options)

            return changed

        for name, change in changes.items():
            monkeypatch.setattr(Path, name, wrap(change))

    for _ in range(150):
        seed = int(rng.integers(3))
        checkpoints = store(tmp_path, origin={**ORIGIN, "seed": seed})
        if rng.random() < 0.7:
            kill_at(int(rng.integers(25)))
        try:
            newest = checkpoints.newest()
        except KeyboardInterrupt:
            killed += 1
            continue
        finally:
            monkeypatch.undo()
        step, files = saved.get(seed, (0, {}))
        assert newest == step
        if step:
            assert files_of(tmp_path) == files
        else:  # as the log of a new run
            shutil.rmtree(tmp_path / "tensorboard", ignore_errors=True)
        if rng.random() < 0.5:
            checkpoints.save(step + 5, {})
            saved[seed] = (step + 5, write_files(tmp_path, seed, step + 5))
        elif not step:
            write_files(tmp_path, seed, 0)  # killed before its first checkpoint
    assert killed > 20 and len(saved) == 3


def test_loading_runs_no_code_from_the_file(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        checkpoints.save(5, {"model": Path("not a tensor")})
        checkpoints.load(5)


def test_random_numbers_go_on_where_they_were() -> None:
    torch.manual_seed(3)
    torch.rand(5)
    state = random_state(ALONE)
    expected = torch.rand(5)
    torch.rand(100)
    restore_random_state(state, ALONE)
    assert torch.equal(torch.rand(5), expected)
