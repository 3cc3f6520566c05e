"""Checkpoints of an unfinished run: a kill at any moment loses some steps, never the run.

A checkpoint is one file, `step-000000200.pt` (tensors, numbers and strings only, no pickled code), next to its
SHA-256 in the format of `sha256sum -c`. Both are written under temporary names and renamed, so each file is
complete or missing. Corruption, for instance by a power cut, is caught by the checksum; the previous checkpoint is then used.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stm.distributed.process import Process
from stm.storage.files import atomic_path, read_json, sha256_file, write_bytes, write_json
from stm.storage.receipts import hash_receipt
from stm.training.logs import say

State = dict[str, Any]
_NAME = re.compile(r"step-(\d{9})\.pt")


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: contains only the checkpoints.
        origin: JSON values that the result depends on: settings, data, seed. Checkpoints with a different origin are never
            used; they are moved aside.
        kept: number of most recent checkpoints to keep.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any], kept: int) -> None:
        self.folder = folder
        self.kept = kept
        self.origin = json.loads(json.dumps(origin))
        self._stamp = folder / "origin.json"

    def save(self, step: int, state: State) -> None:
        """Writes the state after `step` steps, then removes the oldest checkpoints."""
        path = self._path(step)
        with atomic_path(path) as temporary:
            _write({"origin": hash_receipt(self.origin), "step": step, **state}, temporary)
            # The checksum first: after a kill between the two, a checkpoint without a checksum would count as corrupt.
            write_bytes(_sum_of(path), f"{sha256_file(temporary)}  {path.name}\n".encode())
        # Only for a readable report of what has changed when checkpoints are moved aside; the comparison uses the hash above.
        write_json(self._stamp, self.origin)
        for old in self.steps()[: -self.kept]:
            self._remove(old)

    def newest(self) -> int:
        """The step of the newest intact checkpoint with this origin; 0 if none exists.

        Logs the checkpoints that it rejects. Corrupt ones are removed; those with a different origin are all moved aside.
        """
        self._clean()
        for step in reversed(self.steps()):
            if not _verify(self._path(step)):
                say(f"{self._path(step)}: corrupt, its checksum does not match; using the previous one, if any")
                self._remove(step)
            elif self._origin_of(step) != hash_receipt(self.origin):
                self._move_aside()
                return 0
            else:
                return step
        return 0

    def load(self, step: int) -> State:
        """The state saved after `step` steps, with its tensors on the CPU."""
        # Loaded on the CPU: on the device, the checkpoint would need memory in addition to the model it is copied into.
        state: State = torch.load(self._path(step), map_location="cpu", weights_only=True)
        return state

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, ascending, intact or not."""
        names = [_NAME.fullmatch(p.name) for p in self.folder.glob("step-*.pt")]
        return sorted(int(match[1]) for match in names if match)

    def discard(self) -> None:
        """Removes all checkpoints; call it once the final weights have been written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _origin_of(self, step: int) -> Any:
        # Memory-mapped, to read one string without loading gigabytes of weights.
        return torch.load(self._path(step), map_location="cpu", weights_only=True, mmap=True)["origin"]

    def _remove(self, step: int) -> None:
        self._path(step).unlink(missing_ok=True)
        _sum_of(self._path(step)).unlink(missing_ok=True)

    def _clean(self) -> None:
        """Removes the temporary files of a write that was killed."""
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink()

    def _move_aside(self) -> None:
        aside = self.folder.with_name(f"{self.folder.name}-of-other-settings")
        try:
            before = read_json(self._stamp)
        except (
            OSError,
            ValueError,
        ):  # missing or corrupt; the checkpoints' own hashes have already shown that the origin differs
            before = {}
        changed = ", ".join(_differences(before, self.origin)) or "unknown"
        shutil.rmtree(aside, ignore_errors=True)
        self.folder.rename(aside)
        say(f"{self.folder}: from a run with other settings (changed: {changed}); not resumed, moved to {aside}")


def _write(state: State, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # On a full disk torch reports an unexpected position; the cause is the error in its context.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _sum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _verify(path: Path) -> bool:
    expected = _sum_of(path)
    return expected.exists() and expected.read_bytes().split()[:1] == [sha256_file(path).encode()]


def _differences(before: Any, after: Any, key: str = "") -> list[str]:
    """The dotted keys at which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys: list[str] = []
        for name in sorted(before.keys() | after.keys()):
            keys += _differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
        return keys
    return [] if before == after else [key]


def random_state(process: Process) -> dict[str, list[torch.Tensor]]:
    """The states of torch's random number generators on all processes, by rank; all processes must call it together."""
    state = {"cpu": process.gather(torch.get_rng_state())}
    if process.device.type == "cuda":
        state["cuda"] = process.gather(torch.cuda.get_rng_state(process.device))
    return state


def restore_random_state(state: Mapping[str, list[torch.Tensor]], process: Process) -> None:
    """Restores this process's random number generators from the result of `random_state`."""
    torch.set_rng_state(state["cpu"][process.rank])
    if "cuda" in state and process.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][process.rank], process.device)
