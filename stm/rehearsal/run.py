"""Runs the workflow on the rehearsed config: the same Snakefile, in a folder of its own."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

import yaml

from stm.config import Config
from stm.storage.shipped import shipped

CONFIG, LOG = "config.yaml", "snakemake.log"
_STEPS = re.compile(r"(\d+) of (\d+) steps \(\S+\) done")
_FAILED = re.compile(r"Error in rule (\w+):")


class RehearsalError(RuntimeError):
    """The rehearsal found that the workflow cannot run as configured; the message names the failed rules and the log."""


class Rehearsed(NamedTuple):
    """A finished rehearsal."""

    jobs: int
    seconds: float


def check_snakemake() -> None:
    """Check that Snakemake is installed, before any work is done.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if find_spec("snakemake") is None:
        raise ModuleNotFoundError("No module named 'snakemake'", name="snakemake")


def run_workflow(config: Config, folder: Path, cores: int, targets: Sequence[str]) -> Rehearsed:
    """Run Snakemake in `folder` on the config, printing its progress; its whole output is in `folder/snakemake.log`.

    Args:
        config: the rehearsed config.
        targets: the workflow's targets; by default everything of the config.

    Raises:
        RehearsalError: a job failed.
    """
    path = folder / CONFIG
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "snakemake", "-s", str(shipped("workflow/Snakefile"))]
    command += ["--directory", str(folder.resolve()), "--workflow-profile", str(shipped("workflow/profiles/default"))]
    command += ["--cores", str(cores), *targets]
    command += ["--configfile", str(path.resolve())]
    # On the CPU: the processes of a small run must not share a GPU, and the machine may have none.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    start, failed, jobs = time.monotonic(), list[str](), 0
    with (
        (folder / LOG).open("w") as log,
        subprocess.Popen(  # noqa: S603
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in _copy(process.stdout, log):
            if steps := _STEPS.search(line):
                jobs = int(steps[2])
                print(f"rehearsal: {steps[0]}, {time.monotonic() - start:.0f} s", flush=True)
            elif error := _FAILED.search(line):
                failed.append(error[1])
    if process.returncode:
        what = f"failed in the rule {', '.join(dict.fromkeys(failed))}" if failed else "could not start"
        raise RehearsalError(f"the rehearsal {what}:\n{_tail(folder / LOG)}\nAll messages: {folder / LOG}")
    return Rehearsed(jobs, time.monotonic() - start)


def _copy(output: IO[str], log: IO[str]) -> Iterator[str]:
    for line in output:
        log.write(line)
        log.flush()
        yield line


def _tail(log: Path, lines: int = 40) -> str:
    """The log from its first error on."""
    text = log.read_text(errors="replace").splitlines()
    start = next((number for number, line in enumerate(text) if "Error" in line), len(text) - lines)
    return "\n".join(text[max(0, start) :][:lines])
