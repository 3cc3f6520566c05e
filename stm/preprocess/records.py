"""A JSON object and a few blobs in one string of bytes: how a worker hands a finished clip over through the journal.

Layout: length of the JSON text (8 bytes, little endian), the text, then the blobs one after another; `sizes` in the
text says how long each is.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stm.jobs.workers import Failure
from stm.manifest import Status
from stm.preprocess.outcome import Note
from stm.storage.files import Journal


class Record(NamedTuple):
    """What a worker found out about a clip."""

    header: dict[str, Any]
    notes: list[Note]
    blobs: list[bytes]


def pack_record(header: Mapping[str, Any], notes: Sequence[Note], blobs: Sequence[bytes] = ()) -> bytes:
    """One string of bytes for a clip: JSON values, what was noticed about it, and blobs."""
    noted = [[str(note.status), note.detail] for note in notes]
    text = json.dumps({"header": dict(header), "notes": noted, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])


def unpack_record(data: bytes) -> Record:
    start = 8 + int.from_bytes(data[:8], "little")
    values = json.loads(data[8:start])
    blobs = []
    for size in values["sizes"]:
        blobs.append(data[start : start + size])
        start += size
    notes = [Note(Status(status), detail) for status, detail in values["notes"]]
    return Record(values["header"], notes, blobs)


def read_record(journal: Journal, item: str, failures: Mapping[str, Failure]) -> Record:
    """A clip's record; for one without, because its process was killed, a record with nothing but that note."""
    data = journal.get(item)
    if data is not None:
        return unpack_record(data)
    failure = failures[item]
    return Record({}, [Note(failure.status, failure.detail)], [])


def name_item(row: Mapping[str, Any]) -> str:
    """A clip's name in a journal: another file, or another part of it, under the same key is another item."""
    return json.dumps([row.get(name) for name in ("key", "path", "start", "end", "bytes", "sha256")])
