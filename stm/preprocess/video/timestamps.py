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
    """Shifts packets so that their times continue where the times start again inside an MPEG or Ogg stream.

    Recordings that were joined start from their own time each, and the times of MPEG streams restart after 26.5 hours
    (2^33 ticks of 90 kHz). Packets of other containers are left alone: their decoding times jump at edits.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self._discontinuous = bool(container.format.flags & av.format.Flags.ts_discont.value)
        self._base = stream.time_base
        self._rate = stream.average_rate
        self._offset = 0  # added to all times, in microseconds, as are the next two
        self._last: int | None = None  # decoding time of the previous packet
        self._next: int | None = None  # when the next packet is due

    def correct(self, packet: Any) -> None:
        """Shift the times of the next packet in place."""
        if not self._discontinuous:
            return
        if packet.dts is not None:
            self._offset += self._discontinuity(self._to_microseconds(packet.dts) + self._offset)
        shift = self._to_ticks(self._offset)
        packet.pts = None if packet.pts is None else packet.pts + shift
        if packet.dts is not None:
            packet.dts += shift
            self._last = self._next = self._to_microseconds(packet.dts)
        if self._next is not None:
            self._next += self._duration(packet)

    def _discontinuity(self, dts: int) -> int:
        """Return the shift, in microseconds, that makes a packet with this decoding time follow the previous one."""
        if self._last is None or self._next is None:
            return 0
        jumps = dts + _JUMP_BACK < self._last or abs(dts - self._next) > _JUMP_AHEAD
        return self._next - dts if jumps else 0

    def _duration(self, packet: Any) -> int:
        if packet.duration:
            return self._to_microseconds(packet.duration)
        return round(_MICROSECONDS / self._rate) if self._rate else 0

    # In integers, because fractions take longer than all the rest.
    def _to_microseconds(self, ticks: int) -> int:
        numerator, denominator = self._base.numerator * _MICROSECONDS, self._base.denominator
        return int(2 * ticks * numerator + denominator) // (2 * denominator)

    def _to_ticks(self, microseconds: int) -> int:
        numerator, denominator = self._base.numerator * _MICROSECONDS, self._base.denominator
        return int(2 * microseconds * denominator + numerator) // (2 * numerator)


class FrameTimes:
    """Gives each decoded frame its time, in ticks of the stream's time base; each is later than the previous one."""

    def __init__(self, container: Any, stream: Any) -> None:
        # Raw streams have no container. The demuxer invents their times, which are those of decoding.
        self._invented = bool(container.format.flags & av.format.Flags.no_timestamps.value)
        self._stream = stream
        self._time: int | None = None  # of the previous frame, as the ffmpeg program gives it
        self._step = 1  # ticks from the previous frame to the next, if the next one has no time
        self._offset = 0  # ticks; not 0 after the times have started again
        self._jump_back = round(_JUMP_BACK / _MICROSECONDS / stream.time_base)
        self._shown: int | None = None  # the time given to the previous frame
        self._last_pts: int | None = None
        self._wrong_pts = 0
        self._last_dts: int | None = None
        self._wrong_dts = 0

    def of(self, image: Any) -> int:
        """Return the time of the next frame, in ticks."""
        time = None if self._invented else self._more_plausible(image.pts, image.dts)
        due = 0 if self._time is None else self._time + self._step
        time = due if time is None else self._continued(time, due)
        # The last frames, which the decoder returns at the end, have no decoding times, by which those before were placed.
        if image.dts is None and self._wrong_pts > self._wrong_dts and time < due:
            time = due
        self._step = self._next_step(image, time)
        self._time = time
        # The times of badly muxed files may run back by a frame even so. Clip bounds need an order.
        self._shown = time if self._shown is None else max(time, self._shown + 1)
        return self._shown

    def _continued(self, stored: int, due: int) -> int:
        """Return the time of a frame, shifted if the stored times have started again, as in joined Matroska files."""
        time = stored + self._offset
        if self._time is not None and time < self._time - self._jump_back:
            self._offset, time = due - stored, due
        elif self._offset and abs(stored - due) < abs(time - due):  # only single frames had a wrong time
            self._offset, time = 0, stored
        return time

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
        since = -1 if self._time is None else time - self._time
        duration = image.duration or 0
        # ffmpeg sets a duration of 1 tick if the container has none.
        if duration > 0 and not self._invented and not (duration == 1 and since > 2):
            return int(duration)
        rate = self._stream.codec_context.framerate
        coded = round(1 / rate / self._stream.time_base) if rate else 0
        if coded > 0 and self._invented:
            return coded
        return next((step for step in (since, duration, coded, self._step) if step > 0), 1)
