"""What there is of a benchmark against what there should be, for people."""

from collections.abc import Mapping
from dataclasses import dataclass

_SHOWN = 10


@dataclass(frozen=True)
class SplitCounts:
    """Clips of one split."""

    official: int
    listed: int  # lines of the official lists
    found: int  # of these, clips whose file is there


@dataclass(frozen=True)
class Report:
    """The state of a copy; `describe` says it."""

    title: str
    splits: Mapping[str, SplitCounts]
    missing: Mapping[str, int]  # official names of files that are not there, and how many clips each holds
    problems: tuple[str, ...] = ()  # lines and links that cannot be used
    linked_folders: tuple[str, ...] = ()  # not entered

    @property
    def is_official(self) -> bool:
        """Whether the lists have the official sizes."""
        return all(counts.listed == counts.official for counts in self.splits.values())

    @property
    def is_complete(self) -> bool:
        return all(counts.found == counts.listed for counts in self.splits.values())

    @property
    def found(self) -> int:
        return sum(counts.found for counts in self.splits.values())

    def describe(self) -> str:
        """The table of counts and the first files that are missing."""
        lines = [self.table()]
        files = sum(self.missing.values())
        if self.missing:
            lines.append(f"{files:,} clips have no file. The first of {len(self.missing):,} missing files:")
            for name, clips in list(self.missing.items())[:_SHOWN]:
                lines.append(f"  {name}" + (f" ({clips:,} clips)" if clips > 1 else ""))
        if self.problems:
            lines.append(f"{len(self.problems):,} clips cannot be used. The first:")
            lines += [f"  {problem}" for problem in self.problems[:_SHOWN]]
        if self.linked_folders and not self.is_complete:
            shown = ", ".join(self.linked_folders[:_SHOWN])
            lines.append(f"Linked folders are not looked into: {shown}. Make the folder they lead to dataset.root.")
        return "\n".join(lines)

    def table(self) -> str:
        width = max(5, *(len(split) for split in self.splits))
        lines = [f"{self.title}: clips", f"  {'split':{width}} {'official':>10} {'listed':>10} {'on disk':>10}"]
        for split, counts in self.splits.items():
            lines.append(f"  {split:{width}} {counts.official:>10,} {counts.listed:>10,} {counts.found:>10,}")
        return "\n".join(lines)
