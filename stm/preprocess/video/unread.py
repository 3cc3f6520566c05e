"""Parts of a file that the demuxer could not read and skipped: damage, or holes of a copy that was not finished."""

from pathlib import Path
from typing import Any

from stm.preprocess.video.truncation import FEWEST_ZEROS, LEAST_UNREAD, is_element

_MATROSKA, _AVI = "matroska,webm", "avi"
# Containers whose packets are in pieces, with other data between them: only zeros are evidence. Pieces of silent sound
# hold fewer zeros.
_IN_PIECES = ("mpegts", "ogg", "asf")
_BLOCK_HEADER = 4  # bytes; in Matroska, a packet's position is that of its header
_LARGEST_PART = 2**26  # bytes; larger parts are not searched for zeros


class UnreadParts:
    """Follows the packets of all streams of a file in the order in which they are stored.

    Attributes:
        streams: the streams whose packets are needed for this; None if the container is not one of those above.
        end: where the packets that have been read end, in bytes, as far as this is known.
    """

    def __init__(self, path: Path, container: Any) -> None:
        self._path = path
        self._format = container.format.name
        self.streams = container.streams.get() if self._format in (_MATROSKA, _AVI, *_IN_PIECES) else None
        self.end = 0
        self._expected = LEAST_UNREAD  # bytes between the positions of packets that need no explanation

    def before(self, packet: Any) -> bool:
        """Add the next packet, and return whether a part of the file between it and those before could not be read."""
        if self.streams is None or packet.pos is None:
            return False
        skipped = 0 < self.end < packet.pos - self._expected and self._is_damaged(self.end, packet.pos)
        if self._format in _IN_PIECES:
            # Files are read again only where a part is larger than the pieces of a packet in it can explain.
            self._expected = FEWEST_ZEROS + packet.size * 5 // 4
            self.end = max(self.end, packet.pos)
        else:
            header = _BLOCK_HEADER if self._format == _MATROSKA else packet.size % 2
            self.end = max(self.end, packet.pos + packet.size + header)
        return skipped

    def _is_damaged(self, start: int, end: int) -> bool:
        """Whether a part of the file that holds no packet, or one in pieces, is damaged."""
        with self._path.open("rb") as file:
            if self._format == _MATROSKA:
                return not is_element(file, start)
            file.seek(start)
            if self._format == _AVI:  # a chunk of another kind, or of a stream that is not read, has a name
                return not file.read(4).isalnum()
            return bytes(FEWEST_ZEROS) in file.read(min(end - start, _LARGEST_PART))
