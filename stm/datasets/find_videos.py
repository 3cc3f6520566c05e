"""An index by name of the videos under a folder, built in one directory walk without opening any file."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

from stm.datasets.file_lookup import walk_files
from stm.datasets.file_names import ARCHIVE_ENDINGS, COPY_ENDINGS, SimilarNames, bare_name, folded
from stm.datasets.folder import check_root
from stm.datasets.official_lists import Entry
from stm.jobs.status import Status
from stm.storage.files import UnsafePathError, safe_join


@dataclass
class Videos:
    """The video files under a folder; paths are relative to it, with forward slashes."""

    root: Path
    by_name: dict[str, list[str]] = field(default_factory=dict)  # paths by file name without extension
    links: set[str] = field(default_factory=set)
    linked_folders: list[str] = field(default_factory=list)  # not searched, because links can form cycles
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (folder, reason): those that may not be entered
    others: dict[str, list[str]] = field(default_factory=dict)  # paths of all other files, by their whole name

    def candidates(self, name: str) -> list[str]:
        """Files with this name; else files whose name differs only in case or in how accents are composed; else files
        whose name also differs in the endings of videos, such as `x.mov.mp4` for `x`.
        """
        if name in self.by_name:
            return self.by_name[name]
        names = self._by_bare_name.get(folded(bare_name(name)), [])
        same = [other for other in names if folded(other) == folded(name)]
        return [path for other in same or names for path in self.by_name[other]]

    @cached_property
    def _by_bare_name(self) -> dict[str, list[str]]:
        """The keys of `by_name`, by their folded name without any endings of videos."""
        names: dict[str, list[str]] = {}
        for name in self.by_name:
            names.setdefault(folded(bare_name(name)), []).append(name)
        return names

    def find(self, entry: Entry, shared: bool) -> str | None:
        """The file of an entry; None if no file matches.

        Args:
            shared: whether entries in other folders have the same file name, so that the folder must match as well.
        """
        whole = entry.clip.path.rpartition("/")[2]
        by_name = (self.candidates(name) for name in (entry.name, *entry.other_names))
        # A file that has exactly the listed name is used whatever its ending.
        for paths in chain(by_name, (self.others.get(name, []) for name in (whole, bare_name(whole)))):
            if shared:
                paths = [path for path in paths if entry.folders[-1] in path.split("/")[:-1]]
            if len(paths) == 1:
                return paths[0]
            if paths:
                return min(paths, key=lambda path: self._rank(path, entry.folders))
        return None

    def similar(self, names: Iterable[str]) -> dict[str, list[str]]:
        """By listed name: the files under which a missing one may be there; for messages."""
        names = list(names)
        every = SimilarNames(chain.from_iterable((*self.by_name.values(), *self.others.values()))) if names else None
        return {name: found for name in names if every is not None and (found := every.find(name))}

    def count_others(self, used: Iterable[str] = ()) -> Counter[str]:
        """Number of files that are neither videos nor archives by their ending, by ending.

        Args:
            used: paths of files that were found all the same, by their whole name.
        """
        found = set(used)
        paths = (path for path in chain.from_iterable(self.others.values()) if path not in found)
        return Counter(ending for path in paths if (ending := ending_of(path)) not in ARCHIVE_ENDINGS)

    @property
    def archives(self) -> list[str]:
        """Archives, whose contents cannot be found."""
        return [path for path in chain.from_iterable(self.others.values()) if ending_of(path) in ARCHIVE_ENDINGS]

    def _rank(self, path: str, folders: tuple[str, ...]) -> tuple[bool, list[bool], str]:
        """Sort key: files before links, then files in the preferred folders first."""
        parents = path.split("/")[:-1]
        return path in self.links, [folder not in parents for folder in folders], path

    def refuse(self, path: str) -> tuple[Status, str] | None:
        """Why a file is unusable; None if it is usable. Regular files always are: they were found under the root."""
        if path not in self.links:
            return None
        try:
            if safe_join(self.root, path).is_file():
                return None
            return Status.MISSING_FILE, "a broken link"
        except UnsafePathError:
            return (
                Status.PATH_OUTSIDE_ROOT,
                "a link that leaves dataset.root; use a root that contains its target as well",
            )
        except (OSError, RuntimeError) as error:  # a symlink loop
            return Status.MISSING_FILE, f"a link that cannot be followed: {type(error).__name__}"


def list_videos(root: Path) -> Videos:
    """All video files under `root`, recognised by their extension; hidden files and linked folders are skipped.

    Raises:
        DatasetError: `root` is not a folder.
    """
    check_root(root)
    videos = Videos(root)
    for path, link in walk_files(root, videos.unreadable):
        name, dot, ending = path.rpartition("/")[2].rpartition(".")
        if dot and f".{ending.lower()}" in COPY_ENDINGS:
            videos.by_name.setdefault(name, []).append(path)
            if link:
                videos.links.add(path)
        elif link and (root / path).is_dir():
            videos.linked_folders.append(path)
        else:
            videos.others.setdefault(path.rpartition("/")[2], []).append(path)
            if link:
                videos.links.add(path)
    return videos


def ending_of(path: str) -> str:
    """The ending of a file's name in lower case, with its dot; empty if it has none."""
    _, dot, ending = path.rpartition("/")[2].rpartition(".")
    return f"{dot}{ending.lower()}" if dot else ""
