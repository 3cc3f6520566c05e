"""A run that Slurm preempts goes back into Slurm's queue once it has saved."""

import os
import re
import subprocess

from stm.training.logs import say

_ANSWER_SECONDS = 60


def requeue_if_preempted() -> bool:
    """Puts this Slurm job back into the queue if it is being preempted; returns whether it was.

    Slurm does so itself when the partition's grace time is over. A job that has saved and ended before is to Slurm one that
    failed, and its next attempt would be one of the few that the workflow has for errors. Where no grace time is, the job
    is already on its way back, and nothing is left to do.

    A job that is cancelled, or whose time is up, ends: the first must stay away, and for the second more attempts and a
    longer `runtime` are the user's to choose.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return False
    told = _scontrol("show", "job", job, "--oneliner")
    state, preempted = (re.search(rf"\b{key}=(\S+)", told) for key in ("JobState", "PreemptTime"))
    if state is None or preempted is None or state[1] != "RUNNING" or not preempted[1][0].isdigit():
        return False
    # Said first: the job's processes end while Slurm takes it back.
    say(f"Slurm preempts job {job}: back into its queue")
    _scontrol("requeue", job)
    return True


def _scontrol(*words: str) -> str:
    """What scontrol prints; nothing where it fails, as the run's own end is then all that Slurm hears."""
    try:
        answer = subprocess.run(  # noqa: S603
            ["scontrol", *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=_ANSWER_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        say(f"scontrol {words[0]}: {getattr(error, 'stderr', None) or error}".strip())
        return ""
    return answer.stdout
