"""What features are computed of: video files, folders of them, lists, and packed shards."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from stm.datasets.annotations import parse_row, read_annotations
from stm.datasets.file_names import printable
from stm.datasets.find_videos import list_videos
from stm.datasets.folder import segment_suffix
from stm.datasets.text_files import BadRow
from stm.features.settings import FeatureError
from stm.jobs.status import Status
from stm.shards.index import Clip, ClipIndex
from stm.storage.machine_errors import is_machine_error
from stm.storage.tables import DamagedError, read_table

LIST_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Source:
    """A video, a part of one, or a packed clip."""

    video: str  # its id
    path: str
    start: float | None = None  # seconds
    end: float | None = None
    bytes: int | None = None  # of the file
    modified: int | None = None  # its time of modification, in ns
    clip: Clip | None = None  # packed
    seconds: tuple[float, ...] = ()  # times of a packed clip's stored frames
    refused: tuple[Status, str] | None = None  # why it cannot be read

    @property
    def printable_path(self) -> str:
        """The path for tables and messages."""
        return printable(self.path)

    @property
    def item(self) -> str:
        """Its identifier in a journal: another one once the file has changed."""
        return json.dumps([self.video, self.path, self.start, self.end, self.bytes, self.modified])


def collect_sources(inputs: str | Path | Sequence[str | Path], root: Path | None = None) -> list[Source]:
    """List the videos and packed clips of the inputs, in their order; those of a folder by name.

    Args:
        inputs: video files, folders of videos, lists of videos (see `LIST_ENDINGS`; columns path, start, end, id), indexes or
            tars of packed shards, and folders with them.
        root: folder to which the paths in lists are relative; None: that of the list.

    Raises:
        FeatureError: an input does not exist or has no videos.
        AnnotationError: a list cannot be read.
    """
    sources: list[Source] = []
    for each in [inputs] if isinstance(inputs, str | Path) else inputs:
        path = Path(each).expanduser()
        found = list(_collect(path, root))
        if not found:
            raise FeatureError(f"{path}: no videos and no packed shards are in it")
        sources += found
    if not sources:
        raise FeatureError("no inputs: name video files, folders of videos, a list of them, or packed shards")
    return _with_unique_ids(sources)


def check_output(out: Path, endings: Sequence[str], inputs: str | Path | Sequence[str | Path]) -> None:
    """Check, before any work is done, that a table can take its place.

    Raises:
        FeatureError: it has another ending, is a folder, or would replace an input.
    """
    if out.suffix.lower() not in endings:
        raise FeatureError(f"{out}: give a name that ends in {' or '.join(endings)}")
    if out.is_dir():
        raise FeatureError(f"{out}: a folder has this name; give the table another")
    for each in [inputs] if isinstance(inputs, str | Path) else inputs:
        if Path(each).expanduser().resolve() == out.resolve():
            raise FeatureError(f"{out}: the table would replace an input; give it another name")


def _collect(path: Path, root: Path | None) -> Iterator[Source]:
    if not path.exists():
        raise FeatureError(f"{path}: there is no such file or folder (from the working directory {Path.cwd()})")
    if indexes := _find_indexes(path):
        yield from _packed(indexes)
    elif path.is_dir():
        yield from _in_folder(path)
    elif path.suffix.lower() in LIST_ENDINGS:
        yield from _in_list(path, root or path.parent)
    elif path.suffix.lower() == ".tar":
        raise FeatureError(f"{path}: its index {path.with_suffix('.parquet').name} is not beside it")
    else:
        yield _of_file(Source(printable(str(path)), str(path)))


def _find_indexes(path: Path) -> list[Path]:
    """Return the indexes of packed shards: of a tar or index, of a folder of them, of splits, or of results."""
    if path.is_file():
        own = path.with_suffix(".parquet")
        return [own] if path.suffix in (".tar", ".parquet") and _is_index(own) else []
    for pattern in ("shards/*/*.parquet", "*/shards/*/*.parquet", "*.parquet", "*/*.parquet"):
        if found := sorted(filter(_is_index, path.glob(pattern))):
            return found
    return []


def _is_index(path: Path) -> bool:
    return path.is_file() and path.with_suffix(".tar").is_file()


def _packed(indexes: Sequence[Path]) -> Iterator[Source]:
    try:
        index = ClipIndex(indexes)
    except DamagedError:
        raise
    except ValueError as error:
        raise FeatureError(str(error)) from error
    rows = {}
    for path in indexes:
        for row in read_table(path, ["key", "video_id", "pts"]).to_pylist():
            rows[row["key"]] = row
    sizes = {tar: tar.stat() for tar in index.tars}
    for number in range(len(index)):
        clip = index[number]
        row, facts = rows[clip.key], sizes[clip.tar]
        yield Source(
            row["video_id"],
            printable(str(clip.tar)),
            bytes=facts.st_size,
            modified=facts.st_mtime_ns,
            clip=clip,
            seconds=tuple(row["pts"]),
        )


def _in_folder(folder: Path) -> Iterator[Source]:
    """The videos of a folder by name; links to files are followed, those to folders may form cycles and are not."""
    videos = list_videos(folder)
    linked = "a linked folder; it is not followed"
    refused = {path: (Status.OPEN_FAILED, f"a folder that cannot be read ({why})") for path, why in videos.unreadable}
    refused |= dict.fromkeys(videos.linked_folders, (Status.PATH_OUTSIDE_ROOT, linked))
    for path in sorted([*chain.from_iterable(videos.by_name.values()), *refused]):
        source = Source(printable(path), str(folder / path), refused=refused.get(path))
        yield source if source.refused else _of_file(source)


def _in_list(file: Path, root: Path) -> Iterator[Source]:
    for where, row in read_annotations(file, ["id"]):
        try:
            clip = parse_row(row, "test")
        except BadRow as error:
            name = row.get("path") if isinstance(row, Mapping) else None
            path = printable(name) if isinstance(name, str) else ""
            yield Source(printable(f"{file}: {where}"), path, refused=(Status.BAD_ROW, str(error)))
            continue
        given = clip.video_id or (printable(str(row["id"])) if row.get("id") not in (None, "") else None)
        path = str(root / Path(clip.path).expanduser())
        own_id = given or printable(clip.path) + segment_suffix(clip.start, clip.end)
        yield _of_file(Source(own_id, path, clip.start, clip.end))


def _of_file(source: Source) -> Source:
    """Add the facts of a source's file."""
    path = Path(source.path)
    try:
        facts = path.stat()
    except (OSError, ValueError) as error:
        if is_machine_error(error):
            raise
        return replace(source, refused=(Status.MISSING_FILE, "no such file"))
    if path.is_dir():
        return replace(source, refused=(Status.OPEN_FAILED, "a folder, not a video"))
    return replace(source, bytes=facts.st_size, modified=facts.st_mtime_ns)


def _with_unique_ids(sources: Iterable[Source]) -> list[Source]:
    """Leave out what was named twice, and replace ids that occur several times by paths."""
    sources = _distinct(sources)
    count = Counter(source.video for source in sources)
    return _distinct(
        source if count[source.video] == 1 or source.clip else replace(source, video=_long_id(source))
        for source in sources
    )


def _distinct(sources: Iterable[Source]) -> list[Source]:
    return list({source.item: source for source in sources}.values())


def _long_id(source: Source) -> str:
    return printable(source.path) + segment_suffix(source.start, source.end)
