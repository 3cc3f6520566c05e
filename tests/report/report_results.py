"""A small results folder with files of every stage: a bright square moving over noise, and tiny random models."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from reference_shards import sum_parts, write_npy

from stm.config import Config, parse_config
from stm.layout import Layout
from stm.models.weights import zoo
from stm.report import build_report
from stm.report.names import figure_names, table_names
from stm.shards.schema import shard_schema
from stm.storage.files import write_json
from stm.storage.receipts import make_receipt
from stm.storage.tables import write_table
from stm.storage.tars import TarWriter

WIDTH, HEIGHT, STORED, ROWS, COLUMNS = 48, 32, 8, 4, 6
CELLS, TEXT_WIDTH = 2, 16
SPLITS = {"test": 5, "train": 3}

RUN: dict[str, Any] = {
    "model": "tiny",
    "image_size": 32,
    "patch_size": 8,
    "frames": 4,
    "stride": 2,
    "decoder_depth": 1,
    "optimisation": {"epochs": 2, "batch_size": 2, "warmup_epochs": 0},
    "workers": 0,
}


def make_config(root: Path, **changes: Any) -> Config:
    """Two runs with different guides and an untrained run, two caption sources, and two evaluations."""
    values: dict[str, Any] = {
        "name": "made",
        "results": str(root),
        "dataset": {"source": "moving-shapes", "clips": SPLITS},
        "grid": 4,
        "frames": {"every": 2, "short_side": HEIGHT},
        "captions": {"human": {"kind": "human"}, "label": {"kind": "label"}},
        "pack": {"captions": "human"},
        "pretrain": {
            "tube": {**RUN, "mask": {"strategy": "tube", "ratio": 0.75}},
            "text": {**RUN, "mask": {"strategy": "text_top", "ratio": 0.5}},
            "scratch": {**RUN, "mask": {"strategy": "tube", "ratio": 0.75}, "optimisation": {"epochs": 0}},
        },
        "evaluate": {"linear": {"task": "linear"}, "finetune": {"task": "finetune"}},
        "mask_quality": {"split": "test"},
        "report": {"title": "A made run", "clips": 2},
    }
    return parse_config({**values, **changes})


def clip_ids(split: str) -> list[str]:
    return [f"{split}-{number}" for number in range(SPLITS.get(split, 0))]


def box_of(number: int, frame: int) -> list[float]:
    """The square's box in stored frame `frame` of clip `number`; 12 x 12 pixels."""
    left, top = 4 + 3 * frame, 4 + 2 * number
    return [float(left), float(top), float(left + 12), float(top + 12)]


def make_frames(number: int) -> list[bytes]:
    """JPEGs, one per stored frame."""
    generator = np.random.default_rng(number)
    noise = generator.integers(60, 110, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    jpegs = []
    for frame in range(STORED):
        image = noise.copy()
        x0, y0, x1, y1 = map(int, box_of(number, frame))
        image[y0:y1, x0:x1] = (230, 120, 40)
        jpegs.append(simplejpeg.encode_jpeg(image, quality=90, colorspace="RGB"))
    return jpegs


def make_map(number: int) -> np.ndarray:
    """Share of each cell that the square covers, float16 [frames, rows, columns]: a perfect guide."""
    cell = WIDTH // COLUMNS
    cells = np.zeros((STORED, ROWS, COLUMNS), dtype=np.float16)
    for frame in range(STORED):
        x0, y0, x1, y1 = box_of(number, frame)
        for row in range(ROWS):
            for column in range(COLUMNS):
                across = max(0.0, min(x1, (column + 1) * cell) - max(x0, column * cell))
                down = max(0.0, min(y1, (row + 1) * cell) - max(y0, row * cell))
                cells[frame, row, column] = across * down / cell**2
    return cells


def write_shard(layout: Layout, config: Config, split: str, captions: dict[str, list[str]]) -> None:
    """A packed shard, tar and index, with the arrays of `config.pack`."""
    shard, rows = f"{split}-00000", []
    layout.shard_tar(shard).parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(layout.shard_tar(shard)) as tar:
        for number, key in enumerate(clip_ids(split)):
            header = tar.add(f"{key}.json", json.dumps({"key": key}).encode())
            images = list(make_frames(number))
            jpegs = [tar.add(f"{key}.{i:04d}.jpg", data) for i, data in enumerate(images)]
            arrays = make_arrays(config, number, len(captions[key]))
            members = {name: tar.add(f"{key}.{name}.npy", write_npy(array)) for name, array in arrays.items()}
            rows.append(
                {
                    "key": key,
                    "video_id": key,
                    "split": split,
                    "label": ("slides right", "spins")[number % 2],
                    "captions": captions[key],
                    "caption_sources": ["human"] * len(captions[key]),
                    "frames": STORED,
                    "width": WIDTH,
                    "height": HEIGHT,
                    "rows": ROWS,
                    "columns": COLUMNS,
                    "flow_cells": CELLS if "flow" in members else None,
                    "text_width": TEXT_WIDTH if "text" in members else None,
                    "pts": [i / 8 for i in range(STORED)],
                    "json_offset": header.offset,
                    "json_size": header.size,
                    "offsets": [m.offset for m in jpegs],
                    "sizes": [m.size for m in jpegs],
                    **sum_parts(images, arrays),
                    **{f"{name}_offset": member.offset for name, member in members.items()},
                    **{f"{name}_size": member.size for name, member in members.items()},
                    "sha256": [m.sha256 for m in (header, *jpegs, *members.values())],
                }
            )
    write_table(layout.shard(shard), pa.Table.from_pylist(rows, shard_schema()), make_receipt("shards", {}, ["numpy"]))


def make_arrays(config: Config, number: int, captions: int) -> dict[str, np.ndarray]:
    """The packed arrays of a clip; the second caption's similarity is the first's upside down."""
    cells, pack = make_map(number), config.pack
    arrays = {}
    if pack.flow:
        moves = np.zeros((2, STORED, ROWS * CELLS, COLUMNS * CELLS, 2), dtype=np.float16)
        moves[0, :-1, ..., 0], moves[1, 1:, ..., 0] = 3 * COLUMNS / WIDTH, -3 * COLUMNS / WIDTH
        arrays["flow"] = moves
    if pack.motion:
        arrays["motion"] = np.stack([cells, cells, cells], axis=-1)
    if pack.similarity and pack.sources:
        arrays["similarity"] = np.stack([cells, cells[:, ::-1]] * captions)[:captions]
    if pack.text:
        vectors = np.random.default_rng(number).standard_normal((captions, TEXT_WIDTH))
        arrays["text"] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return arrays


def write_offline(layout: Layout, config: Config) -> None:
    """Manifest, truth, and the tables of frames, captions, similarity and motion."""
    names = [(split, key) for split in SPLITS for key in clip_ids(split)]
    manifest = [{"video_id": key, "key": key, "split": split} for split, key in names]
    write_table(layout.manifest, pa.Table.from_pylist(manifest), make_receipt("manifest", {}))
    write_json(layout.shard_index, {"shards": {f"{s}-00000": {"clips": n, "split": s} for s, n in SPLITS.items()}})
    refused = [{"stage": "manifest", "video_id": "<b>lost</b>", "path": "lost & found.mp4", "status": "missing_file",
                "policy": "drop", "detail": "no such file"}]  # fmt: skip
    write_table(layout.quarantine, pa.Table.from_pylist(refused), make_receipt("manifest", {}))
    truth = [
        {"video_id": key, "split": split, "camera": ("fixed", "moving")[number % 2], "width": 2 * WIDTH,
         "height": 2 * HEIGHT, "frames": 2 * STORED,
         "boxes": [2 * v for f in range(2 * STORED) for v in box_of(number, f // 2)]}
        for split in SPLITS for number, key in enumerate(clip_ids(split))
    ]  # fmt: skip
    write_table(layout.generated / "truth.parquet", pa.Table.from_pylist(truth), make_receipt("generate", {}))
    for split in SPLITS:
        captions = {key: [f"an orange square, {key}", "a square & a <tag>"] for key in clip_ids(split)}
        write_tables(layout, config, split, captions)
        write_shard(layout, config, split, captions)


def write_tables(layout: Layout, config: Config, split: str, captions: dict[str, list[str]]) -> None:
    shard = f"{split}-00000"
    common = [{"key": key, "video_id": key, "status": "ok", "policy": "keep", "detail": ""} for key in captions]
    frames = [{**row, "path": f"{row['key']}.mp4", "kept": True, "decode_index": [2 * i for i in range(STORED)]}
              for row in common]  # fmt: skip
    frames[0] |= {"status": "truncated", "detail": "ends after 1.0 of 2.0 s"}
    write_table(layout.frames(shard), pa.Table.from_pylist(frames), make_receipt("frames", config.frames, ["av"]))
    motion = [dict(row) for row in common]
    motion[-1] |= {"status": "unsupported_motion", "policy": "drop", "detail": "vp9"}
    write_table(layout.motion(shard), pa.Table.from_pylist(motion), make_receipt("motion", config.motion, ["av"]))
    for source in config.captions:
        rows = [{**row, "caption_index": i, "caption": c} for row in common for i, c in enumerate(captions[row["key"]])]
        if source == "label":
            failed = {"caption_index": 0, "caption": None, "status": "caption_missing", "detail": "no label"}
            rows = [*rows[2:], {**common[0], **failed, "policy": "drop"}]
        write_table(layout.captions(source, shard), pa.Table.from_pylist(rows), make_receipt("captions", {}))
        receipt = make_receipt(
            "similarity",
            config.similarity,
            ["torch"],
            model={"model": config.similarity.model, "weights_sha256": "ab" * 32},
        )
        write_table(layout.similarity(source, shard), pa.Table.from_pylist(common), receipt)


def make_headline(
    name: str, label: str, value: float, interval: list[float] | None, chance: float | None
) -> dict[str, Any]:
    """A headline in per cent, as evaluations write it."""
    return {"name": name, "label": label, "value": value, "interval": interval, "chance": chance,
            "higher_is_better": True, "scale": 100, "unit": "%"}  # fmt: skip


def write_training(layout: Layout, config: Config) -> None:
    """Weights and losses of every run, and every evaluation."""
    for number, (name, run) in enumerate(config.pretrain.items()):
        torch.manual_seed(number)
        zoo.save(zoo.build(run), layout.pretrain(name) / "weights.safetensors")
        steps = 40 * run.optimisation.epochs
        lines = [
            {"step": s, "epoch": s // 40, "loss": 0.3 + 0.7 * 0.97**s + 0.01 * number} for s in range(1, steps + 1)
        ]
        (layout.pretrain(name) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for task in config.evaluate:
            top1 = 0.5 + 0.1 * number
            per_class = {"slides right": {"clips": 3, "correct": 2, "accuracy": 2 / 3},
                         "spins": {"clips": 0, "correct": 0, "accuracy": None}}  # fmt: skip
            interval = [top1 - 0.2, top1 + 0.2]
            write_json(
                layout.evaluate(name, task) / "metrics.json",
                {"task": task, "headline": make_headline("top1", "top-1", top1, interval, 0.25), "top1": top1, "top5": 1.0,
                 "classes": 4, "train_clips": 3, "test_clips": 5, "confidence95": interval, "per_class": per_class},
            )  # fmt: skip
    rows = [
        {"guide": guide, "source": source, "camera": camera, "ratio": ratio, "coverage": coverage,
         "low": coverage - 0.05, "high": coverage + 0.04, "clips": 3, "chance": ratio}
        for guide, source, ratio, pair in (("text", "human", 0.6, (0.94, 0.92)), ("motion", None, 0.6, (0.96, 0.61)))
        for camera, coverage in zip(("fixed", "moving"), pair, strict=True)
    ]  # fmt: skip
    write_json(layout.mask_quality, {"rows": rows})


def write_costs(layout: Layout) -> None:
    """Snakemake's benchmark files and a plan."""
    head = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    for rule, job, seconds in (
        ("frames", "train-00000", 12.5),
        ("frames", "test-00000", 7.5),
        ("pretrain", "tube", 95.0),
    ):
        path = layout.benchmarks / rule / f"{job}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{head}{seconds}\t0:00:12\t220.5\t-\t-\t-\tNA\tNA\t98.0\t{seconds * 1.5}\n")
    stages = [{"stage": "frames", "jobs": 2, "cpu_hours": 0.01, "gpu_hours": 0.0, "gigabytes": 0.1},
              {"stage": "pretrain/tube", "jobs": 1, "cpu_hours": 0.02, "gpu_hours": 0.001, "gigabytes": 0.1},
              {"stage": "pretrain/text", "jobs": 1, "cpu_hours": 0.03, "gpu_hours": 0.001, "gigabytes": 0.1}]  # fmt: skip
    write_json(layout.plan, {"name": "made", "stages": stages})


def make_results(root: Path) -> Config:
    """Write a complete results folder under `root`; return its config."""
    config = make_config(root)
    layout = Layout.of(config)
    write_offline(layout, config)
    write_training(layout, config)
    write_costs(layout)
    return config


def copy_results(config: Config, folder: Path) -> Config:
    """Copy a results folder, so that a test may write into it; return the config with the copy's path."""
    shutil.copytree(config.results, folder)
    return config.model_copy(update={"results": str(folder)})


def build_copy(config: Config, folder: Path) -> Config:
    """Copy a results folder and build its report; return the config with the copy's path."""
    config = copy_results(config, folder)
    build_report(config, Layout.of(config))
    return config


def check_report_files(config: Config) -> None:
    """Assert that the report wrote exactly the files that the config names."""
    layout = Layout.of(config)
    assert sorted(path.name for path in layout.tables.iterdir()) == sorted(table_names(config))
    assert sorted(path.name for path in layout.figures.iterdir()) == sorted(figure_names(config))


def check_same_bytes(config: Config) -> None:
    """Assert that building the report again changes no file."""
    layout = Layout.of(config)
    files = [layout.report, *sorted(layout.tables.iterdir()), *sorted(layout.figures.iterdir())]
    before = {path: path.read_bytes() for path in files}
    build_report(config, layout)
    assert {path: path.read_bytes() for path in files} == before
