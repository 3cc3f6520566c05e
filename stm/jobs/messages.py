"""Log messages of the command line and of jobs: their levels and format, and where they go.

Modules log to `logging.getLogger(__name__)`, so that all messages pass through the logger `stm`. Nothing is printed for whoever
imports `stm`: handlers and levels are the importing program's own. The command line and the workflow's jobs call
`configure_messages` once, which prints to standard error:

    info     what a run does, and its progress; printed as it is
    warning  what somebody should look at; `warning: ` precedes it
    debug    files that are read, places, cached results, durations; preceded by the time and the module
"""

import logging
import os
import sys
from contextlib import suppress

VARIABLE = "STM_LOG"
"""The environment variable with the level. Processes that this one starts inherit it."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_WARNINGS = "py.warnings"  # the logger of Python's own warnings


class LogLevelError(ValueError):
    """The level in the environment is none; the message names those that there are."""


class _Messages(logging.Handler):
    """Prints to what is standard error at the moment: a job's log replaces it for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Format())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # a message must never cost a run
            self.handleError(record)
            return
        if sys.stderr is None:  # closed by the caller
            return
        # If the log is on a full disk, the job itself says so; an error raised here would hide that message. A thread may also
        # outlive the log (ValueError).
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).rstrip("\n")
        if record.levelno < logging.INFO:
            text = f"debug {self.formatTime(record, '%H:%M:%S')} {record.name}: {text}"
        elif record.levelno >= logging.WARNING and record.name != _WARNINGS:
            text = f"{record.levelname.lower()}: {text}"
        return f"{_rank()}{text}"


def _rank() -> str:
    """The prefix of a process beside the first of a run; the first speaks for all and has none."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def configure_messages(level: str | None = None) -> None:
    """Print the messages of this process, and of those that it starts, to standard error. May be called again.

    Args:
        level: a key of `LEVELS`; None: what `STM_LOG` says, or `info`.

    Raises:
        LogLevelError: `STM_LOG` has another value.
    """
    chosen = level or os.environ.get(VARIABLE, "").strip().lower() or "info"
    if chosen not in LEVELS:
        raise LogLevelError(f"{VARIABLE} is {chosen!r}; it must be one of {', '.join(LEVELS)}")
    os.environ[VARIABLE] = chosen
    ours = logging.getLogger("stm")
    ours.setLevel(LEVELS[chosen])
    for logger in (ours, logging.getLogger(_WARNINGS)):
        if not is_configured(logger):
            logger.addHandler(_Messages())
        logger.propagate = False  # another library's handler of the root logger would print them a second time
    logging.captureWarnings(capture=True)


def inherit_messages() -> None:
    """Print this process's messages as the process does that started it: not at all if that only imports `stm`."""
    if VARIABLE in os.environ:
        configure_messages()


def is_configured(logger: logging.Logger | None = None) -> bool:
    """Whether this process prints its messages."""
    return any(isinstance(handler, _Messages) for handler in (logger or logging.getLogger("stm")).handlers)
