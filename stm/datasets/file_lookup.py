"""Looks up files under a dataset's root: walks its folders, and finds the files of paths in annotations."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from stm.datasets.file_names import SimilarNames, same_spelling
from stm.jobs.status import Status
from stm.storage.files import UnsafePathError, safe_join
from stm.storage.machine_errors import is_machine_error


def walk_files(
    root: Path, unreadable: list[tuple[str, str]], hidden: list[str] | None = None
) -> Iterator[tuple[str, bool]]:
    """(relative path, whether it is a link) per file or link, sorted because `scandir` order is machine-dependent.

    Hidden files and folders are skipped, and linked folders are not entered.

    Args:
        unreadable: receives (relative path, reason) of each subfolder that may not be entered.
        hidden: receives the relative paths of what is skipped; those of folders end with /.

    Raises:
        OSError: a folder cannot be read for another reason, such as a failing disk, or `root` may not be entered.
    """
    yield from _walk(root, "", unreadable, [] if hidden is None else hidden)


def _walk(
    folder: Path, prefix: str, unreadable: list[tuple[str, str]], hidden: list[str]
) -> Iterator[tuple[str, bool]]:
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        if not prefix:
            raise
        unreadable.append((prefix.removesuffix("/"), error.strerror or "permission denied"))
        return
    for entry in inside:
        if entry.name.startswith("."):
            hidden.append(f"{prefix}{entry.name}{'/' if entry.is_dir() else ''}")
        elif entry.is_symlink():
            yield prefix + entry.name, True
        elif entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", unreadable, hidden)
        else:
            yield prefix + entry.name, False


class FileLookup:
    """Finds files by the paths in annotations. Each folder is resolved once, because datasets have millions of files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._safe_folders: set[str] = set()
        self._names: dict[str, dict[str, list[str]]] = {}  # by folder: names that are not ASCII, by their NFC form
        self._similar: dict[str, SimilarNames] = {}  # by folder

    def find(self, path: str) -> tuple[str, Status | None, str]:
        """(path as on disk, why it is unusable, detail); the status is None if the file is usable.

        A path is tried as written, then without surrounding white space, then with accents composed in another way.

        Raises:
            OSError: the machine cannot say whether there is a file, for instance because its disk fails.
        """
        status, detail = self._check(path)
        if status is not Status.MISSING_FILE:
            return path, status, detail
        for other in (path.strip(), self._other_spelling(path.strip())):
            if other is not None and other != path and self._check(other)[0] is None:
                return other, None, ""
        return path, status, detail

    def join(self, path: str) -> Path:
        """The file of a path, as `safe_join`.

        Raises:
            UnsafePathError: the path leaves the root.
        """
        folder, _, name = path.rpartition("/")
        if name in ("", ".", "..") or path.startswith("/") or "\x00" in path:
            return safe_join(self.root, path)
        if folder not in self._safe_folders:
            safe_join(self.root, folder)
            self._safe_folders.add(folder)
        file = self.root / path
        return safe_join(self.root, path) if file.is_symlink() else file

    def _check(self, path: str) -> tuple[Status | None, str]:
        try:
            mode = os.stat(self.join(path)).st_mode  # noqa: PTH116 (`Path.stat` takes twice as long)
        except UnsafePathError:
            return (
                Status.PATH_OUTSIDE_ROOT,
                "the path must be relative to dataset.root and stay under it, links resolved",
            )
        except (FileNotFoundError, NotADirectoryError):
            hint = "; folders are separated by /" if "\\" in path else ""
            return Status.MISSING_FILE, f"there is no such file{hint}"
        except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, or a symlink loop
            if is_machine_error(error):
                raise
            reason = getattr(error, "strerror", None) or type(error).__name__
            return Status.MISSING_FILE, f"cannot be looked up: {reason}"
        return (None, "") if stat.S_ISREG(mode) else (Status.MISSING_FILE, "it is not a regular file")

    def _other_spelling(self, path: str) -> str | None:
        """The path as on disk, if exactly one differs from it only in the composition of accents."""
        parts = path.split("/")
        if path.isascii() or ".." in parts or parts[0] == "":
            return None
        found: list[str] = []
        for part in parts:
            names = [part] if part.isascii() else self._names_in("/".join(found)).get(same_spelling(part), [])
            if part in names:
                names = [part]
            if len(names) != 1:
                return None
            found += names
        return "/".join(found)

    def similar(self, path: str) -> list[str]:
        """The names in the same folder under which a missing file may be there, for messages."""
        folder, _, name = path.strip().rpartition("/")
        if folder not in self._similar:
            self._similar[folder] = SimilarNames(self._list(folder))
        return [other for other in self._similar[folder].find(name) if other != name]

    def _list(self, folder: str) -> list[str]:
        """The names in a folder; empty if it does not exist or lies outside the root."""
        try:
            return os.listdir(self.join(f"{folder}/x").parent)  # noqa: PTH208 (names suffice)
        except UnsafePathError:
            return []
        except (OSError, ValueError) as error:
            if is_machine_error(error):
                raise
            return []

    def _names_in(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._names:
            names: dict[str, list[str]] = {}
            try:
                for name in os.listdir(self.root / folder):  # noqa: PTH208 (names suffice)
                    if not name.isascii():
                        names.setdefault(same_spelling(name), []).append(name)
            except OSError as error:
                if is_machine_error(error):
                    raise
            self._names[folder] = names
        return self._names[folder]
