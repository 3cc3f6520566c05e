"""Opens packed shards as a dataset with a loader, with settings taken from the shards where they determine them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from stm.config import Augmentation, CaptionChoice, Sampling, Section
from stm.config.errors import explain_problem
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.loader import Batch, ClipLoader, collate
from stm.data.stream import ClipStream, open_stream
from stm.shards.index import ClipIndex
from stm.storage.remote import PIPE, show_url
from stm.storage.tables import read_receipt

Source = str | Path | Sequence[str | Path]
SectionType = TypeVar("SectionType", bound=Section)

USUAL_SIDE = 224  # pixels; VideoMAE's image size
USUAL_FRAMES = 16  # VideoMAE's clip length
STREAM_OPTIONS = ("indexes", "storage_options", "attempts", "pause", "buffer")  # of `open_stream`, not of `ClipDataset`
FIRST_SPLIT = "train"  # the one that is opened if a folder has several


class ShardsError(ValueError):
    """Shards that cannot be found, or opened with the given settings; the message contains the place and the remedy."""


def open_shards(
    source: Source,
    split: str | None = None,
    *,
    train: bool = False,
    frames: int | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    tubelet: int | None = None,
    stride: int = 1,
    sampling: Sampling = "dense",
    augmentation: Mapping[str, Any] | None = None,
    captions: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> "OpenShards":
    """Open packed shards, to look at, to train on or to compute features from.

    Examples:
        >>> data = stm.open_shards("results/shapes")  # doctest: +SKIP
        >>> for batch in data.loader(batch_size=8):  # doctest: +SKIP
        ...     kept = stm.mask(batch, "text_top", 0.6)

    Args:
        source: a dataset's folder of results (`results/NAME`), its `shards`, the folder of one split, a tar, or a list of tars.
            Or URLs, as for `stm.data.stream.open_stream`: `https://...`, `s3://bucket/train-{00000..00239}.tar`.
        split: which split of a folder with several; by default `train`, or the only one.
        train: sample windows, crops and flips at random; by default, the middle window and the central square.
        frames: frames per clip; by default 16, or as many as the shortest clip has.
        image_size: side of the square crop, in pixels; by default 224, or less if the stored frames are smaller.
        patch_size: side of a token, in pixels; by default such that the image has as many tokens per side as the maps have
            cells.
        tubelet: frames per token; by default 2, or 1 for images.
        stride: stored frames from one frame to the next, with dense sampling.
        sampling: how frames are chosen: dense, tsn or sparse; see `stm.data.sampling`.
        augmentation: keys of the config's section `augmentation`, such as {"flip": False}.
        captions: keys of the config's section `captions` of a run, such as {"sources": ["human"]}; by default all captions.
        seed: seed of everything that is sampled.
        options: further arguments of `ClipDataset`: `guides`, `classes`, `text`, `views`, `crops`, `repeats`, ... By default,
            all guides that every clip has are read. For URLs, also those of `open_stream`: `indexes`, `storage_options`,
            `attempts`, ...

    Raises:
        ShardsError: there are no such shards, or the sizes do not fit each other.
        ValueError: a shard cannot be used, or lacks what is asked of it; see `ClipDataset`.
        OSError: a server failed.
    """
    settings = (_read_section(Augmentation, "augmentation", augmentation), seed, train)
    options["captions"] = _read_section(CaptionChoice, "captions", captions)
    urls = _list_urls(source)
    if urls:
        own = {name: value for name, value in options.items() if name not in STREAM_OPTIONS}
        # The geometry depends on the indexes, which the stream fetches.
        index = open_stream(urls, Geometry(USUAL_SIDE, 16, 2, USUAL_FRAMES), *settings, batch_size=1, **options).index
        geometry = _choose_geometry(index, frames, image_size, patch_size, tubelet, stride, sampling)
        return StreamedShards(ClipDataset(index, geometry, *settings, **own), _describe_urls(urls), urls, options)
    indexes, others = _find_indexes(source, split)
    if not indexes:
        raise ShardsError("an empty list of shards: name at least one tar")
    _check_stage(indexes[0])
    index = ClipIndex(indexes)
    geometry = _choose_geometry(index, frames, image_size, patch_size, tubelet, stride, sampling)
    return OpenShards(ClipDataset(index, geometry, *settings, **options), _describe_files(indexes), others)


def _read_section(kind: type[SectionType], name: str, values: Mapping[str, Any] | None) -> SectionType:
    """Validate keywords that are keys of a section of the config."""
    try:
        return kind.model_validate(dict(values or {}))
    except ValidationError as error:
        schema = kind.model_json_schema()
        problems = [f"{name}.{explain_problem(problem, schema)}" for problem in error.errors()]
        raise ShardsError("; ".join(problems)) from None


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ShardsError(f"batch_size must be a positive integer, is {batch_size}")


class OpenShards:
    """Opened shards: the dataset, loaders of its clips, and a batch to look at."""

    def __init__(self, dataset: ClipDataset, where: str, others: Sequence[str] = ()) -> None:
        """
        Args:
            where: what was opened, for people.
            others: further splits in the same folder.
        """
        self._dataset = dataset
        self._where = where
        self._others = others

    @property
    def dataset(self) -> ClipDataset:
        """The clips by number, each a list of samples, one per view and crop.

        Examples:
            >>> from stm.data.loader import collate  # doctest: +SKIP
            >>> torch.utils.data.DataLoader(data.dataset, batch_size=8, collate_fn=collate)  # doctest: +SKIP
        """
        return self._dataset

    @property
    def geometry(self) -> Geometry:
        """The clips' size in pixels, frames and tokens."""
        return self._dataset.geometry

    @property
    def guides(self) -> tuple[str, ...]:
        """The guides that batches contain, besides the noise."""
        return self._dataset.guides

    @property
    def classes(self) -> list[str]:
        """Labels in the order of a batch's "label"."""
        return self._dataset.classes

    @property
    def labels(self) -> list[str | None]:
        """The label of each clip."""
        return self._dataset.index.labels()

    @property
    def captions(self) -> list[list[str]]:
        """The captions of each clip, from all sources."""
        return self._dataset.index.captions()

    def __len__(self) -> int:
        """The number of clips."""
        return len(self._dataset)

    def loader(
        self, batch_size: int = 8, *, shuffle: bool | None = None, workers: int = 0, **options: Any
    ) -> ClipLoader | ClipStream:
        """Make a loader of batches; a loop over it is one epoch, and the next loop the next epoch.

        Args:
            batch_size: clips per batch.
            shuffle: use a new order in each epoch; by default only to train.
            workers: number of loading processes; 0 loads in this process.
            options: further arguments of `ClipLoader`: `drop_last`, `rank`, `processes`.

        Raises:
            ShardsError: the batch size is not positive.
            ValueError: there are fewer clips than one batch, which is dropped when shuffling; pass `drop_last=False`.
        """
        _check_batch_size(batch_size)
        data = self._dataset
        chosen = data.train if shuffle is None else shuffle
        return ClipLoader(data, batch_size, **{"shuffle": chosen, "seed": data.seed, "workers": workers, **options})

    def batch(self, clips: int | Sequence[int] = 4) -> Batch:
        """Load one batch; see `stm.data.loader.collate` for what it contains.

        Args:
            clips: the number of clips, from the first one on; or the numbers of the clips.

        Raises:
            ShardsError: there are fewer clips.
        """
        return collate([self._dataset[number] for number in self._number_clips(clips)])

    def _number_clips(self, clips: int | Sequence[int]) -> list[int]:
        numbers = list(range(clips)) if isinstance(clips, int) else list(clips)
        if not numbers or min(numbers) < 0 or max(numbers) >= len(self):
            raise ShardsError(f"batch({clips}): there are {len(self)} clips, with numbers from 0 to {len(self) - 1}")
        return numbers

    def __repr__(self) -> str:
        data, shape = self._dataset, self.geometry
        clip = (
            f"{shape.frames} frame{'s' if shape.frames > 1 else ''} of {shape.image_size} x {shape.image_size} pixels"
        )
        tokens = f"{shape.slots} x {shape.side} x {shape.side} tokens"
        lines = [
            f"{len(self)} clips in {self._where}"
            + (f" (also there: {', '.join(self._others)})" if self._others else ""),
            f"  clip      {clip}, {tokens} of {shape.tubelet} x {shape.patch_size} x {shape.patch_size}",
            f"  cut       {'sampled at random, to train' if data.train else 'the middle, to test'}",
            f"  guides    {', '.join(self.guides) or 'none'}",
            f"  captions  {', '.join(data.index.sources()) or 'none'}",
            f"  labels    {len(self.classes)} classes",
        ]
        return "\n".join(lines)


class StreamedShards(OpenShards):
    """Shards at URLs, which are read from start to end: they have loaders, and no dataset that reads single clips."""

    def __init__(self, dataset: ClipDataset, where: str, urls: list[str], options: Mapping[str, Any]) -> None:
        """
        Args:
            dataset: knows the clips, and cannot read them.
            options: arguments of `open_stream`.
        """
        super().__init__(dataset, where)
        self._urls = urls
        self._options = options

    @property
    def dataset(self) -> ClipDataset:
        raise ShardsError(
            f"{self._where}: shards at URLs are read from start to end, not clip by clip: use `loader` or `batch`, or copy "
            "them to a local folder"
        )

    def loader(
        self, batch_size: int = 8, *, shuffle: bool | None = None, workers: int = 0, **options: Any
    ) -> ClipStream:
        """Make a loader of batches; see `open_stream` for further arguments. Training streams are always shuffled."""
        _check_batch_size(batch_size)
        data = self._dataset
        if shuffle not in (None, data.train):
            raise ShardsError(f"{self._where}: streams are shuffled if opened with train=True, and only then")
        return open_stream(
            self._urls,
            data.geometry,
            data.augmentation,
            data.seed,
            data.train,
            **{**self._options, "batch_size": batch_size, "workers": workers, **options},
        )

    def batch(self, clips: int | Sequence[int] = 4) -> Batch:
        """Load one batch of the first `clips` clips of the stream."""
        if not isinstance(clips, int):
            raise ShardsError(f"{self._where}: shards at URLs are read from start to end: give a number of clips")
        with self.loader(len(self._number_clips(clips))) as stream:
            return next(stream.batches(0))


# ------------------------------------------------------------------------------------------------------ places


def _list_urls(source: Source) -> list[str]:
    """The URLs of a source; none if it is on the local disk."""
    each = [source] if isinstance(source, str | Path) else list(source)
    urls = [str(one) for one in each if isinstance(one, str) and ("://" in one or one.startswith(PIPE))]
    if urls and len(urls) < len(each):
        raise ShardsError("some of the given shards are URLs and some are local paths; open them one after the other")
    return urls


def _describe_urls(urls: Sequence[str]) -> str:
    return show_url(urls[0]) + (f" and {len(urls) - 1} more URLs" if len(urls) > 1 else "")


def _describe_files(indexes: Sequence[Path]) -> str:
    shards = f"{len(indexes)} shard{'s' if len(indexes) > 1 else ''}"
    return f"{shards} of {indexes[0].parent}"


def _find_indexes(source: Source, split: str | None) -> tuple[list[Path], list[str]]:
    """The indexes of the shards to open, and the names of the folder's other splits."""
    if not isinstance(source, str | Path):
        return [_index_of(Path(one)) for one in source], []
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return [_index_of(folder)], []
    if own := _list_indexes(folder):
        if split not in (None, folder.resolve().name):
            raise ShardsError(
                f"{folder} is the folder of one split and has no split {split!r}; open the folder above it"
            )
        return own, []
    place = folder / "shards" if (folder / "shards").is_dir() else folder
    splits = {each.name: found for each in sorted(place.iterdir()) if each.is_dir() and (found := _list_indexes(each))}
    if not splits:
        raise ShardsError(_explain_empty(folder))
    chosen = split or (FIRST_SPLIT if FIRST_SPLIT in splits else next(iter(splits)))
    if chosen not in splits or (split is None and len(splits) > 1 and chosen != FIRST_SPLIT):
        problem = f"no split {split!r}" if split else "several splits"
        raise ShardsError(f"{place} has {problem}; name one: {', '.join(splits)}")
    return splits[chosen], [name for name in splits if name != chosen]


def _index_of(path: Path) -> Path:
    """The index of a tar, which may be given in its place."""
    index = path.with_suffix(".parquet")
    if path.suffix not in (".tar", ".parquet") or not index.is_file():
        what = "a folder, or a tar with its index (.parquet) next to it"
        raise ShardsError(f"{path}: no packed shards there: {what} is needed (from the working directory {Path.cwd()})")
    return index


def _list_indexes(folder: Path) -> list[Path]:
    return [index for index in sorted(folder.glob("*.parquet")) if index.with_suffix(".tar").is_file()]


def _check_stage(index: Path) -> None:
    """Reject the tars and tables of another stage, such as `frames`, which lie side by side as well."""
    stage = read_receipt(index).get("stage", "shards")
    if stage != "shards":
        raise ShardsError(f"{index} was written by the stage `{stage}`, and is not the index of a packed shard")


def _explain_empty(folder: Path) -> str:
    datasets = sorted(each.name for each in folder.iterdir() if (each / "shards").is_dir())
    if datasets:
        return f"{folder} has the results of several datasets; open one: {', '.join(str(folder / n) for n in datasets)}"
    return (
        f"{folder}: no packed shards there (SPLIT/SHARD.tar, each with its index SHARD.parquet); the stage `shards` writes "
        "them to results/NAME/shards"
    )


# ---------------------------------------------------------------------------------------------------- geometry


def _choose_geometry(
    index: ClipIndex,
    frames: int | None,
    image_size: int | None,
    patch_size: int | None,
    tubelet: int | None,
    stride: int,
    sampling: Sampling,
) -> Geometry:
    """The requested sizes; the others fit the smallest stored frames, the coarsest maps and the shortest clip.

    Raises:
        ShardsError: the sizes do not fit each other.
    """
    given = {"frames": frames, "image_size": image_size, "patch_size": patch_size, "tubelet": tubelet, "stride": stride}
    for name, size in given.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ShardsError(f"{name} must be a positive integer, is {size!r}")
    if sampling not in get_args(Sampling):
        raise ShardsError(f"sampling must be one of {', '.join(get_args(Sampling))}, is {sampling!r}")
    side = min(USUAL_SIDE, *index.values("width"), *index.values("height"))
    cells = min(index.values("rows") + index.values("columns"))
    shortest = min(index.values("frames"))
    if tubelet is None:
        pairs = shortest > 1 if frames is None else frames % 2 == 0
        tubelet = 2 if pairs else 1
    if frames is None:
        frames = max(tubelet, min(USUAL_FRAMES, shortest) // tubelet * tubelet)
    if patch_size is None:
        patch_size = max(1, (image_size or side) // cells)
        image_size = image_size or patch_size * cells
    elif image_size is None:
        image_size = max(1, side // patch_size) * patch_size
    for what, whole, part_name, part in (
        ("image_size", image_size, "patch_size", patch_size),
        ("frames", frames, "tubelet", tubelet),
    ):
        if whole % part:
            raise ShardsError(f"{what} {whole} is not divisible by {part_name} {part}; give both")
    return Geometry(image_size, patch_size, tubelet, frames, stride, sampling)
