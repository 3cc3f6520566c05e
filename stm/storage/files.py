"""How results reach the disk: atomically, byte for byte the same from the same inputs, and with a receipt.

Every stage writes through this module. A receipt is a small JSON object that says what made a file: the stage, the
part of the config that it used, the models' hashes and the versions of the libraries. It holds no time and no path of
the machine, so that two runs of the same work give the same bytes.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

import stm
from stm.storage.tables import DamagedError, check_nulls, check_schema, unreadable

RECEIPT_KEY = b"stm.receipt"

_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.tmp")

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""Error numbers that only writing can give: the disk, the quota or the largest file is full, or nothing may be written."""


class UnsafePathError(ValueError):
    """A path from a manifest or an archive that would leave the folder it belongs to."""


def safe_join(root: Path, relative: str) -> Path:
    """`root / relative`, refused when it is absolute or leaves `root`, links resolved.

    Raises:
        UnsafePathError: the path leaves `root`.
    """
    path = Path(relative)
    if path.is_absolute() or "\x00" in relative:
        raise UnsafePathError(f"{relative!r}: paths must be relative to {root}")
    resolved, base = (root / path).resolve(), root.resolve()
    if not resolved.is_relative_to(base):
        raise UnsafePathError(f"{relative!r} leaves its root {root}")
    return root / path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; renamed to it when the block ends well, removed when it does not.

    What processes that were killed have left of earlier attempts at the same file is removed too.

    Raises:
        OSError: the disk is full, for instance; the message says which file was being written. What was at `path`
            before is still there.
    """
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only those of this file: another machine's processes may be writing others into the folder.
        for leftover in _leftovers(path.parent.absolute()).pop(path.name, ()):
            leftover.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says of a full disk which file was being written: the system's own error does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS or error.filename is not None:
            raise
        what = f"{os.strerror(error.errno)}; what was finished before is kept: make room and run again; while writing"
        raise OSError(error.errno, what, str(path)) from error


@cache
def _leftovers(folder: Path) -> dict[str, list[Path]]:
    """Temporary files whose process is gone, by the file that they were for. Asked once a folder: some are large."""
    found: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and not Path("/proc", match[2]).exists():
            found.setdefault(match[1], []).append(path)
    return found


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as sorted, indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_weights(path: Path) -> str:
    """One SHA-256 for a model: of the file, or of the names and bytes of all files in a folder."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def make_receipt(stage: str, settings: Any, libraries: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """What made an output.

    Args:
        stage: the stage's name, `frames` for instance.
        settings: the part of the config that the stage used; a pydantic model or a JSON value.
        libraries: distribution names whose versions matter for the bytes (`av`, `torch`).
        more: further JSON values, such as `model_sha256`, `seed`.
    """
    if hasattr(settings, "model_dump"):
        settings = settings.model_dump(mode="json")
    return {"stage": stage, "settings": settings, "versions": library_versions(libraries), **more}


def library_versions(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of stm and of distributions by name; `missing` where one is not installed."""
    versions = {"stm": stm.__version__}
    for name in libraries:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def hash_receipt(receipt: Mapping[str, Any]) -> str:
    """SHA-256 of a receipt; two receipts with the same hash stand for the same work."""
    return hashlib.sha256(json.dumps(receipt, sort_keys=True).encode()).hexdigest()


def write_table(path: Path, table: pa.Table, receipt: Mapping[str, Any], *, row_group_size: int = 1024) -> None:
    """Writes a Parquet file (zstd) atomically, with the receipt in its schema's metadata."""
    metadata = {RECEIPT_KEY: json.dumps(receipt, sort_keys=True).encode()}
    strings = [f.name for f in table.schema if pa.types.is_string(f.type)]
    with atomic_path(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            temporary,
            compression="zstd",
            use_dictionary=strings,
            row_group_size=row_group_size,
            write_page_checksum=True,
        )


def read_table(path: Path, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Reads a Parquet file and checks its pages' checksums, where it has any.

    Args:
        schema: what the columns must be; of those only these are read. Further columns are left out.

    Raises:
        DamagedError: the file is missing, torn, changed or not Parquet, lacks a column, or has another type than
            `schema` or a null where that allows none; the message names the file, and the row where it is one.
    """
    names = list(columns) if columns is not None else None if schema is None else schema.names
    try:
        if schema is not None:
            check_schema(path, pq.read_schema(path), schema, names)
        table = pq.read_table(path, columns=names, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    if schema is not None:
        check_nulls(path, table, schema)
    return table


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt of a Parquet file that `write_table` wrote; empty when it has none.

    Raises:
        DamagedError: the file is no Parquet table, or its receipt no JSON object.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error
    try:
        receipt = json.loads(metadata.get(RECEIPT_KEY, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: its receipt is no JSON ({error}); remove it and run again") from error
    if not isinstance(receipt, dict):
        raise DamagedError(f"{path}: its receipt is no JSON object; remove it and run again")
    return receipt


class Member(NamedTuple):
    """Where one file lies inside a tar."""

    name: str
    offset: int  # bytes from the start of the tar to the file's first byte
    size: int  # bytes
    sha256: str


class TarWriter:
    """An uncompressed tar whose bytes depend on its members alone: no times, no owners, no order but yours."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes, sha256: str | None = None) -> Member:
        """Adds a member; `sha256` is that of the data, where it is known already."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._tar.addfile(info, io.BytesIO(data))
        vars(self._tar)["members"].clear()  # a list for reading only, which would grow with the shard
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return Member(name, self._tar.offset - padded, len(data), sha256 or hashlib.sha256(data).hexdigest())

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:  # a tar that is given up needs no end, and on a full disk there is no room for one
                self._tar.close()
        finally:
            self._file.close()


def read_member(tar: int, offset: int, size: int) -> bytes:
    """Reads `size` bytes at `offset` of an open file descriptor; several threads may share the descriptor.

    Raises:
        DamagedError: the file has no such bytes.
        OSError: the disk or the network has failed.
    """
    try:
        data = os.pread(tar, size, offset)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR):  # a place that no file has; a folder in the tar's place
            raise DamagedError(f"it has no {size} bytes at {offset}: {error.strerror}") from error
        raise
    if len(data) != size:
        raise DamagedError(
            f"the tar ends {size - len(data)} bytes before the end of the member at {offset}: torn file?"
        )
    return data


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
            with _named(path):
                temporary.write_bytes(hashlib.sha256(data).digest() + data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the journal; call it once the output is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)


def local_model_files(model: str | None) -> list[str]:
    """The files behind a model id of the config, when it is local; hub ids have none.

    Understands a folder, `local-dir:folder`, `transformers:folder` and `architecture@checkpoint-file`. A workflow
    names them as inputs, so that other weights rerun what was made with the old ones.
    """
    found = _find_local(model or "")
    if found is None:
        return []
    _, path = found
    if path.is_file():
        return [path.as_posix()]
    return sorted(p.as_posix() for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings with a local `model` or `weights` by its own name, without the folders that lead to it.

    `local-dir:/data/clip` becomes `local-dir:clip`; hub ids stay as they are.
    """
    plain = dict(settings)
    for key in ("model", "weights"):
        found = _find_local(plain.get(key) or "")
        if found is not None:
            before, path = found
            plain[key] = f"{before}{path.resolve().name}"
    return plain


def _find_local(model: str) -> tuple[str, Path] | None:
    """Where a local model lies, and what its id says before that."""
    prefix = next((known for known in ("local-dir:", "transformers:") if model.startswith(known)), "")
    name = model.removeprefix(prefix)
    architecture, sign, checkpoint = name.partition("@")
    for before, path in ((prefix, name), (f"{prefix}{architecture}{sign}", checkpoint)):
        if path and (Path(path).expanduser().is_dir() or Path(path).expanduser().is_file()):
            return before, Path(path).expanduser()
    return None
