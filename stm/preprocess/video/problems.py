"""What was wrong with a video, told from the frames that came out of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stm.jobs.status import Status
from stm.preprocess.clip_outcomes import Note
from stm.preprocess.video.container import stated_seconds

_VARIABLE = 1.5  # longest / shortest distance of neighbouring frames; rounding to milliseconds stays far below
_MISSING = 50  # one frame in so many may be missing: encoders' counts are off by a frame or two at the ends


@dataclass
class Watch:
    """Collects what a clip's decoding shows."""

    hidden: int  # coded frames that the container hides
    times: list[float] = field(default_factory=list)  # s, of every frame of the clip
    damaged: list[int] = field(default_factory=list)  # decode order of the frames that the decoder marked
    broken: list[float | None] = field(default_factory=list)  # s, of packets that could not be decoded
    error: str = ""  # the first error of the decoder, or the one that ended the reading
    complete: bool = False  # read to the end of the file, so that what is missing can be told

    def record(self, seconds: float, corrupt: bool) -> None:
        if corrupt:
            self.damaged.append(len(self.times))
        self.times.append(seconds)

    def notes(self, stream: Any, start: float | None, end: float | None) -> list[Note]:
        """Gravest first. A clip that was not read to the end of the file is not called truncated."""
        truncated = self._truncated(stream, start, end)
        edited = self._edited()
        if truncated:
            # The last frames of a torn file lack neighbours: their distances say nothing about the rate.
            return [truncated, *_present(self._corrupt(), edited)]
        # The decoder is fed ahead of the frames that it gives: what is broken behind the clip does not concern it.
        broken = [t for t in self.broken if t is None or end is None or t < end]
        # Where a frame is missing, its neighbours' distance says nothing about the rate.
        return list(_present(self._corrupt(len(broken)), edited, None if broken else self._variable()))

    def _truncated(self, stream: Any, start: float | None, end: float | None) -> Note | None:
        if not self.complete:
            return None
        why = f" ({self.error})" if self.error else ""
        if start or end is not None:
            return self._truncated_clip(stated_seconds(stream), start or 0.0, end, why)
        expected = self._expected_frames(stream)
        if expected - len(self.times) <= max(2, expected // _MISSING):
            return None
        return Note(Status.TRUNCATED, f"decoding ended after {len(self.times)} of {expected} frames{why}")

    def _expected_frames(self, stream: Any) -> int:
        """Frames that the file should show; 0 when its container does not say."""
        if stream.frames:
            return int(stream.frames) - self.hidden
        seconds, rate = stated_seconds(stream), stream.average_rate
        return round(seconds * float(rate)) if seconds and rate else 0

    def _truncated_clip(self, stated: float | None, start: float, end: float | None, why: str) -> Note | None:
        """The file ended before the clip did, although its container says that it goes on."""
        bound = min((t for t in (end, stated) if t is not None), default=None)
        if bound is None or bound <= start:
            return None
        step = float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.1
        last = self.times[-1] + step if self.times else start
        if bound - last <= max(3 * step, (bound - start) / _MISSING):
            return None
        return Note(Status.TRUNCATED, f"decoding ended at {last:.3f} s, before the clip's end at {bound:.3f} s{why}")

    def _corrupt(self, broken_packets: int = 0) -> Note | None:
        if not self.damaged and not broken_packets:
            return None
        first = f", the first at {self.times[self.damaged[0]]:.3f} s" if self.damaged else ""
        packets = f"; {broken_packets} packets could not be decoded" if broken_packets else ""
        marked = f"{len(self.damaged)} of {len(self.times)} frames are marked damaged{first}{packets}"
        return Note(Status.CORRUPT_FRAMES, marked)

    def _edited(self) -> Note | None:
        if not self.hidden:
            return None
        return Note(Status.EDIT_LIST, f"the container hides {self.hidden} coded frames")

    def _variable(self) -> Note | None:
        steps = np.diff(self.times)
        if len(steps) == 0 or steps.max() <= _VARIABLE * max(float(steps.min()), 0.0):
            return None
        apart = f"{steps.min() * 1000:.1f} to {steps.max() * 1000:.1f} ms"
        return Note(Status.VARIABLE_RATE, f"neighbouring frames are {apart} apart")


def _present(*notes: Note | None) -> Iterable[Note]:
    return (note for note in notes if note is not None)
