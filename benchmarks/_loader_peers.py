"""Other loaders over the same JPEGs, with the same crops and shape of a batch, each as its own documentation recommends.

webdataset reads the very shard and keeps what a clip needs; litdata and MosaicML's streaming read formats of their own, to which
the frames of each clip are converted here. All three hand a clip's bytes to the same function: decoding by torchvision, then
`resized_crop` of each frame and `horizontal_flip` by torchvision's transforms v2. (Of the orders tried this is the fastest:
stacking whole frames before the crop gives the same pixels and takes a fifth longer.) Frames of a clip are decoded only if its
window has them. Unlike in our loader, no checksum of what is read is compared.
"""

import importlib.metadata
import importlib.util
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional

from stm.config import Augmentation
from stm.data.crop_boxes import draw_crop
from stm.data.sampling import sample_window

PACKAGES = {"litdata": "litdata", "streaming": "mosaicml-streaming"}

# One frame as its bytes, and all of a clip.
Frames = Sequence[bytes]


def make_clip(frames: Frames, window: int, size: int, generator: np.random.Generator) -> Tensor:
    """Decode a random window of a clip, crop, resize and flip it: uint8 [T, 3, S, S]."""
    positions = sample_window(generator, window, 1, len(frames))
    images = [decode_jpeg(torch.frombuffer(bytearray(frames[p]), dtype=torch.uint8)) for p in positions]
    box, flip = draw_crop(generator, Augmentation(), images[0].shape[-1], images[0].shape[-2])
    crop = (box.top, box.left, box.height, box.width)
    video = torch.stack([functional.resized_crop(image, *crop, [size, size]) for image in images])
    return functional.horizontal_flip(video) if flip else video


def clips_of(shard: Path) -> Iterator[Frames]:
    """The frames of each clip of a shard, in order."""
    clips: dict[str, list[bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            if name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                clips.setdefault(key, []).append(file.read())
    yield from clips.values()


def join(number: int, frames: Frames) -> dict[str, Any]:
    """A clip as a record: litdata and streaming take samples of a few fields of the same kind."""
    return {"number": number, "frames": b"".join(frames), "ends": np.cumsum([*map(len, frames)], dtype=np.int64)}


def split(record: dict[str, Any]) -> Frames:
    ends = record["ends"].tolist()
    return [record["frames"][a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class _Mapped(torch.utils.data.Dataset[Tensor]):
    """A map-style dataset of records, as clips."""

    def __init__(self, records: Any, make: Callable[[Frames], Tensor]) -> None:
        self.records, self.make = records, make

    def __getitem__(self, number: int) -> Tensor:
        return self.make(split(self.records[number]))


def over_webdataset(shard: Path, make: Callable[[Frames], Tensor]) -> Callable[[int], Any]:
    """A function that loads a pass over the shard as batches of the given size."""

    def clip(sample: dict[str, Any]) -> Tensor:
        return make([data for name, data in sorted(sample.items()) if name.endswith(".jpg")])

    def load(batch: int) -> None:
        data = webdataset.WebDataset(str(shard), shardshuffle=False).map(clip)
        for _ in data.batched(batch, collation_fn=default_collate):
            pass

    return load


def over_litdata(shard: Path, folder: Path, make: Callable[[Frames], Tensor]) -> Callable[[int], Any]:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    # What litdata's `optimize` writes, without the processes that it starts.
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, frames in enumerate(clips_of(shard)):
        writer.add_item(number, join(number, frames))
    writer.done()
    writer.merge(1)
    records = litdata.StreamingDataset(str(folder), shuffle=False)
    return _batches(_Mapped(records, make), len(records))


def over_streaming(shard: Path, folder: Path, make: Callable[[Frames], Tensor]) -> Callable[[int], Any]:
    import streaming

    columns = {"number": "int", "frames": "bytes", "ends": "ndarray:int64"}
    with streaming.MDSWriter(out=str(folder), columns=columns) as out:
        for number, frames in enumerate(clips_of(shard)):
            out.write(join(number, frames))
    records = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return _batches(_Mapped(records, make), len(records))


def _batches(data: _Mapped, clips: int) -> Callable[[int], Any]:
    def load(batch: int) -> None:
        for start in range(0, clips, batch):
            default_collate([data[number] for number in range(start, min(clips, start + batch))])

    return load


def missing(module: str) -> str | None:
    """What to say if a peer is not installed."""
    if importlib.util.find_spec(module) is None:
        return f"{PACKAGES[module]} is not installed, so it is not compared: pip install {PACKAGES[module]}"
    return None


def version(module: str) -> str:
    return importlib.metadata.version(PACKAGES.get(module, module))
