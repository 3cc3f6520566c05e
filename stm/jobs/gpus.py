"""The GPUs of one machine, dealt out to the jobs of the workflow: each job claims as many as it requests, and no two the same.

A claim is a lock on a file per GPU, held by the job's process. The kernel releases it when that process ends, however that
happens, and the processes that it has started end with it (see `stm.jobs.lifetime`). All workflows of one user on a machine
share the locks, so that two side by side use different GPUs, too. On a cluster the scheduler assigns GPUs, and none is claimed.
"""

import fcntl
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

_log = logging.getLogger(__name__)

POOL = "STM_GPUS"
"""Environment variable by which the workflow tells its jobs the GPUs that they share, separated by commas."""

NO_DEVICES = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; Slurm sets the last one for jobs without any."""

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LIST_SECONDS = 60  # the driver starts up in seconds per GPU where nothing keeps it loaded
_POLL_SECONDS = 0.5
# Present where a GPU is, even in containers without nvidia-smi: NVIDIA's driver, AMD's, and that of Windows' Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_COUNT = "import torch; print(torch.cuda.device_count())"

_held: list[int] = []  # file descriptors of the locks, open until the process ends


class GpuError(RuntimeError):
    """A job requests more GPUs than its machine has."""


def share_gpus(limit: int | None) -> int:
    """Make the visible GPUs of this machine the pool of the jobs that this process starts; return how many may be in use.

    Args:
        limit: the number that the user allows (`--resources gpu=N`); 0 hides all GPUs from the jobs. None: all.
    """
    gpus = list_gpus()
    os.environ[POOL] = ",".join(gpus)
    return len(gpus) if limit is None else min(limit, len(gpus))


def list_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; GPUs divided by MIG count in parts.

    They are listed by `nvidia-smi -L`, or counted by torch in a process of its own where there is a driver without that program.
    If CUDA_VISIBLE_DEVICES is set, only the GPUs that it names; its numbers are nvidia-smi's.
    """
    visible = os.environ.get(_VISIBLE)
    if visible is not None and visible.strip() in NO_DEVICES:
        return []
    installed = _installed()
    if visible is None:
        return [device for devices in installed or _counted() for device in devices]
    names = [name.strip() for name in visible.split(",")]
    # As in CUDA, a name of no GPU hides those that follow: `0,-1,1` is GPU 0.
    chosen = [_find(name, installed) or "" if installed else name for name in names]
    return list(dict.fromkeys(takewhile(lambda device: device not in NO_DEVICES, chosen)))


def claim_gpus(count: int, job: str) -> None:
    """Reserve `count` GPUs of the pool until this process ends, and hide all others from it and from what it starts.

    Without a pool, as on a cluster or a machine without GPUs, nothing changes. Where other jobs have them, it waits until enough
    are free at once, and says for which jobs it waits.

    Args:
        job: human-readable, for the messages of jobs that wait for this one.

    Raises:
        GpuError: the pool is smaller, or nothing can be locked.
    """
    pool = list(filter(None, os.environ.get(POOL, "").split(",")))
    if not pool:
        return
    if count > len(pool):
        raise GpuError(
            f"{job} requests {count} GPUs, and this machine offers {len(pool)} ({', '.join(pool)}): lower `processes`, or "
            f"offer more ({_VISIBLE})"
        )
    try:
        os.environ[_VISIBLE] = ",".join(_take(pool, count, job) if count else [])
    except OSError as error:
        raise GpuError(
            f"{job} cannot lock the GPUs that it claims ({error}): set TMPDIR to a folder that you may write to, on a file "
            "system with locks"
        ) from error


def _take(pool: Sequence[str], count: int, job: str) -> list[str]:
    folder, reported = _lock_folder(), ""
    while True:
        with _claiming(folder):
            taken, owners = _try_to_take(pool, count, folder)
        if len(taken) == count:
            for lock in taken.values():
                _sign(lock, job)
            _held.extend(taken.values())
            return list(taken)
        waiting = "; ".join(f"{gpu}: {owner}" for gpu, owner in owners.items())
        if waiting != reported:
            _log.info(f"{job}: waiting for {count} of {len(pool)} GPUs, of which others use: {waiting}")
            reported = waiting
        time.sleep(_POLL_SECONDS)


def _try_to_take(pool: Sequence[str], count: int, folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Lock `count` GPUs, or none if fewer are free: two jobs that each hold a part would wait for each other forever.

    Returns:
        The locks by GPU, and the owners of the GPUs that are in use.
    """
    taken: dict[str, int] = {}
    owners: dict[str, str] = {}
    for gpu in pool:
        if len(taken) == count:
            break
        lock = _open(folder / re.sub(r"[^\w-]", "_", gpu))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken[gpu] = lock
        except BlockingIOError:
            owners[gpu] = os.read(lock, 1000).decode(errors="replace") or "another process"
            os.close(lock)
    if len(taken) < count:
        for lock in taken.values():
            os.close(lock)
        taken = {}
    return taken, owners


def _sign(lock: int, job: str) -> None:
    """Write the owner into a lock's file, only for the messages of others: a full disk does not matter."""
    with suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} ({job})".encode(), 0)


@contextmanager
def _claiming(folder: Path) -> Iterator[None]:
    """Only one process tries at a time; it takes too little time to report that one waits for it."""
    lock = _open(folder / "claiming")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _lock_folder() -> Path:
    """The folder of locks of this user on this machine. The name of the machine is in it, as the folder may be shared."""
    folder = Path(tempfile.gettempdir()) / f"stm-gpus-{socket.gethostname()}-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
        raise GpuError(f"{folder}: this folder must belong to you, for the locks of GPUs; remove it, or set TMPDIR")
    # systemd removes old files from temporary folders, except from those that are locked.
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    _held.append(lock)
    return folder


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _installed() -> list[list[str]]:
    """The devices of each GPU by nvidia-smi: its UUID, or those of its MIG parts."""
    try:
        command = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIST_SECONDS,
            check=True,
        )
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        if _has_driver():
            _log.warning(f"nvidia-smi does not list the GPUs ({error}): torch counts them")
        return []
    found: list[tuple[str, list[str]]] = []
    for kind, uuid in re.findall(r"(?m)^\s*(GPU|MIG) .*\(UUID: ([^)]+)\)", command.stdout):
        if kind == "GPU":
            found.append((uuid, []))
        elif found:
            found[-1][1].append(uuid)
    return [parts or [uuid] for uuid, parts in found]


def _has_driver() -> bool:
    return any(map(os.path.exists, _DRIVERS))


def _counted() -> list[list[str]]:
    """Numbers of the GPUs that torch finds; it is asked only where a driver is, as it takes seconds to load."""
    if not _has_driver():
        return []
    command = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)  # noqa: S603
    count = command.stdout.strip()
    return [[str(number)] for number in range(int(count) if count.isdecimal() else 0)]


def _find(name: str, installed: Sequence[Sequence[str]]) -> str | None:
    """Return the device of a name in CUDA_VISIBLE_DEVICES: a number, the start of a UUID, or an older name of a MIG part."""
    if name.isdecimal():
        return installed[int(name)][0] if int(name) < len(installed) else None
    devices = [device for devices in installed for device in devices]
    return next((device for device in devices if name and device.startswith(name)), name if name[:3] == "MIG" else None)
