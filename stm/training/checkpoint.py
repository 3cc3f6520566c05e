"""Checkpoints of an unfinished run: a kill at any moment loses some steps, never the run.

A checkpoint is one file, `step-000000200.pt` (tensors, numbers and strings only, no pickled code), next to its
SHA-256 in the format of `sha256sum -c`. Both are written under temporary names and renamed, so each file is
complete or missing. Corruption, for instance by a power cut, is caught by the checksum; the previous checkpoint is then used.

Checkpoints of other settings are put aside, together with the run's log and best weights, in a folder that is named after what
made them, `checkpoints-of-{origin}`. They come back when the settings do, and are never deleted here.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

import stm
from stm.distributed.process import Process
from stm.storage.files import atomic_path, read_json, sha256_file, write_bytes, write_json
from stm.storage.receipts import hash_receipt, library_versions
from stm.training.trackers import IDS

_log = logging.getLogger(__name__)

State = dict[str, Any]
_NAME = re.compile(r"step-(\d{9})\.pt")

_COMPANIONS = ("metrics.jsonl", "tensorboard", IDS, "best.safetensors", "best.json")
"""What belongs to the checkpoints and lies beside their folder."""

_PARTS = {"epoch", "model", "optimizer", "meter", "random"}  # of the state of a training run

_LIBRARIES = ("torch", "timm", "transformers", "numpy", "opencv-python-headless", "simplejpeg")


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: contains only the checkpoints.
        origin: JSON values that the result depends on: settings, data, seed. Checkpoints with a different origin are never
            used; they are put aside.
        kept: number of most recent checkpoints to keep.
        layout: the result of `describe_layout` for the run's model and optimiser. Checkpoints of a different layout, such as
            those of another version of the code, are put aside, too. None: any layout.

    Attributes:
        history: the versions of the libraries and of stm's own code that computed the run, and the first step of each.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any], kept: int, layout: str | None = None) -> None:
        self.folder = folder
        self.kept = kept
        self.origin = json.loads(json.dumps(origin))
        self.layout = layout
        self.history: list[dict[str, Any]] = [{"step": 0, "versions": _versions()}]
        self._stamp = folder / "origin.json"

    def save(self, step: int, state: State) -> None:
        """Writes the state after `step` steps, then removes the oldest checkpoints."""
        path = self._path(step)
        with atomic_path(path) as temporary:
            _write({"origin": hash_receipt(self.origin), "history": self.history, "step": step, **state}, temporary)
            # The checksum first: after a kill between the two, a checkpoint without a checksum would count as corrupt.
            write_bytes(_sum_of(path), f"{sha256_file(temporary)}  {path.name}\n".encode())
        # Only for a readable report of what has changed when checkpoints are moved aside; the comparison uses the hash above.
        write_json(self._stamp, self.origin)
        for old in self.steps()[: -self.kept]:
            self._remove(old)

    def newest(self) -> int:
        """The step of the newest intact checkpoint with this origin and layout; 0 if none exists.

        Logs the checkpoints that it rejects. Corrupt ones are removed, others' are put aside, and those that were put aside
        when the settings changed come back.
        """
        self._clean()
        newest = self._newest_own()
        return self._newest_own() if self._bring_back(begun=newest > 0) else newest

    def load(self, step: int) -> State:
        """The state saved after `step` steps, with its tensors on the CPU."""
        # Loaded on the CPU: on the device, the checkpoint would need memory in addition to the model it is copied into.
        state: State = torch.load(self._path(step), map_location="cpu", weights_only=True)
        _log.debug(f"checkpoint: {self._path(step)}: loaded")
        self.history = state.get("history", self.history)
        if self.history[-1]["versions"] != _versions():
            self.history = [*self.history, {"step": step, "versions": _versions()}]
        return state

    def changed_versions(self) -> list[str]:
        """What changed when the loaded checkpoint was resumed, such as `torch 2.12.0 -> 2.13.0`; empty if nothing did."""
        if len(self.history) < 2:
            return []
        before, after = (part["versions"] for part in self.history[-2:])
        names = sorted(before.keys() | after.keys())
        return [f"{n} {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]

    def resumed(self) -> dict[str, Any]:
        """What a receipt says of a run that several versions have computed: `resumed`, the versions by first step."""
        return {"resumed": self.history} if len(self.history) > 1 else {}

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, ascending, intact or not."""
        names = [_NAME.fullmatch(p.name) for p in self.folder.glob("step-*.pt")]
        return sorted(int(match[1]) for match in names if match)

    def discard(self) -> None:
        """Removes all checkpoints; call it once the final weights have been written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _remove(self, step: int) -> None:
        self._path(step).unlink(missing_ok=True)
        _sum_of(self._path(step)).unlink(missing_ok=True)

    def _clean(self) -> None:
        """Removes the temporary files of a write that was killed."""
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink()

    def _aside(self, identity: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}-of-{identity}")

    def _identity_of(self, step: int) -> str:
        """What a checkpoint was made by: the name of the folder in which it is put aside."""
        try:
            # Memory-mapped, to read names without loading gigabytes of weights.
            state = torch.load(self._path(step), map_location="cpu", weights_only=True, mmap=True)
            layout = None
            if self.layout is not None:
                groups = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
                layout = describe_layout(state["model"], groups)
                if missing := _PARTS - state.keys():
                    layout += f" without {sorted(missing)}"
            return _identify(state["origin"], layout)
        except (UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError):
            # Its checksum is right, so it was written like this: by another version of the code or of torch.
            return f"unreadable-{sha256_file(self._path(step))[:12]}"

    def _newest_own(self) -> int:
        """The newest intact checkpoint of this origin in the folder, or 0; what is newer is removed or put aside."""
        own, others = _identify(hash_receipt(self.origin), self.layout), {}
        newest = 0
        for step in reversed(self.steps()):
            if not _verify(self._path(step)):
                _log.warning(
                    f"{self._path(step)}: corrupt, its checksum does not match; using the previous one, if any"
                )
                self._remove(step)
            elif (identity := self._identity_of(step)) != own:
                others[step] = self._aside(identity)
            else:
                newest = step
                break
        if others:
            self._put_aside(others, with_companions=newest == 0)
        return newest

    def _put_aside(self, others: Mapping[int, Path], with_companions: bool) -> None:
        changed, newest = self._describe_change(), others[max(others)]
        if with_companions:
            # Before the checkpoints: after a kill in between, these are still found, and the next attempt continues: it puts
            # them aside, too, or brings the companions back.
            for path in self._companions():
                _move(path, newest / path.name)
        for step, aside in others.items():
            _move_checkpoint(self._path(step), aside)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
        _log.warning(
            f"{self.folder}: from a run with other settings (changed: {changed}); not resumed, moved to {newest}, from where "
            "they come back when that run is started again. If it never will be, delete that folder to free the disk"
        )

    def _bring_back(self, begun: bool) -> bool:
        """Moves the checkpoints of this origin back from where they were put aside; returns whether there were any.

        Args:
            begun: whether the folder has checkpoints of this origin, because an attempt to move them was killed.
        """
        aside = self._aside(_identify(hash_receipt(self.origin), self.layout))
        if not aside.is_dir():
            return False
        if not begun:  # what is there instead is from a run that has no checkpoint yet
            for path in self._companions():
                _delete(path)
        # Before their companions: after a kill in between, an attempt with other settings finds them and puts all aside.
        for path in sorted(aside.glob("step-*.pt")):
            _move_checkpoint(path, self.folder)
        for path in self._companions():
            _move(aside / path.name, path)
        for pattern in ("*.sha256", ".*.tmp"):  # left by kills
            for path in aside.glob(pattern):
                path.unlink()
        if not any(aside.iterdir()):
            aside.rmdir()
        _log.info(f"{self.folder}: moved back from {aside}")
        return True

    def _companions(self) -> list[Path]:
        return [*map(self.folder.with_name, _COMPANIONS), self._stamp]

    def _describe_change(self) -> str:
        """The settings in which the checkpoints in the folder differ from this run."""
        try:
            before = read_json(self._stamp)
        except (OSError, ValueError):  # missing or corrupt; the checkpoints' own hashes show that they are others
            return "unknown"
        return ", ".join(_differences(before, self.origin)) or "the model's tensors: another version of the code"


def describe_layout(model: Mapping[str, torch.Tensor], groups: Sequence[int]) -> str:
    """What must agree for a checkpoint to be loaded: its hash.

    Args:
        model: the state dict of the model; only names, shapes and types are used.
        groups: the number of parameters in each group of the optimiser.
    """
    tensors = [[name, list(value.shape), str(value.dtype)] for name, value in sorted(model.items())]
    return hash_receipt({"model": tensors, "groups": list(groups)})


def _identify(origin: str, layout: str | None) -> str:
    return sha256(f"{origin} {layout}".encode()).hexdigest()[:12]


@cache
def _versions() -> dict[str, str]:
    """The versions of the libraries that affect training, and the first digits of the hash of stm's own code."""
    root = Path(stm.__file__).parent
    digest = sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {**library_versions(_LIBRARIES), "stm's code": digest.hexdigest()[:12]}


def _move_checkpoint(path: Path, folder: Path) -> None:
    """Moves a checkpoint and its checksum. The checksum is copied first: without it, a checkpoint would count as corrupt."""
    write_bytes(_sum_of(folder / path.name), _sum_of(path).read_bytes())
    path.replace(folder / path.name)
    _sum_of(path).unlink()


def _delete(path: Path) -> None:
    """Deletes a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    """Moves a file, or the files of a folder, if it exists. A file that is there already has been moved before, and stays."""
    if source.is_dir():
        for path in source.iterdir():
            _move(path, target / path.name)
        source.rmdir()
    elif target.exists():
        _delete(source)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)


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


def restore_random_state(state: Mapping[str, list[torch.Tensor]], process: Process, rank: int | None = None) -> None:
    """Restores this process's random number generators from the result of `random_state`: those of process `rank`, by default
    its own."""
    rank = process.rank if rank is None else rank
    torch.set_rng_state(state["cpu"][rank])
    if "cuda" in state and process.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][rank], process.device)
