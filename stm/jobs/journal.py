"""Journals: the finished items of an unfinished job, from which a restarted job resumes."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stm.storage.files import name_file_in_disk_errors, write_bytes
from stm.storage.receipts import hash_receipt


class Journal:
    """The finished items of an unfinished job, stored next to its output.

    Snakemake deletes the declared outputs of a failed or killed job. Finished items are therefore stored in an undeclared
    folder, one file per item, and reused when the job is restarted with the same receipt. A journal with a different
    receipt is deleted.

    >>> journal = Journal(Path("frames/train-00000.tar"), receipt)   # doctest: +SKIP
    >>> journal.get("clip-1")                                        # doctest: +SKIP
    """

    def __init__(self, output: Path, receipt: Mapping[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.journal")
        receipt_file = self.folder / "receipt"
        current = hash_receipt(receipt).encode()
        if self.folder.exists() and (not receipt_file.exists() or receipt_file.read_bytes() != current):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not receipt_file.exists():
            write_bytes(receipt_file, current)

    def _path(self, item: str) -> Path:
        # Hashed, because an item's name may be too long for a file name or contain a slash.
        return self.folder / hashlib.sha256(item.encode()).hexdigest()[:32]

    def get(self, item: str) -> bytes | None:
        """Return the bytes stored for `item`; None if the item is not finished."""
        path = self._path(item)
        if not path.exists():
            return None
        data = path.read_bytes()
        # A power cut can leave a renamed file whose blocks never reached the disk; the checksum at its start detects this.
        return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None

    def put(self, item: str, data: bytes) -> None:
        """Store the bytes of a finished item."""
        path = self._path(item)
        temporary = path.with_suffix(".tmp")
        try:
            with name_file_in_disk_errors(path):
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Delete the journal; call this once the output is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
