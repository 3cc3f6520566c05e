"""Detection of damaged or unusual videos from their decoded frames."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stm.jobs.status import Status
from stm.preprocess.clip_outcomes import Note

# Maximum ratio of the longest to the shortest interval between frames; rounding timestamps to milliseconds causes far
# smaller ratios.
_MAX_INTERVAL_RATIO = 1.5
EPSILON = 1e-6  # s; timestamps are rounded to the container's time base


@dataclass
class DecodeLog:
    """The decoding log of a clip."""

    hidden: int  # coded frames that the container hides
    times: list[float] = field(default_factory=list)  # timestamp of each frame of the clip, in s
    damaged: list[int] = field(default_factory=list)  # decode indices of frames that the decoder marked as damaged
    # Timestamps, in s, of packets that could not be decoded; None for a packet without a timestamp.
    broken: list[float | None] = field(default_factory=list)
    # Timestamps, in s, of packets behind which a part of the file could not be read; None as above.
    skipped: list[float | None] = field(default_factory=list)
    error: str = ""  # the decoder's first error, or the error that ended reading
    complete: bool = False  # whether the file was read to its end, so that missing frames can be detected
    cut_off: bool = False  # whether there is evidence that the file continued behind its end

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
        broken, skipped = (
            sum(t is None or end is None or t < end for t in times) for times in (self.broken, self.skipped)
        )
        # The interval across a missing frame does not reflect the frame rate.
        variable = None if broken or skipped else self._variable()
        return list(_present(self._corrupt(broken, skipped), edited, variable))

    def _truncated(self, stream: Any, start: float | None, end: float | None) -> Note | None:
        if not self.complete or not self.cut_off or self._reaches(end):
            return None
        if start or end is not None:
            bounds = f"{start or 0.0:.3f} s to " + ("the end" if end is None else f"{end:.3f} s")
            last = f"at {self.times[-1]:.3f} s" if self.times else "before the clip"
            detail = f"the file is cut off: its last frame is {last}; the clip is {bounds}"
        else:
            # Only mp4 without fragments has a frame count, and an exact one.
            expected = f" of {len(stream.index_entries) - self.hidden}" if _has_exact_index(stream) else ""
            detail = f"the file is cut off: decoding ended after {len(self.times)}{expected} frames"
        return Note(Status.TRUNCATED, detail + (f" ({self.error})" if self.error else ""))

    def _reaches(self, end: float | None) -> bool:
        """Whether the next frame would be outside the clip, if it follows after the usual interval."""
        if end is None or len(self.times) < 2:
            return False
        return self.times[-1] + float(np.median(np.diff(self.times))) >= end - EPSILON

    def _corrupt(self, broken_packets: int = 0, skipped_parts: int = 0) -> Note | None:
        if not self.damaged and not broken_packets and not skipped_parts:
            return None
        first = f", the first at {self.times[self.damaged[0]]:.3f} s" if self.damaged else ""
        packets = f"; {broken_packets} packets could not be decoded" if broken_packets else ""
        parts = f"; {skipped_parts} parts of the file between frames could not be read" if skipped_parts else ""
        detail = f"{len(self.damaged)} of {len(self.times)} frames are marked damaged{first}{packets}{parts}"
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


def _has_exact_index(stream: Any) -> bool:
    return bool(stream.frames) and stream.container.format.name.startswith("mov,")


def _present(*notes: Note | None) -> Iterable[Note]:
    return (note for note in notes if note is not None)
