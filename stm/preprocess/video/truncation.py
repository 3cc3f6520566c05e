"""Evidence that a file was cut off: its own structure places bytes behind its end, or where there are only zeros.

Zeros at the end are those of a download that reserved its space and was not finished, zeros elsewhere are holes.

Counts and durations in containers are no evidence. Most are estimates, and they differ from what a player shows in many
complete files: AVI counts frames that it does not store, Matroska's duration is that of its longest stream.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_OGG_PAGE = 27 + 255 + 255 * 255  # bytes; the largest page
_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675  # in Matroska; the last two may have no size
_WITH_FRAMES = {_CLUSTER, 0xA3, 0xA0, 0xE7, 0xAB}  # a cluster and its SimpleBlock, BlockGroup, Timestamp, PrevSize
# Cues, Tags, Chapters, Attachments, SeekHead and Void, which hold no frames.
_AFTER_CLUSTERS = {0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, 0x114D9B74, 0xEC}
# BlockAdditions, DiscardPadding, BlockDuration, ReferenceBlock, ReferencePriority and CRC-32, which accompany a block.
_BESIDE_BLOCK = {0x75A1, 0x75A2, 0x9B, 0xFB, 0xFA, 0xBF}
LEAST_UNREAD = 1024  # bytes between packets; the headers of elements take fewer
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_RIFF_SLACK = 8  # bytes; some writers count the header of a chunk as part of it
FEWEST_ZEROS = 4096  # bytes at the end of a file that are taken for missing ones; formats pad with fewer
_ZERO_SLACK = 8  # bytes; zeros at the end of the last element belong to it
_FLV_TAGS = {8, 9, 18}
_PROGRAM_END = b"\0\0\1\xb9"


class Progress(NamedTuple):
    """How far a file has been read, in bytes."""

    last_packet: (
        int | None
    )  # where the last packet of the stream begins; in MPEG and GIF files, where its element begins
    end: int  # where the packets of all streams that were read end, as far as this is known


def is_cut_off(path: Path, container: str, stream: Any, progress: Progress) -> bool:
    """Whether the structure of a file extends beyond its end. Call it after reading, when ffmpeg's index is complete.

    Only mp4 tells this for one stream; in other containers, the lost bytes may be those of the sound. A cut between two
    elements of a stream without an index (MPEG, Ogg, FLV, raw video, fragments) leaves no trace.

    Args:
        path: the file.
        container: ffmpeg's name for its container.
        stream: the PyAV video stream.
        progress: how far it was read.

    Raises:
        OSError: the disk or the network fails.
    """
    check = _CHECKS.get(container)
    if check is None:
        return False
    with path.open("rb") as file:
        size = path.stat().st_size
        if stream.codec_context.codec.lossy:  # lossless frames of a black picture may be zeros
            size = _without_zeros(file, size)
        if container == _MP4:
            lost = any(entry.pos + entry.size > size for entry in stream.index_entries)
            if lost or not _is_last_sample(stream, progress.last_packet):
                return True
        return check(file, size, progress)


def _without_zeros(file: BinaryIO, size: int) -> int:
    """Return the size of a file without the zeros at its end, if there are many."""
    end = size
    while end:
        start = max(0, end - 2**20)
        file.seek(start)
        data = file.read(end - start).rstrip(b"\0")
        end = start + len(data)
        if data:
            break
    return size if size - end < FEWEST_ZEROS else end + _ZERO_SLACK


def _is_last_sample(stream: Any, position: int | None) -> bool:
    """Whether a packet is the last of the index. ffmpeg stops reading if a sample of the sound is behind the end."""
    samples = (entry for entry in reversed(stream.index_entries) if entry.size)
    last = next(samples, None)
    return last is None or last.pos == position


def _cut_boxes(file: BinaryIO, size: int, progress: Progress) -> bool:
    """Mp4: whether the index or a fragment is incomplete. Without fragments, a complete index knows every sample."""
    fragmented = False
    for kind, end in _boxes(file, size):
        if not any(kind):  # zeros: a hole, unless they are those behind the end
            return fragmented and end < size - FEWEST_ZEROS
        fragmented |= kind == b"moof"
        if end > size:
            return kind == b"moov" or (fragmented and kind in (b"moof", b"mdat"))
    return False


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield the type of each top-level box and the position of its end."""
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1 and len(header) == 16:
            length = int.from_bytes(header[8:], "big")
        if length < 8 and any(header[:8]):  # 0: up to the end of the file
            return
        position += length
        yield header[4:8], position


def _cut_riff(file: BinaryIO, size: int, progress: Progress) -> bool:
    """AVI: whether a list of frames extends beyond the end."""
    return any(kind == b"movi" and end > size + _RIFF_SLACK for kind, end in _riff_lists(file, size))


def _riff_lists(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Yield the type of each list and the position of its end."""
    position = 0
    while position + 12 <= size:
        file.seek(position)
        header = file.read(12)
        length = int.from_bytes(header[4:8], "little")
        if header[:4] == b"RIFF":
            position += 12
            continue
        if length in (0, 0xFFFFFFFF):  # a recorder that was stopped before it wrote the sizes
            return
        position += 8 + length + length % 2
        if header[:4] == b"LIST":
            yield header[8:], position


def _cut_ebml(file: BinaryIO, size: int, progress: Progress) -> bool:
    """Matroska: whether a cluster is incomplete or was not read, or the segment ends before its declared end."""
    position, segment_end, clusters, identifier, frames_end = 0, 0, 0, 0, 0
    while position < size:
        file.seek(position)
        header = file.read(12)
        identifier, used = _ebml_number(header, keep_marker=True)
        length, more = _ebml_number(header[used:], keep_marker=False)
        if clusters and not any(header):  # zeros: a hole, unless they are those behind the end
            return position < size - FEWEST_ZEROS
        if not used or not more or (segment_end and position >= segment_end and identifier != _EBML):
            break  # something else was appended, or the header of an element is incomplete
        position += used + more
        known = length != (1 << 7 * more) - 1
        clusters += identifier == _CLUSTER
        if identifier == _SEGMENT:
            segment_end = position + length if known else 0
        elif known:
            position += length
        elif identifier != _CLUSTER:
            break
        if identifier in _WITH_FRAMES and position <= size:
            frames_end = position
    if (position > size and identifier in _WITH_FRAMES) or _is_unread(file, progress.end, frames_end):
        return True
    complete = position > size and clusters and identifier in _AFTER_CLUSTERS
    return not complete and segment_end > size


def _is_unread(file: BinaryIO, read: int, frames_end: int) -> bool:
    """Matroska: whether the reader gave up before the end of the last cluster."""
    return 0 < read < frames_end - LEAST_UNREAD and not is_element(file, read)


def is_element(file: BinaryIO, position: int) -> bool:
    """Matroska: whether an element that holds no packet begins here; `position` follows a packet."""
    file.seek(position)
    identifier, _ = _ebml_number(file.read(12), keep_marker=True)
    return identifier in _AFTER_CLUSTERS or identifier in _BESIDE_BLOCK


def _ebml_number(data: bytes, keep_marker: bool) -> tuple[int, int]:
    """Return a variable-length number and how many bytes it takes; 0 bytes if there is none."""
    if not data or not data[0]:
        return 0, 0
    count = 9 - data[0].bit_length()
    if len(data) < count:
        return 0, 0
    number = int.from_bytes(data[:count], "big")
    return (number if keep_marker else number ^ (1 << 7 * count)), count


def _cut_mxf(file: BinaryIO, size: int, progress: Progress) -> bool:
    """MXF: whether the footer, whose position the header knows once the file has been closed, is behind the end."""
    file.seek(0)
    header = file.read(17 + 8 + 40)
    used = 17 + (header[16] & 0x7F if header[16:17] > b"\x80" else 0)  # a key of 16 bytes, and a length
    return int.from_bytes(header[used + 24 : used + 32], "big") >= size


def _cut_asf(file: BinaryIO, size: int, progress: Progress) -> bool:
    """ASF (wmv): whether the object with the packets extends beyond the end."""
    position = 0
    while position + 24 <= size:
        file.seek(position)
        header = file.read(24)
        length = int.from_bytes(header[16:], "little")
        if not 24 <= length < 1 << 62:  # a broadcast, whose size was not known
            return False
        position += length
        if header[:16] == _ASF_DATA:
            return position > size
    return False


def _cut_transport(file: BinaryIO, size: int, progress: Progress) -> bool:
    """MPEG transport stream: whether the last packet is incomplete."""
    for length in (188, 192, 204):
        tail = _read_tail(file, size, 8 * length)
        for first in range(min(length, len(tail))):
            if len(tail) > 3 * length and set(tail[first::length]) == {0x47}:
                before = 4 if length == 192 else 0  # m2ts: each packet follows its arrival time
                return (len(tail) - first + before) % length > before
    return False


def _cut_ogg(file: BinaryIO, size: int, progress: Progress) -> bool:
    """Ogg: whether the last page is incomplete."""
    tail = _read_tail(file, size, _OGG_PAGE)
    start = tail.rfind(b"OggS")
    if start < 0:
        return False
    page = tail[start:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return 27 + page[26] + sum(page[27 : 27 + page[26]]) > len(page)


def _read_tail(file: BinaryIO, size: int, length: int) -> bytes:
    start = max(0, size - length)
    file.seek(start)
    return file.read(size - start)


def _cut_flv(file: BinaryIO, size: int, progress: Progress) -> bool:
    """FLV: whether a tag is incomplete, beginning with that of the last packet."""
    position = progress.last_packet or size
    while position < size:
        file.seek(position)
        header = file.read(11)
        if header[0] not in _FLV_TAGS:
            return False
        end = position + 11 + int.from_bytes(header[1:4], "big")
        if len(header) < 11 or end > size:
            return True
        position = end + 4  # the size of the tag follows
    return False


def _cut_program(file: BinaryIO, size: int, progress: Progress) -> bool:
    """MPEG program stream: whether a packet is incomplete, beginning with the last one with a start of a frame."""
    position = progress.last_packet or size
    while position < size:
        file.seek(position)
        header = file.read(14)
        if header[:3] != b"\0\0\1" or len(header) < 14:
            return header[:4] != _PROGRAM_END and b"\0\0\1".startswith(header[:3])
        if header[3] == 0xBA:
            position += 14 + (header[13] & 7) if header[4] >> 6 == 1 else 12
        elif header[3] > 0xBA:
            position += 6 + int.from_bytes(header[4:6], "big")
        else:
            return False
    return position > size


def _cut_gif(file: BinaryIO, size: int, progress: Progress) -> bool:
    """GIF: whether the file ends, or a hole begins, within the last image that was read."""
    start = progress.last_packet or 0
    data = _read_tail(file, size, size - start)
    place = 13 + _palette(data[10]) if data[:3] == b"GIF" else 0
    while place < len(data) and data[place] in b"!,":
        if data[place] == 0x21:
            place += 2
        else:
            place += 11 + _palette(data[place + 9]) if place + 9 < len(data) else 11
        while place < len(data) and data[place]:
            place += 1 + data[place]
        place += 1  # the empty block that ends the list
    return place > len(data) or (place < len(data) and data[place] == 0)


def _palette(flags: int) -> int:
    """GIF: the size of a palette in bytes."""
    return 3 << 1 + (flags & 7) if flags & 0x80 else 0


_CHECKS: dict[str, Callable[[BinaryIO, int, Progress], bool]] = {
    _MP4: _cut_boxes,
    "matroska,webm": _cut_ebml,
    "avi": _cut_riff,
    "asf": _cut_asf,
    "mxf": _cut_mxf,
    "mpegts": _cut_transport,
    "ogg": _cut_ogg,
    "flv": _cut_flv,
    "mpeg": _cut_program,
    "gif": _cut_gif,
}
