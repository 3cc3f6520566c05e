"""The crop in the header of an H.264 stream, which the decoder applies to pixels but not to motion vectors.

Codecs other than H.264 whose motion vectors are exported crop only at the right and the bottom, if at all.
"""

# Profiles whose header also describes the chroma format (ITU-T H.264, 7.3.2.1.1).
_WITH_CHROMA_FORMAT = frozenset([100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135])
_SEQUENCE_HEADER = 7


def read_origin(extradata: bytes | None) -> tuple[int, int]:
    """Return how many pixels an H.264 stream crops at the left and the top of its frames; (0, 0) if it does not say.

    Args:
        extradata: the codec's headers, in the form of MP4 files or of transport streams.
    """
    try:
        return _parse(_Bits(_find_header(extradata or b"")))
    except IndexError:  # no header, or a damaged one, which the decoder will report
        return 0, 0


def _find_header(data: bytes) -> bytes:
    """Return the first sequence parameter set, without its NAL header.

    Raises:
        IndexError: there is none.
    """
    if data[0] == 1:  # MP4: version, profile, ..., the number of headers, the length of the first one
        return data[9 : 8 + int.from_bytes(data[6:8], "big")]
    units = [unit for unit in data.split(b"\0\0\1")[1:] if unit and unit[0] & 31 == _SEQUENCE_HEADER]
    return units[0][1:]


class _Bits:
    """Reads fields of a header bit by bit; IndexError behind its end."""

    def __init__(self, data: bytes) -> None:
        # The third byte of 0 0 3 only prevents that the data looks like the start of a unit.
        self._data = data.replace(b"\0\0\3", b"\0\0")
        self._place = 0

    def read(self, bits: int) -> int:
        """Return an unsigned number of a fixed length."""
        value = 0
        for place in range(self._place, self._place + bits):
            value = 2 * value + (self._data[place // 8] >> (7 - place % 8) & 1)
        self._place += bits
        return value

    def number(self) -> int:
        """Return an unsigned Exp-Golomb number."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)

    def signed(self) -> int:
        """Return a signed Exp-Golomb number."""
        value = self.number()
        return (value + 1) // 2 if value % 2 else -value // 2

    def numbers(self, count: int) -> list[int]:
        """Return several unsigned Exp-Golomb numbers."""
        return [self.number() for _ in range(count)]


def _parse(bits: _Bits) -> tuple[int, int]:
    profile = bits.read(8)
    bits.read(16)  # constraints, level
    bits.number()  # id
    chroma_format = _skip_chroma(bits) if profile in _WITH_CHROMA_FORMAT else 1
    bits.number()  # length of frame numbers
    order = bits.number()
    if order == 0:
        bits.number()
    elif order == 1:
        bits.read(1)
        bits.numbers(2)
        bits.numbers(bits.number())
    bits.number()  # reference frames
    bits.read(1)
    bits.numbers(2)  # size in macroblocks
    whole_frames = bits.read(1)
    if not whole_frames:
        bits.read(1)
    bits.read(1)
    if not bits.read(1):
        return 0, 0
    left, _, top, _ = bits.numbers(4)
    across = 2 if chroma_format in (1, 2) else 1
    down = (2 if chroma_format == 1 else 1) * (2 - whole_frames)
    return left * across, top * down


def _skip_chroma(bits: _Bits) -> int:
    """Read up to the scaling matrices, and return the chroma format: 0 is grey, 1 is 4:2:0, 2 is 4:2:2, 3 is 4:4:4."""
    chroma_format = bits.number()
    if chroma_format == 3:
        bits.read(1)
    bits.numbers(2)  # bit depths
    bits.read(1)
    if bits.read(1):
        for matrix in range(12 if chroma_format == 3 else 8):
            if bits.read(1):
                _skip_matrix(bits, 16 if matrix < 6 else 64)
    return chroma_format


def _skip_matrix(bits: _Bits, size: int) -> None:
    scale = 8
    for _ in range(size):
        scale = (scale + bits.signed()) % 256
        if scale == 0:  # the rest of the matrix repeats the last value
            return
