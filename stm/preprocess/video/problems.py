"""Detection of damaged or unusual videos from their decoded frames."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stm.jobs.status import Status
from stm.preprocess.clip_outcomes import Note
from stm.preprocess.video.container import reported_seconds

# Maximum ratio of the longest to the shortest interval between frames; rounding timestamps to milliseconds causes far
# smaller ratios.
_MAX_INTERVAL_RATIO = 1.5
# At most one frame in this many may be missing, because encoders' frame counts are off by one or two at the ends.
_MISSING_TOLERANCE = 50


@dataclass
class DecodeLog:
    """The decoding log of a clip."""

    hidden: int  # coded frames that the container hides
    times: list[float] = field(default_factory=list)  # timestamp of each frame of the clip, in s
    damaged: list[int] = field(default_factory=list)  # decode indices of frames that the decoder marked as damaged
    # Timestamps, in s, of packets that could not be decoded; None for a packet without a timestamp.
    broken: list[float | None] = field(default_factory=list)
    error: str = ""  # the decoder's first error, or the error that ended reading
    complete: bool = False  # whether the file was read to its end, so that missing frames can be detected

    def record(self, seconds: float, corrupt: bool) -> None:
        """Add the next frame of the clip."""
        if corrupt:
            self.damaged.append(len(self.times))
        self.times.append(seconds)

    def notes(self, stream: Any, start: float | None, end: float | None) -> list[Note]:
        """Return the problems, most severe first. Truncation is detected only if the file was read to its end.

        Args:
            stream: the PyAV video stream.
            start, end: bounds of the clip in seconds.
        """
        truncated = self._truncated(stream, start, end)
        edited = self._edited()
        if truncated:
            # The last frames of a truncated file have gaps, so their intervals do not reflect the frame rate.
            return [truncated, *_present(self._corrupt(), edited)]
        # Packets are read ahead of the frames that the decoder outputs; broken packets after the clip do not affect it.
        broken = [t for t in self.broken if t is None or end is None or t < end]
        # The interval across a missing frame does not reflect the frame rate.
        return list(_present(self._corrupt(len(broken)), edited, None if broken else self._variable()))

    def _truncated(self, stream: Any, start: float | None, end: float | None) -> Note | None:
        if not self.complete:
            return None
        why = f" ({self.error})" if self.error else ""
        if start or end is not None:
            return self._truncated_clip(reported_seconds(stream), start or 0.0, end, why)
        expected = self._expected_frames(stream)
        if expected - len(self.times) <= max(2, expected // _MISSING_TOLERANCE):
            return None
        return Note(Status.TRUNCATED, f"decoding ended after {len(self.times)} of {expected} frames{why}")

    def _expected_frames(self, stream: Any) -> int:
        """Return the number of frames that the file should have; 0 if its container does not report it."""
        if stream.frames:
            return int(stream.frames) - self.hidden
        seconds, rate = reported_seconds(stream), stream.average_rate
        return round(seconds * float(rate)) if seconds and rate else 0

    def _truncated_clip(self, duration: float | None, start: float, end: float | None, why: str) -> Note | None:
        """Return the note for a file that ends before the clip, although its container reports a longer duration."""
        bound = min((t for t in (end, duration) if t is not None), default=None)
        if bound is None or bound <= start:
            return None
        step = float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.1
        last = self.times[-1] + step if self.times else start
        if bound - last <= max(3 * step, (bound - start) / _MISSING_TOLERANCE):
            return None
        return Note(Status.TRUNCATED, f"decoding ended at {last:.3f} s, before the clip's end at {bound:.3f} s{why}")

    def _corrupt(self, broken_packets: int = 0) -> Note | None:
        if not self.damaged and not broken_packets:
            return None
        first = f", the first at {self.times[self.damaged[0]]:.3f} s" if self.damaged else ""
        packets = f"; {broken_packets} packets could not be decoded" if broken_packets else ""
        detail = f"{len(self.damaged)} of {len(self.times)} frames are marked damaged{first}{packets}"
        return Note(Status.CORRUPT_FRAMES, detail)

    def _edited(self) -> Note | None:
        if not self.hidden:
            return None
        return Note(Status.EDIT_LIST, f"the container hides {self.hidden} coded frames")

    def _variable(self) -> Note | None:
        steps = np.diff(self.times)
        if len(steps) == 0 or steps.max() <= _MAX_INTERVAL_RATIO * max(float(steps.min()), 0.0):
            return None
        interval = f"{steps.min() * 1000:.1f} to {steps.max() * 1000:.1f} ms"
        return Note(Status.VARIABLE_RATE, f"neighbouring frames are {interval} apart")


def _present(*notes: Note | None) -> Iterable[Note]:
    return (note for note in notes if note is not None)
