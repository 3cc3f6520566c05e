"""Dense similarity maps beside those of patches, on the demo's test clips: agreement, the true box, and time.

The maps are made by the similarity stage from the demo's frames, the generator's captions and the demo's CLIP, and compared with
the named object's true box and, on random crops, with the patches of the crop (`crop_agreement`). A third column keeps the
residual connections and the MLP of the last block, as the code of MaskCLIP's authors does (docs/masking.md).

    python -m benchmarks.dense                   # 128 clips, about three minutes of CPU time
    python -m benchmarks.dense --clips 16 --model local-dir:models/clip
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks._table import Row, report
from stm.config import CropComparison, parse_config
from stm.demo.measure import auc
from stm.evaluation.masks.box_coverage import measure_coverage, read_truth, share_in_cells
from stm.evaluation.masks.crop_agreement import chance_overlap, measure_crop_agreement, overlap
from stm.masking import count_masked
from stm.preprocess.similarity import dense_scorer
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages
from stm.storage.files import read_json
from stm.storage.tables import stream_rows

ROOT = Path(__file__).parents[1]
RATIO = 0.6  # of text_top, TGM's Figure 3a
CPU = "CPU seconds"
# Column of the table -> method, and whether the whole last block is run on each token.
COLUMNS = {"patches": ("patches", False), "dense": ("dense", False), "residual and MLP": ("dense", True)}

Maps = Mapping[str, NDArray[np.float32]]  # by key, [K, T, R, C]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=128, help="test clips of the demo")
    parser.add_argument("--crops", type=int, default=200, help="random crops that are compared")
    parser.add_argument("--model", help="as similarity.model in a config; default: the demo's CLIP")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(measure(Path(folder), arguments.clips, arguments.crops, arguments.model))


def measure(folder: Path, clips: int, crops: int, model: str | None) -> list[Row]:
    """The rows of `dense` and of its variant, each beside `patches`."""
    jobs = {name: make_job(folder, clips, method, model) for name, (method, _) in COLUMNS.items()}
    first = next(iter(jobs.values()))
    for stage in ("generate", "manifest", "split", "frames", "captions"):
        run(first, stage)
    found: dict[str, dict[str, float]] = {}
    maps: dict[str, Maps] = {}
    for name, (_, whole) in COLUMNS.items():
        with last_block(whole):
            found[name], maps[name] = score(jobs[name], crops)
        found[name] |= compare_with_boxes(jobs[name], maps[name]) | agree(maps[name], maps["patches"])
        print(name, {what: round(value, 3) for what, value in found[name].items()}, flush=True)
    return [
        Row(
            f"{name}, {what}",
            f"{value:.3f}",
            value / found["patches"][what] if what == CPU else None,
            *(None, None),
            f"patches: {found['patches'][what]:.3f}"
            + (f"; chance: {found['patches'].get(f'chance of {what}', 0):.3f}" if what != CPU else ""),
        )
        for name in list(COLUMNS)[1:]
        for what, value in found[name].items()
        if not what.startswith("chance")
    ]


def make_job(folder: Path, clips: int, method: str, model: str | None) -> Job:
    """The job of the only shard of the demo's test clips."""
    demo = yaml.safe_load((ROOT / "config/demo.yaml").read_text())
    similarity = {"model": model or f"local-dir:{ROOT}/stm/assets/demo-clip", "method": method}
    values = {
        "name": "dense",
        "results": str(folder),
        "shard_size": clips,
        **{key: demo[key] for key in ("seed", "grid", "frames")},
        "dataset": {**demo["datasets"]["shapes"]["dataset"], "clips": {"test": clips}},
        "captions": {"human": {"kind": "human"}},
        "similarity": {**demo["similarity"], **similarity, "keep_embeddings": False},
        "pack": {"captions": "human", "motion": False},
    }
    jobs = Jobs(parse_config(values), lambda _: ["test-00000"])
    return jobs.make(dataset="dense", shard="test-00000", split="test", source="human")


def run(job: Job, name: str) -> None:
    stage = all_stages()[name]
    if "shard" not in stage.per:
        job = replace(job, shard="", split="", source="")
    outputs = stage.outputs(job)
    for path in outputs.values():
        assert isinstance(path, Path)
        path.parent.mkdir(parents=True, exist_ok=True)
    stage.run(job, stage.inputs(job), outputs, 1)


@contextmanager
def last_block(whole: bool) -> Iterator[None]:
    """Run the last block's attention on each token alone, or all of the block."""
    attend = dense_scorer.attend
    with patch.object(dense_scorer, "attend", (lambda block, states: block(states)) if whole else attend):
        yield


def score(job: Job, crops: int) -> tuple[dict[str, float], Maps]:
    """Run the similarity stage; its CPU seconds and the agreement on crops, and the maps."""
    layout, settings = job.layout, job.config.similarity
    table = layout.similarity("human", job.shard)
    table.unlink(missing_ok=True)
    began = time.process_time()
    run(job, "similarity")
    found = {CPU: time.process_time() - began}
    comparison = CropComparison(split="test", ratio=RATIO, crops=crops, image_size=128, patch_size=16)
    output = table.with_name("agreement.json")
    frames = [layout.frames_tar(job.shard)], [layout.frames(job.shard)]
    measure_crop_agreement(*frames, [table], settings, comparison, output, device="cpu")
    agreement = read_json(output)
    found |= {"IoU on crops": agreement["iou"], "chance of IoU on crops": agreement["chance_iou"]}
    return found, {
        row["key"]: row["similarity"].reshape(-1, row["frames"], row["rows"], row["columns"]).astype(np.float32)
        for row in stream_rows(table, ("similarity",))
    }


def compare_with_boxes(job: Job, maps: Maps) -> dict[str, float]:
    """Mean AUC of cells at least half inside the true box against those outside, and the share of the box that is hidden."""
    truth = all_stages()["generate"].outputs(job)["truth"]
    assert isinstance(truth, Path)
    aucs: list[float] = []
    covered: dict[str, list[float]] = {"fixed": [], "moving": []}
    for key, clip in read_truth([job.layout.frames(job.shard)], truth, "test").items():
        captions, frames, rows, columns = maps[key].shape
        shares = share_in_cells(clip.boxes, rows, columns)
        sizes = (clip.boxes[:, 2] - clip.boxes[:, 0]) * (clip.boxes[:, 3] - clip.boxes[:, 1]) * rows * columns
        for frame in range(frames):
            inside, outside = shares[frame] * sizes[frame] >= 0.5, shares[frame] == 0
            if inside.any() and outside.any():
                scores = maps[key][:, frame].reshape(captions, -1).astype(np.float64)
                aucs += [auc(one[inside], one[outside]) for one in scores]
        measured = measure_coverage("text_top", maps[key], clip, RATIO, key)
        if measured is not None:
            covered[clip.camera].append(measured[0])
    hidden = {f"hidden of the box, camera {name}": float(np.mean(found)) for name, found in covered.items() if found}
    chances = {f"chance of {what}": RATIO for what in hidden}
    return {"AUC of the box": float(np.mean(aucs)), "chance of AUC of the box": 0.5, **hidden, **chances}


def agree(maps: Maps, patches: Maps) -> dict[str, float]:
    """Mean correlation with the maps of patches, and IoU of the cells that `text_top` hides, over frames and captions."""
    correlations, overlaps = [], []
    for key, own in maps.items():
        cells = own[0, 0].size
        hidden = count_masked(cells, RATIO)
        for one, other in zip(own.reshape(-1, cells), patches[key].reshape(-1, cells), strict=True):
            if min(one.std(), other.std()) > 0:
                correlations.append(np.corrcoef(one, other)[0, 1])
            first, second = (np.argsort(np.argsort(-scores, kind="stable")) < hidden for scores in (one, other))
            overlaps.append(overlap(first, second))
    chance = chance_overlap(cells, RATIO)
    return {
        "correlation": float(np.mean(correlations)),
        "IoU with patches": float(np.mean(overlaps)),
        "chance of IoU with patches": chance,
    }


if __name__ == "__main__":
    main()
