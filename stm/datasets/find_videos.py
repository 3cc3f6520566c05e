"""An index by name of the videos under a folder, built in one directory walk without opening any file."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from stm.config import FolderDataset
from stm.datasets.file_lookup import same_spelling, walk_files
from stm.datasets.folder import check_root
from stm.datasets.official_lists import Entry
from stm.jobs.status import Status
from stm.storage.files import UnsafePathError, safe_join

VIDEO_ENDINGS = tuple(FolderDataset.model_fields["extensions"].default)


@dataclass
class Videos:
    """The video files under a folder; paths are relative to it, with forward slashes."""

    root: Path
    by_name: dict[str, list[str]] = field(default_factory=dict)  # paths by file name without extension
    links: set[str] = field(default_factory=set)
    linked_folders: list[str] = field(default_factory=list)  # not searched, because links can form cycles
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (folder, reason): those that may not be entered
    others: Counter[str] = field(default_factory=Counter)  # number of other files, by extension
    # UCF101 spells one class in two ways, and some copies change the case of names. Filled on first use.
    _by_folded_name: dict[str, list[str]] = field(default_factory=dict)

    def candidates(self, name: str) -> list[str]:
        """Files with this name or, if none exist, files whose name differs only in case or in how accents are composed."""
        if name in self.by_name:
            return self.by_name[name]
        if not self._by_folded_name:
            for other, paths in self.by_name.items():
                self._by_folded_name.setdefault(same_spelling(other).casefold(), []).extend(paths)
        return self._by_folded_name.get(same_spelling(name).casefold(), [])

    def find(self, entry: Entry, shared: bool) -> str | None:
        """The file of an entry; None if no file matches.

        Args:
            shared: whether entries in other folders have the same file name, so that the folder must match as well.
        """
        for name in (entry.name, *entry.other_names):
            paths = self.candidates(name)
            if shared:
                paths = [path for path in paths if entry.folders[-1] in path.split("/")[:-1]]
            if len(paths) == 1:
                return paths[0]
            if paths:
                return min(paths, key=lambda path: self._rank(path, entry.folders))
        return None

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
        if f".{ending.lower()}" in VIDEO_ENDINGS:
            videos.by_name.setdefault(name, []).append(path)
            if link:
                videos.links.add(path)
        elif link and (root / path).is_dir():
            videos.linked_folders.append(path)
        else:
            videos.others[f".{ending.lower()}" if dot else ""] += 1
    return videos
