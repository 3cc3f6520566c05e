"""What there is of a corpus or benchmark against what should be there, for people."""

from collections.abc import Mapping
from dataclasses import dataclass

_SHOWN = 10


@dataclass(frozen=True)
class Counts:
    """One split."""

    listed: int  # videos or pictures that the lists name
    found: int  # of these, those whose file is there
    texts: int  # captions or questions that the lists hold
    official: tuple[int, ...] = ()  # videos, any of which is right; none: not known
    official_texts: int | None = None
    published: int | None = None  # as the authors say; not checked

    @property
    def is_official(self) -> bool:
        """Whether the list has the official size, as far as that is known."""
        videos = not self.official or self.listed in self.official
        return videos and self.official_texts in (None, self.texts)


@dataclass(frozen=True)
class Report:
    """The state of a copy; `describe` says it."""

    title: str
    media: str  # `videos` or `pictures`
    splits: Mapping[str, Counts]
    missing: Mapping[str, int]  # names of files that are not there, and how many clips each holds
    problems: tuple[str, ...] = ()  # lines and links that cannot be used
    linked_folders: tuple[str, ...] = ()  # not entered

    @property
    def is_official(self) -> bool:
        """Whether the lists have the official sizes."""
        return all(counts.is_official for counts in self.splits.values())

    @property
    def is_complete(self) -> bool:
        return not self.problems and all(counts.found == counts.listed for counts in self.splits.values())

    @property
    def found(self) -> int:
        return sum(counts.found for counts in self.splits.values())

    def describe(self) -> str:
        """The table of counts, the first files that are missing, and the first lines that cannot be used."""
        lines = [self.table()]
        if self.missing:
            clips = sum(self.missing.values())
            lines.append(f"{clips:,} {self.media} have no file. The first:")
            lines += [f"  {name}" for name in list(self.missing)[:_SHOWN]]
        if self.problems:
            lines.append(f"{len(self.problems):,} lines or files cannot be used. The first:")
            lines += [f"  {problem}" for problem in self.problems[:_SHOWN]]
        if self.linked_folders and not self.is_complete:
            shown = ", ".join(self.linked_folders[:_SHOWN])
            lines.append(f"Linked folders are not looked into: {shown}. Make the folder they lead to dataset.root.")
        return "\n".join(lines)

    def table(self) -> str:
        """Counts by split; `?` where no official number is known, `~` before one that is not checked."""
        width = max(5, *(len(split) for split in self.splits))
        head = ("official", "listed", "on disk", "texts", "official")
        lines = [f"{self.title}: {self.media}, and texts about them"]
        lines.append(f"  {'split':{width}}" + "".join(f" {name:>12}" for name in head))
        for split, counts in self.splits.items():
            official = f"{_nearest(counts):,}" if counts.official else "?"
            official = official if counts.published is None else f"~{counts.published:,}"
            texts = "?" if counts.official_texts is None else f"{counts.official_texts:,}"
            cells = (official, f"{counts.listed:,}", f"{counts.found:,}", f"{counts.texts:,}", texts)
            lines.append(f"  {split:{width}}" + "".join(f" {cell:>12}" for cell in cells))
        return "\n".join(lines)


def _nearest(counts: Counts) -> int:
    """Of several official numbers the one that the list has, else the first."""
    return counts.listed if counts.listed in counts.official else counts.official[0]
