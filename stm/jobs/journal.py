"""What a job has finished before it is finished itself, kept so that a restarted job continues."""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stm.storage.files import name_file_of_full_disk, write_bytes
from stm.storage.receipts import hash_receipt


class Journal:
    """Finished items of a job that is not finished yet, kept beside its output.

    Snakemake deletes the declared outputs of a failed or killed job. What a long job has already done is therefore
    kept under an undeclared folder, one file an item, and used again when the job is restarted with the same receipt.
    A journal of other settings is thrown away.

    >>> journal = Journal(Path("frames/train-00000.tar"), receipt)   # doctest: +SKIP
    >>> journal.get("clip-1")                                        # doctest: +SKIP
    """

    def __init__(self, output: Path, receipt: Mapping[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.journal")
        stamp, current = self.folder / "receipt", hash_receipt(receipt)
        if self.folder.exists() and (not stamp.exists() or stamp.read_bytes() != current.encode()):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not stamp.exists():
            write_bytes(stamp, current.encode())

    def _path(self, item: str) -> Path:
        return self.folder / hashlib.sha256(item.encode()).hexdigest()[:32]

    def get(self, item: str) -> bytes | None:
        """The bytes stored for `item`; None when it was not finished."""
        path = self._path(item)
        if not path.exists():
            return None
        data = path.read_bytes()
        # A power cut can leave a renamed file whose blocks never reached the disk: the checksum in front tells.
        return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None

    def put(self, item: str, data: bytes) -> None:
        path = self._path(item)
        temporary = path.with_suffix(".tmp")
        try:
            with name_file_of_full_disk(path):
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the journal; call it once the output is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)
