"""Every evaluation on small splits of uneven size, in one process or as one of two, in batches of two clips."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from captioned_clips import RUN as CONTRAST_RUN
from captioned_clips import CaptionedClip, save_fitted, write_captioned
from color_clips import LABELS, fine_tuning
from color_clips import RUN as COLOR_RUN
from language_runs import make_run, make_small_bert
from safetensors.torch import load_file
from training_shards import make_shard

from stm.config import (
    Captioning,
    EvaluationTask,
    LanguageOptimisation,
    LinearProbe,
    MultipleChoice,
    QuestionAnswering,
    Retrieval,
    Run,
    Text,
    VideoRetrieval,
    VideoTextRetrieval,
    ZeroShot,
)
from stm.distributed.process import Process
from stm.evaluation import EvaluationInputs
from stm.evaluation.captioning.scores import NAMES, CaptionScores
from stm.evaluation.tasks import TASKS
from stm.storage.files import read_json, write_json
from stm.storage.tables import read_receipt, read_table, write_table
from stm.training.pretraining import pretrain

TEXT = Text(model=f"local-dir:{Path(__file__).parents[2] / 'stm/assets/demo-clip'}")
TUNING = LanguageOptimisation(epochs=2, batch_size=16, accumulate=2, learning_rate=1e-3, warmup_epochs=0)
CHOSEN: dict[str, Any] = {"optimisation": TUNING, "validation_split": "val", "drop_path": 0.5}
RANDOM = {"auto_augment": "rand-m7-n4-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
# In passes of two clips a process and two passes a step.
RECIPE: dict[str, Any] = {"repeats": 2, "drop_path": 0.5, "head_dropout": 0.5}
STEPS = {"batch_size": 16, "accumulate": 2, "epochs": 3, "learning_rate": 0.02}

COLOR: dict[str, EvaluationTask] = {
    "linear": LinearProbe(task="linear", epochs=5, batch_size=8, views=2),
    "fine-tuning": fine_tuning(RANDOM, STEPS, **RECIPE),
    "same class": VideoRetrieval(task="video_retrieval"),
    "same clip": VideoRetrieval(task="video_retrieval", hit="clip", views=2),
}
CONTRAST: dict[str, EvaluationTask] = {
    "zero-shot": ZeroShot(task="zero_shot", views=2),
    "contrast retrieval": Retrieval(task="retrieval"),
}
LANGUAGE: dict[str, EvaluationTask] = {
    "retrieval, zero-shot": VideoTextRetrieval(task="video_text_retrieval", depth=3),
    "retrieval": VideoTextRetrieval(task="video_text_retrieval", negatives_among=4, depth=3, **CHOSEN),
    "questions": QuestionAnswering(task="question_answering", depth=3, **CHOSEN),
    "multiple choice": MultipleChoice(task="multiple_choice", negatives_among=4, **CHOSEN),
    "captions": Captioning(task="captioning", beams=2, max_caption_tokens=6, **CHOSEN),
}
ALL = {**COLOR, **CONTRAST, **LANGUAGE}
# The same with the model divided among the processes.
SHARDED = ("fine-tuning", "retrieval", "captions")
# Test clips are as few as can be: of two processes one has none.
FEW = ("linear", "retrieval, zero-shot", "multiple choice", "captions")


def prepare(folder: Path) -> None:
    """Splits and weights: 11 training clips, 5 of validation, 7 to test, and 1 to test."""
    for name, clips in (("train", 11), ("val", 5), ("test", 7), ("few", 1)):
        _write_split(folder / "color" / name / f"{name}-00000.parquet", clips, name)
    told = [
        CaptionedClip(LABELS[n % 3], [f"a {LABELS[n % 3]} square", "a clip"], ["a", "a"], np.eye(4, 96)[[n % 3, 3]])
        for n in range(7)
    ]
    for name, shown in (("test", told), ("few", told[:2])):
        write_captioned(folder / "contrast" / name / f"{name}-00000.parquet", shown)
    run = language_run(folder)
    train = folder / "color/train/train-00000.parquet"
    pretrain(COLOR_RUN, [train], folder / "color/run", 3, "cpu")
    pretrain(run, [train], folder / "language/run", 0, "cpu")
    wanted = np.random.default_rng(0).normal(size=(7, 96))
    test = folder / "contrast/test/test-00000.parquet"
    (folder / "contrast/run").mkdir()
    save_fitted(folder / "contrast/run/weights.safetensors", CONTRAST["zero-shot"], [test], wanted)


def _write_split(index: Path, clips: int, prefix: str) -> None:
    """Clips whose captions and one or two questions say their color."""
    make_shard(index, [LABELS[number % 3] for number in range(clips)], clips, prefix)
    rows = read_table(index).to_pylist()
    for number, row in enumerate(rows):
        color = row["label"]
        row["captions"] = [f"a {color} circle moves", f"{color} {number} left"]
        options = [f"a {c} star" for c in LABELS]
        row["questions"] = [
            {"question": "what color is it", "answer": color, "choices": None},
            {"question": "which", "answer": f"a {color} star", "choices": options},
        ][number % 3 == 1 :]  # every third clip has the choice alone
    schema = pq.read_schema(index).remove_metadata()
    write_table(index, type(read_table(index)).from_pylist(rows, schema=schema), read_receipt(index))


def language_run(folder: Path) -> Any:
    """A run whose BERT has no dropout, which each process would draw for itself."""
    bert = folder / "bert"
    if not bert.exists():
        make_small_bert(bert)
        values = read_json(bert / "config.json")
        write_json(bert / "config.json", {**values, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    optimisation = {"epochs": 0}
    return make_run("umt", str(bert), image_size=32, patch_size=8, optimisation=optimisation, checkpoint_every=2)


def describe(name: str, folder: Path) -> tuple[EvaluationTask, Run, EvaluationInputs]:
    """An evaluation by its name in `ALL`, with ` | few` on a single test clip after a single epoch, with ` | fsdp` by FSDP."""
    case, _, few = name.partition(" | ")
    kind = next(k for k, tasks in (("color", COLOR), ("contrast", CONTRAST), ("language", LANGUAGE)) if case in tasks)
    data = folder / ("contrast" if kind == "contrast" else "color")
    splits = {split: [data / split / f"{split}-00000.parquet"] for split in ("train", "val", "test", "few")}
    run = {"color": COLOR_RUN, "contrast": CONTRAST_RUN}.get(kind) or language_run(folder)
    inputs = EvaluationInputs(
        folder / kind / "run/weights.safetensors",
        splits["few" if few == "few" else "test"],
        folder / "unset",
        3,
        train=splits["train"],
        validation=splits["val"] if getattr(ALL[case], "validation_split", None) else [],
        text=TEXT,
        device="cpu",
    )
    if few == "fsdp":
        return ALL[case].model_copy(update={"parallel": "fsdp"}), run, inputs
    if few and "optimisation" in type(ALL[case]).model_fields and ALL[case].trains:
        tuning = TUNING.model_copy(update={"epochs": 1})
        return ALL[case].model_copy(update={"optimisation": tuning}), run, replace(inputs, validation=[])
    return ALL[case], run, inputs


def score_by_words(captions: list[str], references: list[list[str]]) -> CaptionScores:
    """Stands for the scores that Java computes: the share of words that are in the first reference."""
    shares = [
        np.mean([w in own[0].split() for w in c.split()] or [False])
        for c, own in zip(captions, references, strict=True)
    ]
    clips = {name: np.array(shares, dtype=np.float64) for name in NAMES}
    return CaptionScores({name: float(np.mean(shares)) for name in NAMES}, clips)


@contextmanager
def small_batches() -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in {
            "features.VIEWS_PER_BATCH": 4,
            "language_clips.CLIPS_PER_BATCH": 2,
            "questions.open_ended.QUESTIONS_PER_BATCH": 3,
            "captioning.generate.find_programs": lambda: None,
            "captioning.generate.score_captions": score_by_words,
        }.items():
            stack.enter_context(patch(f"stm.evaluation.{name}", value))
        yield


def evaluate_as(process: Process, name: str, folder: Path, output: Path) -> None:
    """Does an evaluation as one of several processes, or as the only one."""
    task, run, inputs = describe(name, folder)
    output.mkdir(parents=True, exist_ok=True)
    with small_batches():
        TASKS[task.task].load()(task, run, replace(inputs, output=output), process)
    process.wait()


def evaluate_all(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """All evaluations as one of two processes."""
    for name in names:
        evaluate_as(Process(rank, 2, torch.device("cpu")), name, folder, folder / "two" / name)
    return {}


def read_results(folder: Path) -> dict[str, Any]:
    """What an evaluation has written."""
    weights = folder / "classifier.safetensors"
    (rows,) = folder.glob("*.parquet")
    log = folder / "metrics.jsonl"
    return {
        "metrics": read_json(folder / "metrics.json"),
        "rows": pq.read_table(rows).to_pylist(),
        "log": [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [],
        "weights": load_file(weights) if weights.exists() else {},
    }
