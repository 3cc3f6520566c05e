"""The times of frames, as the ffmpeg program gives them: rising, whatever the container stores.

Containers store a presentation time per packet, a decoding time, both or neither, and some are wrong. The rules are
those of libavcodec (the more plausible of the two times) and of the ffmpeg program (joined streams, missing times).
"""

from typing import Any

import av

_MICROSECONDS = 1_000_000
# Discontinuities, as in the ffmpeg program: by how much a packet's decoding time may jump ahead of the previous packet's
# end (`dts_delta_threshold`), or fall behind the previous packet, before the streams are taken for joined.
_JUMP_AHEAD = 10 * _MICROSECONDS
_JUMP_BACK = _MICROSECONDS // 10


class JoinedStreams:
    """Shifts packets so that their times continue where the times start again inside a file.

    Recordings that were joined start from their own time each, and times of MPEG streams restart after 26.5 hours (2^33
    ticks of 90 kHz). A jump back is corrected in every container, a jump ahead only where ffmpeg expects
    discontinuities, because elsewhere it is a gap in the recording.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self._base = stream.time_base
        self._jumps_ahead = bool(container.format.flags & av.format.Flags.ts_discont.value)
        self._rate = stream.average_rate
        self._offset = 0  # added to all times, in microseconds, as are the next two
        self._last: int | None = None  # decoding time of the previous packet
        self._next: int | None = None  # when the next packet is due

    def correct(self, packet: Any) -> None:
        """Shift the times of the next packet in place."""
        dts = packet.dts
        if dts is not None:
            self._offset += self._discontinuity(self._to_microseconds(dts) + self._offset)
            if self._offset:
                shift = self._to_ticks(self._offset)
                packet.dts = dts + shift
                packet.pts = None if packet.pts is None else packet.pts + shift
            self._last = self._to_microseconds(dts) + self._offset
        elif self._offset and packet.pts is not None:
            packet.pts += self._to_ticks(self._offset)
        due = self._last if dts is not None else self._next
        if due is not None:
            self._next = due + self._duration(packet)

    def _discontinuity(self, dts: int) -> int:
        """Return the shift, in microseconds, that makes a packet with this decoding time follow the previous one."""
        if self._last is None or self._next is None:
            return 0
        back = dts + _JUMP_BACK < self._last
        ahead = self._jumps_ahead and abs(dts - self._next) > _JUMP_AHEAD
        return self._next - dts if back or ahead else 0

    def _duration(self, packet: Any) -> int:
        if packet.duration:
            return self._to_microseconds(packet.duration)
        return round(_MICROSECONDS / self._rate) if self._rate else 0

    def _to_microseconds(self, ticks: int) -> int:
        return round(ticks * self._base * _MICROSECONDS)

    def _to_ticks(self, microseconds: int) -> int:
        return round(microseconds / self._base / _MICROSECONDS)


class FrameTimes:
    """Gives each decoded frame its time, in ticks of the stream's time base; each is later than the previous one."""

    def __init__(self, container: Any, stream: Any) -> None:
        # Raw streams have no container. The demuxer invents their times, which are those of decoding.
        self._invented = bool(container.format.flags & av.format.Flags.no_timestamps.value)
        self._stream = stream
        self._last: int | None = None
        self._step = 1  # ticks from the previous frame to the next, if the next one has no time
        self._last_pts: int | None = None
        self._wrong_pts = 0
        self._last_dts: int | None = None
        self._wrong_dts = 0

    def of(self, image: Any) -> int:
        """Return the time of the next frame, in ticks."""
        time = None if self._invented else self._more_plausible(image.pts, image.dts)
        if time is None:
            time = 0 if self._last is None else self._last + self._step
        self._step = self._next_step(image, time)
        # Two frames at one time would be indistinguishable to a clip's bounds.
        self._last = time if self._last is None else max(time, self._last + 1)
        return self._last

    def _more_plausible(self, pts: int | None, dts: int | None) -> int | None:
        """Return the presentation time, or the decoding time if it has run back less often so far."""
        known_pts, known_dts = (pts if pts is not None else dts), (dts if dts is not None else pts)
        if dts is not None:
            self._wrong_dts += self._last_dts is not None and dts <= self._last_dts
        if pts is not None:
            self._wrong_pts += self._last_pts is not None and pts <= self._last_pts
        self._last_pts = known_pts if known_pts is not None else self._last_pts
        self._last_dts = known_dts if known_dts is not None else self._last_dts
        if pts is not None and (dts is None or self._wrong_pts <= self._wrong_dts):
            return pts
        return dts

    def _next_step(self, image: Any, time: int) -> int:
        """Return the duration of a frame in ticks, by which a following frame without a time is placed."""
        since = -1 if self._last is None else time - self._last
        duration = image.duration or 0
        # ffmpeg sets a duration of 1 tick if the container has none.
        if duration > 0 and not self._invented and not (duration == 1 and since > 2):
            return int(duration)
        rate = self._stream.codec_context.framerate
        coded = round(1 / rate / self._stream.time_base) if rate else 0
        if coded > 0 and self._invented:
            return coded
        return next((step for step in (since, duration, coded, self._step) if step > 0), 1)
