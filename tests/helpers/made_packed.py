"""A made shard with everything that can be packed, and the packing of it, for the tests of shards."""

from pathlib import Path
from typing import Any

import numpy as np
from made_shard import Clip, Made, make_shard

from stm.config import BadInput, HumanCaptions, LabelCaptions, Pack
from stm.preprocess.captions.write import read_captions, write_captions
from stm.preprocess.packing.pack import pack_shard
from stm.preprocess.similarity.score import SIMILARITY_SCHEMA
from stm.preprocess.text.encode import TEXT_SCHEMA
from stm.shards.grid import map_shape
from stm.storage.tables import read_table, write_rows

GRID = 4
KEEP_GOING = BadInput(max_failure_rate=1.0)
CLIPS = [
    Clip("b", frames=2, captions=["one", "two"]),
    Clip("a video/with.dots", frames=3, width=32, height=40, captions=["three"], label=None),
    Clip("silent", frames=1, captions=None),
    Clip("lost", captions=["never"], kept=False),
]
ALL = Pack(captions="human", similarity=True, motion=True)
EVERYTHING = Pack(captions=("label", "human"), similarity=True, motion=True, flow=True, text=True)
SOURCES: dict[str, HumanCaptions | LabelCaptions] = {
    "human": HumanCaptions(kind="human"),
    "label": LabelCaptions(kind="label", templates=("{}.", "a video of {}.")),
}
WIDTH = 5  # of a caption's vector


def path_of(folder: Path, part: str, source: str = "human") -> Path:
    """Where a made table of a caption source lies."""
    return folder / (f"{part}.parquet" if source == "human" else f"{source}-{part}.parquet")


def make_inputs(folder: Path, clips: list[Clip] = CLIPS) -> Made:
    """A made shard with tables of captions, similarity and text of two sources beside it."""
    made = make_shard(folder, clips, GRID)
    for source, settings in SOURCES.items():
        captions = path_of(folder, "captions", source)
        write_captions(made.slice, made.tar, made.index, captions, settings, KEEP_GOING)
        write_maps(made, source)
    return made


def write_maps(made: Made, source: str) -> None:
    """Random similarity maps and text vectors in the formats of their stages."""
    rng, maps, vectors = np.random.default_rng(len(source)), [], []
    said = read_captions(path_of(made.folder, "captions", source))
    for clip in [r for r in read_table(made.index).to_pylist() if r["kept"]]:
        end = said[clip["key"]]
        words = [text for _, text in end.texts]
        rows, columns = map_shape(clip["width"], clip["height"], GRID)
        values = rng.uniform(-1, 1, (len(words), clip["frames"], rows, columns)).astype(np.float16)
        text = rng.uniform(-1, 1, (len(words), WIDTH)).astype(np.float16)
        row = {"key": clip["key"], "video_id": clip["video_id"], "captions": words}
        ended = {"status": str(end.status), "policy": "keep", "detail": ""}
        size = {"frames": clip["frames"], "rows": rows, "columns": columns}
        maps.append({**row, **size, "similarity": values if words else None, **ended})
        vectors.append({**row, "width": WIDTH, "text": text if words else None, **ended})
    write_rows(path_of(made.folder, "similarity", source), SIMILARITY_SCHEMA, maps, {}, group=2)
    write_rows(path_of(made.folder, "text", source), TEXT_SCHEMA, vectors, {"model": {"model": "made"}}, group=2)


def run(made: Made, pack: Pack = ALL, bad_input: BadInput = KEEP_GOING, name: str = "packed", **paths: Any) -> Path:
    parts = ("captions", "similarity", "text")
    inputs = {part: {source: path_of(made.folder, part, source) for source in pack.sources} for part in parts}
    tar, index = made.folder / f"{name}.tar", made.folder / f"{name}.parquet"
    arrays = {**inputs, "motion": made.motion, "flow": made.flow, **paths}
    captions = arrays.pop("captions")
    pack_shard(made.slice, made.tar, made.index, captions, arrays, tar, index, pack, GRID, bad_input)
    return tar


def index_of(tar: Path) -> list[dict[str, Any]]:
    return read_table(tar.with_suffix(".parquet")).to_pylist()


def member_of(tar: Path, offset: int, size: int) -> bytes:
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)
