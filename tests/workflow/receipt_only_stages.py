"""Every stage run for its receipts: its own code on shards without clips, and without loading models, training or scoring."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from recorded_runs import touch

import stm.datasets
import stm.datasets.moving_shapes.generate as generate
import stm.datasets.stage
import stm.evaluation.launch
import stm.evaluation.masks.box_coverage as box_coverage
import stm.evaluation.masks.crop_agreement as crop_agreement
import stm.preprocess.captions.blip2 as blip2
import stm.preprocess.captions.language_model as language_model
import stm.preprocess.captions.vision_language as vision_language
import stm.preprocess.flow.raft as raft
import stm.preprocess.similarity.dense_scorer as dense_scorer
import stm.preprocess.similarity.score as score
import stm.preprocess.text.encode as encode
import stm.training.launch
from stm.config import parse_config
from stm.data.crop_boxes import Box
from stm.evaluation.results import make_evaluation_receipt
from stm.jobs.journal import Journal
from stm.manifest import MANIFEST_SCHEMA, write_slices
from stm.preprocess.clip_outcomes import run_shard
from stm.pretrained.local_files import without_folders
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages
from stm.storage.files import read_json, write_json
from stm.storage.tables import read_receipt, write_table
from stm.training.batches import hash_shards
from stm.training.pretraining import make_plan, write_record

OFFLINE_STAGES = (
    *("generate", "manifest", "split", "frames", "captions", "embeddings", "similarity"),
    *("text", "motion", "flow", "shards", "mask_quality", "crop_agreement"),
)
LEARNING_STAGES = ("pretrain", "evaluate")
FACTS = {"status": "ok", "detail": "", "bytes": 1, "sha256": "0", "width": 64, "height": 64, "fps": 8.0}


@dataclass(frozen=True)
class Receipts:
    """The receipt of a job's output, and that of its journal or checkpoints; None if it has none."""

    output: Any
    journal: Any


def run_all(values: Mapping[str, Any], stages: tuple[str, ...]) -> None:
    """Run all jobs of the stages in the current folder."""
    jobs = Jobs(parse_config(values))
    for name in stages:
        for dataset in jobs.configs:
            for job in all_stages()[name].each(jobs, dataset):
                run_one(name, job)


def first_jobs(values: Mapping[str, Any], stages: tuple[str, ...]) -> dict[str, tuple[str, Job]]:
    """The first job of each kind and its stage, by the job's name as in `recorded_runs`, such as `clips:evaluate/tgm/linear`."""
    jobs = Jobs(parse_config(values))
    found: dict[str, tuple[str, Job]] = {}
    for stage in (all_stages()[name] for name in stages):
        for dataset in jobs.configs:
            for job in stage.each(jobs, dataset):
                parts = [getattr(job, key) for key in ("source", "run", "task") if key in stage.per]
                kind = "/".join([stage.name, *parts])
                found.setdefault(f"{dataset}:{kind}" if jobs.study.datasets else kind, (stage.name, job))
    return found


def run_one(name: str, job: Job, into: Path | None = None) -> Receipts:
    """Run a job in the current folder, where its inputs are; its outputs are written to `into` if given."""
    stage = all_stages()[name]
    if "split" in stage.per:
        job = replace(job, split=job.shard.rpartition("-")[0])
    outputs = {key: into / path if into else path for key, path in stage.outputs(job).items()}
    for path in outputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    with _without_work(into or Path()) as journals:
        stage.run(job, stage.inputs(job), outputs, 1)
    path = outputs[stage.receipt]
    receipt = read_json(path)["receipt"] if path.suffix == ".json" else read_receipt(path)
    return Receipts(receipt, next(iter(journals), None))


@contextmanager
def _without_work(into: Path) -> Iterator[list[Any]]:
    """Replace what takes time; the list receives the receipts of journals and checkpoints.

    Args:
        into: folder for the slices, which are no declared output.
    """
    journals: list[Any] = []
    start = Journal.__init__

    def record(self: Journal, output: Path, receipt: Mapping[str, Any]) -> None:
        journals.append(dict(receipt))
        start(self, output, receipt)

    def train(run: Any, shards: list[Path], output: Path, seed: int, image_indexes: list[Path], **others: Any) -> None:
        seed = seed if run.seed is None else run.seed
        plan = make_plan(run, 1, seed, hash_shards([*shards, *image_indexes]), None, None, output)
        journals.append(plan.origin)
        touch(output / "weights.safetensors")
        write_record(run, plan, output, {})

    def evaluate(task: Any, run: Any, given: Any) -> None:
        test, train = (_dataset(files) for files in (given.test, given.train))
        text = given.text if task.encodes_text else None
        receipt = make_evaluation_receipt(task, run, given, test, train if given.train else None, text)
        write_json(given.output / "metrics.json", {"receipt": receipt})

    def make_empty_videos(dataset: Any, seed: int, folder: Path, clips: list[Any], processes: int) -> Iterator[Any]:
        for clip in clips:
            touch(folder / "videos" / clip[0] / f"{generate.clip_id(*clip)}.mp4")
            yield generate.clip_id(*clip), "0"

    def deal(manifest: Path, folder: Path, index: Path, shard_size: int) -> list[str]:
        shards = write_slices(manifest, into / folder, index, shard_size)
        # The stages that follow have nothing to decode, score or encode.
        for path in (into / folder).iterdir():
            write_table(path, MANIFEST_SCHEMA.empty_table(), {})
        return shards

    def load(self: Any, source: Any, *_: Any) -> None:
        self._source, self.identity = source, _identity(source.model)

    measured = [("clip", "", {"random": None})]
    crop = (np.zeros((8, 8, 3), np.uint8), "a", np.zeros((4, 4)), Box(0, 0, 8, 8), "clip")
    replaced = [
        (Journal, "__init__", record),
        (generate, "_make_all", make_empty_videos),
        (stm.datasets, "probe_files", lambda paths, *_: [(path, dict(FACTS)) for path in paths]),
        (stm.datasets.stage, "write_slices", deal),
        (stm.datasets, "_stamp", lambda root, path: path),
        (blip2.Blip2Captioner, "__init__", load),
        (language_model.LanguageModel, "__init__", load),
        (vision_language.VisionLanguageModel, "__init__", load),
        (score, "load_clip", _load_clip),
        (score, "PatchScorer", lambda clip, grid, *_: SimpleNamespace(clip=clip, grid=grid)),
        (dense_scorer, "DenseScorer", lambda clip, grid, *_: SimpleNamespace(clip=clip, grid=grid)),
        (score._Captions, "embed", lambda *_: None),
        (score, "embed_clips", lambda *_: iter(())),
        (score, "_check_made", lambda *_: None),
        (encode.TextEncoder, "load", staticmethod(_load_text)),
        (raft, "Raft", lambda path, *_: SimpleNamespace(identity={"model": path.name})),
        (run_shard.__globals__, "run_isolated", lambda *_: iter(())),
        (box_coverage, "read_truth", lambda *_: {"clip": SimpleNamespace(camera="fixed")}),
        (box_coverage, "_read_maps", lambda *_: measured),
        (box_coverage, "measure_coverage", lambda *_: (0.5, 0.5)),
        (crop_agreement, "load_clip", _load_clip),
        (crop_agreement, "PatchScorer", lambda clip, *_: SimpleNamespace(clip=clip)),
        (crop_agreement, "_sample_crops", lambda *_: [crop]),
        (crop_agreement, "crop_map", lambda *_: np.zeros((4, 4))),
        (crop_agreement, "mask_by_text", lambda *_: np.zeros(16, bool)),
        (crop_agreement, "overlap", lambda *_: 1.0),
        (crop_agreement, "_score_crop", lambda *_: np.zeros((4, 4))),
        (stm.training.launch, "run_pretraining", train),
        (stm.evaluation.launch, "run_evaluation", evaluate),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            change = patch.dict(owner, {name: replacement}) if isinstance(owner, dict) else None
            stack.enter_context(change or patch.object(owner, name, replacement))
        yield journals


def _identity(model: str) -> dict[str, str]:
    return {"model": without_folders({"model": model})["model"], "weights_sha256": "0"}


def _load_clip(model: str, *_: Any) -> Any:
    return SimpleNamespace(identity=_identity(model))


def _load_text(settings: Any, device: Any = None) -> Any:
    return SimpleNamespace(
        identity=_identity(settings.model), encode=lambda texts: np.zeros((len(texts), 4), np.float32)
    )


def _dataset(indexes: list[Path]) -> Any:
    return SimpleNamespace(index=SimpleNamespace(tars=[path.with_suffix(".tar") for path in indexes]))
