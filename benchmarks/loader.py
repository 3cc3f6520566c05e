"""Speed of loading training clips from shards, compared with what people use on the same JPEGs, and with decord on the files.

    python -m benchmarks.loader
    python -m benchmarks.loader --gop 12 --batch 32 --step 0.25

Clips of 340 x 256 pixels are encoded by x264 with B-frames, like downloaded videos, and processed by the stages `frames` and
`shards` with their defaults. A visit loads 16 frames, 4 apart, from a random offset. Our loader reads and decodes the JPEGs,
takes a random crop, resizes it to 224 x 224, flips it and collates clips into batches; decord seeks and decodes the same
frames of the original file and does nothing else. webdataset, litdata and MosaicML's streaming make the same batches from the
same JPEGs (`benchmarks._loader_peers`); those that are not installed are left out. All are measured in CPU time of one process,
and so is our loader with resizing and flipping left to the device (`resize_on: device`), and with decoding, too (`decode_on:
device`): of these, the part that the CPU does. The stream of whole shards (`stm.data.stream`) reads the same shard from its path,
so a network adds its own time. The cost of the checksums of all bytes read is that of the same
visits with and without them, in turns, for frames alone and with packed motion and flow.

The number of cores that keep a training step supplied follows from that rate. Whether the speed of loading processes adds up
is measured separately, in wall-clock time.
"""

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import decord
import numpy as np
import pyarrow as pa
import torch

from benchmarks import _loader_peers
from benchmarks._table import Row, compare, cpu_seconds, report, take_turns, wall_seconds
from benchmarks.motion import encode, make_clip
from stm.config import Augmentation, BadInput, Frames, Pack
from stm.data.dataset import ClipDataset, Sample
from stm.data.geometry import Geometry
from stm.data.loader import ClipLoader
from stm.data.stream import open_stream
from stm.manifest import MANIFEST_SCHEMA, make_key
from stm.preprocess.flow.estimate import FLOW_SCHEMA
from stm.preprocess.frames.extract import extract_frames
from stm.preprocess.motion.measure import MOTION_SCHEMA
from stm.preprocess.packing.pack import pack_shard
from stm.shards import reader
from stm.shards.grid import map_shape
from stm.storage.tables import read_table, write_rows, write_table

FRAMES, SIZE, RATE, GRID, FLOW_CELLS = 16, 224, 25, 14, 2
EVERY = 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="generated videos")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each video")
    parser.add_argument("--gop", type=int, nargs="*", default=[250, 12], help="frames between key frames")
    parser.add_argument(
        "--visits", type=int, default=4, help="visits per clip and round; our loader makes eight times as many"
    )
    parser.add_argument("--batch", type=int, default=32, help="clips per training step")
    parser.add_argument("--step", type=float, default=0.25, help="seconds per training step")
    parser.add_argument("--gpu", type=float, default=1560, help="clips per second of one H200, by the plan of tgm.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="loading processes, measured together")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def make_videos(folder: Path, clips: int, seconds: float, gop: int) -> list[str]:
    """Write H.264 videos with x264's defaults except for the key frame interval; return their names."""
    folder.mkdir()
    names = [f"{number}.mp4" for number in range(clips)]
    for number, name in enumerate(names):
        clip = make_clip(number, moving_camera=True, frames=round(seconds * RATE))
        encode(clip, ["-c:v", "libx264", "-g", str(gop)], folder / name)
    return names


def make_shard(folder: Path, names: Sequence[str]) -> Path:
    """Run the stages `frames` and `shards` on the videos; return the shard's index."""
    empty = dict.fromkeys(MANIFEST_SCHEMA.names)
    rows = [{**empty, "video_id": name, "key": make_key(name), "path": name, "split": "train"} for name in names]
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["key"])), schema=MANIFEST_SCHEMA)
    slice_path, tar, index = (folder / name for name in ("slice.parquet", "frames.tar", "frames.parquet"))
    write_table(slice_path, table, {"stage": "split"})
    extract_frames(slice_path, folder / "videos", tar, index, Frames(every=EVERY), BadInput(), 1)
    shard = folder / "shards/train-00000.parquet"
    shard.parent.mkdir()
    arrays: dict[str, Any] = write_maps(folder, index)
    pack = Pack(similarity=False, motion=True, flow=True)
    pack_shard(slice_path, tar, index, {}, arrays, shard.with_suffix(".tar"), shard, pack, GRID, BadInput())
    return shard


def write_maps(folder: Path, index: Path) -> dict[str, Path]:
    """Tables of random motion and flow for the clips of a frames index: their values do not change the time of reading them."""
    random = np.random.default_rng(0)
    motion, flow = [], []
    for clip in read_table(index).to_pylist():
        rows, columns = map_shape(clip["width"], clip["height"], GRID)
        row = {name: clip[name] for name in ("key", "video_id", "frames")} | {"rows": rows, "columns": columns}
        row |= {"status": "ok", "policy": "keep", "detail": ""}
        vector = random.normal(size=(clip["frames"], rows, columns, 2)).astype(np.float16)
        magnitude = np.abs(vector[..., 0])
        motion.append({**row, "magnitude": magnitude, "vector": vector, "intra": magnitude.astype(np.uint8)})
        fine = vector.repeat(FLOW_CELLS, 1).repeat(FLOW_CELLS, 2)
        flow.append({**row, "rows": fine.shape[1], "columns": fine.shape[2], "forward": fine, "backward": fine})
    paths = {name: folder / f"{name}.parquet" for name in ("motion", "flow")}
    write_rows(paths["motion"], MOTION_SCHEMA, motion, {}, group=16)
    write_rows(paths["flow"], FLOW_SCHEMA, flow, {}, group=16)
    return paths


class _Matching:
    """Equal to every checksum."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def without_checksums() -> Iterator[None]:
    """Reading without computing checksums, for comparison alone: no setting of the package allows it."""
    saved = reader.checksum, reader.matches_groups
    reader.checksum, reader.matches_groups = lambda data: _Matching(), lambda *_: True  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        reader.checksum, reader.matches_groups = saved


class Source:
    """The same clips as a shard and as video files, and the windows of frames to load from them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, gop: int) -> None:
        folder.mkdir()
        names = make_videos(folder / "videos", arguments.clips, arguments.seconds, gop)
        geometry = Geometry(SIZE, 16, 2, FRAMES, 1)
        shard = make_shard(folder, names)
        self.dataset, self.unresized, self.undecoded = (
            ClipDataset([shard], geometry, Augmentation(), 0, True, guides=(), resize=resize, decode=decode)
            for resize, decode in ((True, True), (False, True), (False, False))
        )
        self.shard = shard.with_suffix(".tar")
        self.guided = ClipDataset([shard], geometry, Augmentation(), 0, True, guides=("motion", "flow"))
        self.folder = folder / "videos"
        self.visits = arguments.visits
        self.size = sum((self.folder / name).stat().st_size for name in names) / len(names) / 1e6
        files = {make_key(name): self.folder / name for name in names}
        self._paths = [files[self.dataset.index[clip].key] for clip in range(len(names))]
        self._epochs = itertools.count()

    def load(self) -> float:
        """CPU seconds per clip, from the shard to a batch."""
        return self._load(self.dataset)

    def load_unresized(self) -> float:
        """CPU seconds per clip, from the shard to a batch whose crops the device resizes."""
        return self._load(self.unresized)

    def load_undecoded(self) -> float:
        """CPU seconds per clip, from the shard to a batch of JPEGs that the device decodes."""
        return self._load(self.undecoded)

    def load_streamed(self) -> float:
        """CPU seconds per clip, from the shard read from start to end to a batch."""
        # Batches of one clip: an epoch is one shard here, and memory for pixels is used again from its second batch on.
        stream = open_stream(self.shard, self.dataset.geometry, Augmentation(), 0, True, batch_size=1, guides=())
        epochs = [next(self._epochs) for _ in range(8 * self.visits)]
        seconds = cpu_seconds(lambda: [None for epoch in epochs for _ in stream.batches(epoch)])
        return seconds / len(epochs) / len(self.dataset)

    def _load(self, dataset: ClipDataset) -> float:
        repeated = Longer(dataset, 8 * self.visits)
        loader = ClipLoader(repeated, len(dataset), shuffle=True)
        epoch = next(self._epochs)
        return cpu_seconds(lambda: [None for _ in loader.batches(epoch)]) / len(repeated)

    def peers(self) -> dict[str, Callable[[], float]]:
        """For each peer that is installed, what measures its CPU seconds per clip, from the JPEGs to a batch."""
        make = partial(_loader_peers.make_clip, window=FRAMES, size=SIZE, generator=np.random.default_rng(0))
        found = {"webdataset": _loader_peers.over_webdataset(self.shard, make)}
        others = {"litdata": _loader_peers.over_litdata, "streaming": _loader_peers.over_streaming}
        for name, open_peer in others.items():
            if why := _loader_peers.missing(name):
                print(why)
                continue
            found[name] = open_peer(self.shard, self.folder.with_name(name), make)
        return {name: partial(self._load_peer, load) for name, load in found.items()}

    def _load_peer(self, load: Callable[[int], object]) -> float:
        clips = len(self.dataset)
        return cpu_seconds(lambda: [load(clips) for _ in range(2 * self.visits)]) / (2 * self.visits * clips)

    def time_checksums(self, dataset: ClipDataset) -> tuple[float, float]:
        """CPU seconds per clip with and without checksums, for the same visits in alternating order."""
        spent = [0.0, 0.0]
        visits = 16 * self.visits
        for visit in range(visits * len(dataset)):
            item = next(self._epochs), visit % len(dataset)
            load = partial(dataset.__getitem__, item)
            for checked in (True, False) if visit % 2 else (False, True):
                if checked:
                    spent[0] += cpu_seconds(load)
                    continue
                with without_checksums():
                    spent[1] += cpu_seconds(load)
        return spent[0] / visits / len(dataset), spent[1] / visits / len(dataset)

    def decode(self) -> float:
        """CPU seconds per clip for decoding the JPEGs alone."""
        reader = self.dataset._reader

        def read(epoch: int) -> None:
            for number, window in self._windows(epoch):
                for _ in reader.frames(self.dataset.index[number], window):
                    pass

        return self._spend(read, 8 * self.visits)

    def seek(self) -> float:
        """CPU seconds per clip of decord: opening, seeking, decoding."""

        def read(epoch: int) -> None:
            for number, window in self._windows(epoch):
                video = decord.VideoReader(str(self._paths[number]), ctx=decord.cpu(0), num_threads=1)
                video.get_batch([EVERY * position for position in window]).asnumpy()

        return self._spend(read, self.visits)

    def _windows(self, epoch: int) -> list[tuple[int, list[int]]]:
        clips = range(len(self.dataset))
        return [(clip, self.dataset.samples.windows(self.dataset.index[clip], epoch)[0].tolist()) for clip in clips]

    def _spend(self, visit: Callable[[int], object], visits: int) -> float:
        return cpu_seconds(lambda: [visit(next(self._epochs)) for _ in range(visits)]) / visits / len(self.dataset)

    def stream(self, workers: int) -> float:
        """Clips per wall-clock second from loading processes that are already running."""
        loader = ClipLoader(Longer(self.dataset, 8 * self.visits), len(self.dataset), shuffle=True, workers=workers)
        for _ in loader.batches(0):
            pass
        seconds = wall_seconds(lambda: [None for epoch in (1, 2) for _ in loader.batches(epoch)])
        return 2 * loader.clips_per_epoch / seconds


class Longer(ClipDataset):
    """A dataset repeated `times` times, so that an epoch has batches for all loading processes at once."""

    def __init__(self, dataset: ClipDataset, times: int) -> None:
        self.__dict__.update(dataset.__dict__)
        self._times = times

    def __len__(self) -> int:
        return self._times * super().__len__()

    def __getitem__(self, item: tuple[int, int]) -> list[Sample]:  # type: ignore[override]  # a loader passes both
        epoch, clip = item
        return super().__getitem__((self._times * epoch + clip // super().__len__(), clip % super().__len__()))


def measure_checksums(source: Source, dataset: ClipDataset, rounds: int, what: str) -> Row:
    pairs = [source.time_checksums(dataset) for _ in range(rounds + 1)][1:]  # the first one warms up
    ours, theirs = ([1 / pair[side] for pair in pairs] for side in (0, 1))
    against = f"the same visits without checksums: {median(theirs):.1f} clips/s"
    return compare(what, f"{median(ours):.1f} clips/s per core", ours, theirs, against, "0.98")


def main() -> None:
    arguments = parse_arguments()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for gop in arguments.gop:
            rows += measure(Source(Path(folder) / f"gop {gop}", arguments, gop), arguments, gop)
    report(rows)


PLACES = {
    "ours": "loader",
    "unresized": "loader, resizing left to the device",
    "undecoded": "loader, decoding left to the device",
}
"""The three measurements of our loader, by the name of their rows."""


def measure(source: Source, arguments: argparse.Namespace, gop: int) -> list[Row]:
    first = gop == arguments.gop[0]
    # Measured before decord starts threads: loading processes are forked from this one and would not have them.
    streams = [source.stream(arguments.workers) for _ in range(max(1, arguments.rounds // 2))] if first else []
    work = {"ours": source.load, "unresized": source.load_unresized, "undecoded": source.load_undecoded}
    peers = source.peers() if first else {}
    work |= {"streamed": source.load_streamed} if first else {}
    work |= {"JPEGs": source.decode, **peers, "decord": source.seek}
    seconds = take_turns(work, arguments.rounds)
    rates = {name: [1 / value for value in values] for name, values in seconds.items()}
    rate = {name: median(values) for name, values in rates.items()}
    print(f"key frame every {gop} frames, {source.size:.2f} MB per video: ", end="")
    print(", ".join(f"{name} {value:.1f} clips/s per core" for name, value in rate.items()), flush=True)
    against = f"decord {decord.__version__}, decoding alone: {rate['decord']:.1f} clips/s"
    speeds = {name: f"{rate[name]:.0f} clips/s per core" for name in PLACES}
    rows = [
        compare(f"{what}, key frame every {gop}", speeds[name], rates[name], rates["decord"], against, "5")
        for name, what in PLACES.items()
    ]
    if not first:
        return rows
    for peer in peers:
        against = f"{peer} {_loader_peers.version(peer)}: {rate[peer]:.1f} clips/s"
        rows += [
            compare(f"{what}, beside {peer}", speeds[name], rates[name], rates[peer], against, "1.5")
            for name, what in PLACES.items()
        ]
    rows += [
        measure_checksums(source, source.dataset, arguments.rounds, "loader, checksums of frames"),
        measure_checksums(source, source.guided, arguments.rounds, "loader, checksums of frames, motion and flow"),
    ]
    rows.append(
        compare(
            "loader, stream of whole shards",
            f"{rate['streamed']:.0f} clips/s per core",
            rates["streamed"],
            rates["ours"],
            f"the loader: {rate['ours']:.0f} clips/s",
        )
    )
    limit = f"decoding its JPEGs alone: {rate['JPEGs']:.0f} clips/s"
    for name in ("ours", "unresized"):
        rows.append(
            compare(
                f"{PLACES[name]}, relative to decoding its JPEGs",
                speeds[name],
                rates[name],
                rates["JPEGs"],
                limit,
                "0.8",
            )
        )
    against = f"a step of {arguments.step:g} s with {arguments.batch} clips: the share that one core supplies"
    rows.append(count_cores("loader, cores to supply a step", rates["ours"], arguments.batch / arguments.step, against))
    for name, what in PLACES.items():
        against = f"{arguments.gpu:g} clips/s: the share that one core supplies"
        rows.append(count_cores(f"{what}, cores for an H200", rates[name], arguments.gpu, against, "0.125"))
    # From one core's rate: what as many processes would reach if they did not slow each other down.
    ideal = [arguments.workers * rate["ours"]] * len(streams)
    what, against = (
        f"loader, {arguments.workers} processes, wall-clock",
        f"{arguments.workers} times the rate of one core",
    )
    return [*rows, compare(what, f"{median(streams):.0f} clips/s", streams, ideal, against)]


def count_cores(what: str, rates: Sequence[float], needed: float, against: str, aim: str = "") -> Row:
    """The cores that supply so many clips per second."""
    shares = [value / needed for value in rates]
    cores = f"{needed / median(rates):.1f} cores"
    return Row(what, cores, median(shares), min(shares), max(shares), against, aim)


if __name__ == "__main__":
    main()
