"""Progress of long jobs: finished items, rate and remaining time.

On a terminal the line is redrawn; in a log file, such as that of a workflow job, a plain line is printed every few
seconds, so that progress can be followed with `tail -f`. It is a message of the level info: see `stm.jobs.messages`.
"""

import io
import logging
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TextIO, TypeVar

from stm.jobs.messages import is_configured

T = TypeVar("T")
_log = logging.getLogger(__name__)


def say(message: str) -> None:
    """Log one line at the level info."""
    _log.info(message)


def format_seconds(seconds: float) -> str:
    """Format a duration: `3725` -> `1h02m`, `65` -> `1m05s`, `4.2` -> `4s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class Progress:
    """Counts finished items and prints the progress.

    >>> with Progress("frames train-00000", total=64, unit="clips") as progress:   # doctest: +SKIP
    ...     progress.advance()
    """

    def __init__(self, what: str, total: int, unit: str, *, every: float = 5.0, stream: TextIO | None = None) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self._stream = stream
        # Only the command line and jobs draw on the terminal; whoever imports `stm` gets messages, if any.
        drawn = stream or (sys.stderr if is_configured() and _log.isEnabledFor(logging.INFO) else None)
        self._terminal = drawn is not None and drawn.isatty()
        if self._terminal:
            self._stream = drawn
        self._every = 0.2 if self._terminal else every
        self._start = time.monotonic()
        self._last = self._start
        self._start_done = 0

    def resume(self, done: int) -> None:
        """Start from `done` items finished by an earlier attempt; they do not count towards the rate."""
        self.done = done
        self._start_done = done
        if done:
            _log.debug(f"{self.what}: {done} of {self.total} {self.unit} are kept from an earlier attempt")

    def advance(self, items: int = 1, note: str = "") -> None:
        """Count finished items, and print a line if the last line was printed long enough ago."""
        self.done += items
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._print(note)

    def _print(self, note: str = "") -> None:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._start_done) / elapsed
        remaining = format_seconds((self.total - self.done) / rate) if rate > 0 else "?"
        line = f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {remaining} left"
        line += f", {note}" if note else ""
        self._write(line, end="")

    def _write(self, line: str, end: str = "\n") -> None:
        """Write a line; `end` is what follows it on a terminal, where the next one may replace it."""
        if self._stream is None:
            _log.info(line)
            return
        # If the log is on a full disk, the job itself says so; an error raised here would hide that message.
        with suppress(OSError):
            self._stream.write(f"\r\x1b[2K{line}{end}" if self._terminal else f"{line}\n")
            self._stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._start_done) / max(elapsed, 1e-9)
        line = (
            f"{self.what}: {self.done}/{self.total} {self.unit} in {format_seconds(elapsed)}, {rate:.1f} {self.unit}/s"
        )
        self._write(line)


def track(items: Iterable[T], what: str, total: int, unit: str) -> Iterator[T]:
    """Iterate over `items` and print the progress."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


class _Tee(io.TextIOBase):
    """Writes to several streams; never counts as a terminal, so that progress is printed as plain lines."""

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
            stream.flush()
        return len(text)


@contextmanager
def log_to(path: str | Path) -> Iterator[None]:
    """Copy the block's standard error, including warnings and a final traceback, into a log file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Names of files need not be valid text.
    with Path(path).open("w", encoding="utf-8", errors="backslashreplace") as log:
        try:
            with redirect_stderr(_Tee(log, sys.stderr)):
                yield
        except BaseException:  # also KeyboardInterrupt and SystemExit: the log must show why a job ended
            traceback.print_exc(file=log)
            raise


@contextmanager
def log_duration(what: str) -> Iterator[None]:
    """Log, at the level debug, how long the block took."""
    start = time.monotonic()
    try:
        yield
    finally:
        _log.debug(f"{what}: took {time.monotonic() - start:.1f} s")
