"""Experiment trackers: TensorBoard, Weights & Biases and MLflow show the values of a run's `metrics.jsonl`.

The config's `trackers` names them; places, names and credentials come from the libraries' own environment variables
(`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, ...), and none is written to a file. Nothing is uploaded unless these variables say so:
W&B runs are offline without `WANDB_MODE`. A resumed run continues its runs there, whose ids are in `trackers.json` beside
its checkpoints: lines of `metrics.jsonl` that a kill kept from them, or from before a tracker was added, are logged first, and
none twice. An error of W&B or MLflow never ends a run: after a warning, it goes on without.
"""

import io
import json
import logging
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from stm.config import ConfigError
from stm.storage.files import name_file_in_disk_errors, read_json, write_json

_log = logging.getLogger(__name__)

TENSORBOARD = ("tensorboard",)
"""The default of the config's `trackers`."""

IDS = "trackers.json"
"""The ids of a run at W&B and MLflow, by tracker, beside its checkpoints."""

_PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow-skinny", "mlflow")}
_PROJECT = "stm"
_FAILURES = 3  # in a row, after which a tracker is not tried again
_SECONDS = 30  # for a server's answer, while a run waits for it
_LONGEST = 6000  # characters of a parameter in MLflow
_BATCH = 100  # parameters per request to MLflow


def check_trackers(names: Sequence[str]) -> None:
    """Check that the libraries of the config's `trackers` are installed.

    Raises:
        ConfigError: one is not; the message says how to install it.
    """
    # Not by importing: a folder `wandb`, which W&B itself makes, could be imported, too.
    missing = [name for name in names if not any(map(_is_installed, _PACKAGES[name]))]
    if missing:
        raise ConfigError(
            f"trackers: {' and '.join(missing)} not installed: pip install 'stm-video[trackers]', or leave it out of `trackers`"
        )


def _is_installed(package: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(version(package))
    return False


Line = tuple[int, Mapping[str, float]]
"""A line of `metrics.jsonl`: the step and the values."""


class Tracker(Protocol):
    """Where the values of a run are shown."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a line of `metrics.jsonl`."""

    def log_result(self, values: Mapping[str, float]) -> None:
        """Log values of the run as a whole."""

    def close(self, finished: bool) -> None:
        """End the tracking of this attempt; `finished` is False if it was interrupted or failed."""


class TensorBoard:
    """Event files in the run's folder.

    Args:
        folder: the run's; `tensorboard/` is written into it.
        step: number of finished steps; TensorBoard hides the events that an earlier attempt wrote for later ones.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Imported here: it takes a second, and only the first process of a training run needs it.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder / "tensorboard"
        if step == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with name_file_in_disk_errors(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def log_result(self, values: Mapping[str, float]) -> None:
        """Nothing: TensorBoard has no values without a step."""

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in `wandb/` of the run's folder unless `WANDB_DIR` names another."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], identity: str | None) -> None:
        import wandb

        self.id = identity or secrets.token_hex(4)
        mode: Any = os.environ.get("WANDB_MODE") or "offline"
        # Neither git's remote, which may hold a password, nor the command line, nor the output of the process is recorded.
        wanted: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
        wanted |= {"x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False}
        wanted |= dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), _SECONDS)
        wanted["x_transaction_log_flush_interval"] = 1.0  # seconds: what a kill may lose
        known = wandb.Settings.model_fields  # of the version that is installed
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
        with _no_terminal():
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or _PROJECT,
                dir=os.environ.get("WANDB_DIR") or str(folder),
                id=self.id,
                name=name if identity is None else None,
                config=dict(config),
                mode=mode,
                resume="allow" if mode == "online" else None,
                reinit="finish_previous",
                settings=settings,
            )
        # Offline, each attempt has a folder of its own, into which all lines are logged.
        self.stored = self._run.starting_step - 1 if mode == "online" and self._run.starting_step else 0
        self._offline = Path(self._run.dir).parent if mode == "offline" else None
        where = (
            f"offline in {self._offline}; WANDB_MODE=online uploads it" if mode == "offline" else self._run.url or mode
        )
        _log.info(f"{name}: W&B run {self.id}, {where}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def replace_earlier(self) -> None:
        """Delete the offline folders of earlier attempts: this one's has their lines, too."""
        if self._offline is not None:
            for folder in self._offline.parent.glob(f"offline-run-*-{self.id}"):
                if folder != self._offline:
                    shutil.rmtree(folder, ignore_errors=True)

    def log_result(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


@contextmanager
def _no_terminal() -> Iterator[None]:
    """Make questions fail: on a terminal, W&B asks for an account that it lacks and waits for the answer, however long."""
    terminal, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = terminal


class MLflow:
    """A run of MLflow in the store that `MLFLOW_TRACKING_URI` names, by default `mlruns/` or MLflow's own database."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], identity: str | None) -> None:
        # By default, an unreachable server is tried for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_SECONDS))
        # Otherwise it refuses folders, which it no longer extends.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        # Its own default is a database, for which the small package `mlflow-skinny` lacks a library.
        plain = None if find_spec("alembic") else f"file:{Path('mlruns').absolute()}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or plain)
        self.stored = 0
        if identity is None:
            run = self._client.create_run(self._experiment(), run_name=name)
            self.id: str = run.info.run_id
            params = [Param(key, str(value)[:_LONGEST]) for key, value in _flatten(config)]
            for first in range(0, len(params), _BATCH):
                self._client.log_batch(self.id, params=params[first : first + _BATCH])
        else:
            self.id = identity
            self._client.update_run(self.id, status="RUNNING")
            # Every line has it.
            self.stored = max((m.step for m in self._client.get_metric_history(self.id, "epoch")), default=0)
        _log.info(f"{name}: MLflow run {self.id}")

    def replace_earlier(self) -> None:
        """Nothing: all attempts are one run."""

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        if "MLFLOW_EXPERIMENT_ID" in os.environ:
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        for _ in range(2):
            found = self._client.get_experiment_by_name(name)
            if found is not None:
                return str(found.experiment_id)
            with suppress(MlflowException):  # another run may make it at the same time
                return str(self._client.create_experiment(name))
        raise RuntimeError(f"the experiment {name!r} cannot be made")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def log_result(self, values: Mapping[str, float]) -> None:
        self.log(0, values)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


_Start = Callable[[Path, str, Mapping[str, Any], str | None], "WandB | MLflow"]
_EXTERNAL: dict[str, tuple[str, _Start]] = {"wandb": ("W&B", WandB), "mlflow": ("MLflow", MLflow)}


class External:
    """W&B or MLflow: its errors, such as those of the network, are warnings.

    Args:
        name: a key of `_EXTERNAL`.
        folder: the run's; the id is kept in it.
        title: the name of the run.
        config: the settings of the run, as JSON values.
        fresh: whether to begin another run, rather than to continue the one whose id is in the folder.
    """

    def __init__(self, name: str, folder: Path, title: str, config: Mapping[str, Any], fresh: bool) -> None:
        self._title, start = _EXTERNAL[name]
        self._failures = 0
        self._tracker: WandB | MLflow | None = None
        ids = _read_ids(folder)
        identity = None if fresh else ids.get(name)

        def begin() -> None:
            self._tracker = start(folder, title, config, identity)
            write_json(folder / IDS, {**ids, name: self._tracker.id})

        self._try(begin)

    def resume(self, lines: Sequence[Line]) -> None:
        """Log the lines of earlier attempts that the tracker does not have."""
        for step, values in lines:
            self.log(step, values)
        tracker = self._tracker
        if tracker is not None:
            self._try(tracker.replace_earlier)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        tracker = self._tracker
        if tracker is not None and step > tracker.stored:
            self._try(lambda: tracker.log(step, values))

    def log_result(self, values: Mapping[str, float]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(lambda: tracker.log_result(values))

    def close(self, finished: bool) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(lambda: tracker.close(finished))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever the library raises: the run is worth more than its curves
            self._failures += 1
            if self._failures == 1:
                text = str(error).strip().partition("\n")[0]
                _log.warning(f"{self._title} does not take the values of this run, which goes on without: {text}")
            _log.debug(f"{self._title}: {error!r}")
            if self._failures == _FAILURES:
                self._tracker = None
        else:
            self._failures = 0


def open_trackers(
    names: Sequence[str], folder: Path, title: str, config: Mapping[str, Any], step: int, lines: Sequence[Line]
) -> list[Tracker]:
    """Open the trackers of a training run, in its first process.

    Args:
        step: number of finished steps; with 0 the run begins.
        lines: the lines of `metrics.jsonl` up to there.
    """
    trackers: list[Tracker] = [TensorBoard(folder, step)] if "tensorboard" in names else []
    for name in (name for name in _EXTERNAL if name in names):
        external = External(name, folder, title, config, fresh=step == 0)
        external.resume(lines)
        trackers.append(external)
    return trackers


def log_result(
    names: Sequence[str], folder: Path, title: str, config: Mapping[str, Any], values: Mapping[str, float]
) -> None:
    """Log the numbers of an evaluation; where it has trained, with the values of that training."""
    for name in (name for name in _EXTERNAL if name in names):
        tracker = External(name, folder, title, config, fresh=False)
        tracker.log_result({key: value for key, value in values.items() if math.isfinite(value)})
        tracker.close(finished=True)


def _read_ids(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        ids = read_json(folder / IDS)
        return {name: str(value) for name, value in ids.items()} if isinstance(ids, dict) else {}
    return {}


def _flatten(config: Mapping[str, Any], key: str = "") -> list[tuple[str, str]]:
    """The innermost values of a config by their dotted keys."""
    found: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flatten(value, f"{key}{name}.")
        else:
            found.append((f"{key}{name}", value if isinstance(value, str) else json.dumps(value)))
    return found
