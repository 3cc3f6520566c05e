"""The inputs of packing, with every array and two caption sources, and the packing stage on them."""

from pathlib import Path
from typing import Any

import numpy as np
from stage_outputs import Clip, StageOutputs, make_stage_outputs

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
    Clip("lost", captions=["never"], kept=False),  # the frames stage dropped it
]
ALL = Pack(captions="human", similarity=True, motion=True)
EVERYTHING = Pack(captions=("label", "human"), similarity=True, motion=True, flow=True, text=True)
SOURCES: dict[str, HumanCaptions | LabelCaptions] = {
    "human": HumanCaptions(kind="human"),
    "label": LabelCaptions(kind="label", templates=("{}.", "a video of {}.")),
}
WIDTH = 5  # of a text vector


def path_of(folder: Path, part: str, source: str = "human") -> Path:
    """Path of a caption source's table."""
    return folder / (f"{part}.parquet" if source == "human" else f"{source}-{part}.parquet")


def make_inputs(folder: Path, clips: list[Clip] = CLIPS) -> StageOutputs:
    """Write the outputs of the stages before packing, with captions, similarity and text of two sources."""
    files = make_stage_outputs(folder, clips, GRID)
    for source, settings in SOURCES.items():
        captions = path_of(folder, "captions", source)
        write_captions(files.slice, files.tar, files.index, captions, settings, KEEP_GOING)
        write_maps(files, source)
    return files


def write_maps(files: StageOutputs, source: str) -> None:
    """Write random similarity maps and text vectors in the formats of their stages."""
    rng = np.random.default_rng(len(source))
    maps = []
    vectors = []
    captions_by_key = read_captions(path_of(files.folder, "captions", source))
    for clip in [r for r in read_table(files.index).to_pylist() if r["kept"]]:
        captions = captions_by_key[clip["key"]]
        texts = [text for _, text in captions.texts]
        rows, columns = map_shape(clip["width"], clip["height"], GRID)
        values = rng.uniform(-1, 1, (len(texts), clip["frames"], rows, columns)).astype(np.float16)
        text = rng.uniform(-1, 1, (len(texts), WIDTH)).astype(np.float16)
        row = {"key": clip["key"], "video_id": clip["video_id"], "captions": texts}
        status = {"status": str(captions.status), "policy": "keep", "detail": ""}
        size = {"frames": clip["frames"], "rows": rows, "columns": columns}
        maps.append({**row, **size, "similarity": values if texts else None, **status})
        vectors.append({**row, "width": WIDTH, "text": text if texts else None, **status})
    write_rows(path_of(files.folder, "similarity", source), SIMILARITY_SCHEMA, maps, {}, group=2)
    write_rows(path_of(files.folder, "text", source), TEXT_SCHEMA, vectors, {"model": {"model": "made"}}, group=2)


def run(
    files: StageOutputs, pack: Pack = ALL, bad_input: BadInput = KEEP_GOING, name: str = "packed", **paths: Any
) -> Path:
    """Pack the shard and return its tar; `paths` replace inputs by name."""
    parts = ("captions", "similarity", "text")
    inputs = {part: {source: path_of(files.folder, part, source) for source in pack.sources} for part in parts}
    tar, index = files.folder / f"{name}.tar", files.folder / f"{name}.parquet"
    arrays = {**inputs, "motion": files.motion, "flow": files.flow, **paths}
    captions = arrays.pop("captions")
    pack_shard(files.slice, files.tar, files.index, captions, arrays, tar, index, pack, GRID, bad_input)
    return tar


def index_of(tar: Path) -> list[dict[str, Any]]:
    return read_table(tar.with_suffix(".parquet")).to_pylist()


def member_of(tar: Path, offset: int, size: int) -> bytes:
    with tar.open("rb") as file:
        file.seek(offset)
        return file.read(size)
