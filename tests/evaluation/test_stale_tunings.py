"""Checkpoints of a fine-tuning with other settings, weights, data or seed are never resumed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_settings import changes
from color_clips import LABELS, RUN, fine_tuning, make_splits
from training_shards import make_shard

from stm.config import Captioning, LanguageRun, MultipleChoice, QuestionAnswering, VideoTextRetrieval
from stm.distributed.process import Process
from stm.evaluation import EvaluationInputs
from stm.evaluation.classification.finetune import fine_tune
from stm.evaluation.tuning import make_tuning
from stm.models.weights import zoo

# What is done after training, on the test split, and where results lie.
TESTED = {"task", "runs", "dataset", "test_split"}
NEUTRAL = {"gradient_checkpointing", "processes", "nodes", "parallel"}  # memory and the division of the work
FINE_TUNING = fine_tuning()
OPTIMISED = {"optimisation": {"epochs": 1}}
LANGUAGE_TASKS: list[tuple[Any, set[str]]] = [
    (VideoTextRetrieval.model_validate({"task": "video_text_retrieval", **OPTIMISED}), {"depth"}),
    (QuestionAnswering.model_validate({"task": "question_answering", **OPTIMISED}), {"depth", "ranking"}),
    (MultipleChoice.model_validate({"task": "multiple_choice", **OPTIMISED}), {"matching_weight"}),
    (Captioning.model_validate({"task": "captioning", **OPTIMISED}), {"beams", "length_penalty"}),
]
LANGUAGE_RUN = LanguageRun.model_validate({"method": "umt", "teacher": {"model": "any"}, "language": {}})


class Planned(BaseException):
    """The plan is made: nothing needs to be trained."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluation")
    splits = make_splits(folder)
    splits["other train"] = make_shard(folder / "other" / "train-00000.parquet", LABELS * 5, seed=5, prefix="train")
    splits["other weights"] = folder / "other.safetensors"
    splits["other weights"].write_bytes(splits["weights"].read_bytes() + b" ")
    return splits


def language_origin(made: dict[str, Path], task: Any, run: Any = LANGUAGE_RUN, **more: Any) -> Any:
    """What the checkpoints of a fine-tuning with text are held against."""
    names = {"weights": "weights", "train": "train"} | {key: more[key] for key in more if key != "seed"}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # values that no config could have
        patch.setitem(make_tuning.__globals__, "count_steps", lambda *_: 1)
        patch.setitem(make_tuning.__globals__, "feed", lambda *_: None)
        unused: Any = None
        train, seed = [made[names["train"]]], more.get("seed", 0)
        held = [made[names["validation"]]] if "validation" in names else []
        weights = made[names["weights"]]
        inputs = EvaluationInputs(weights, [made["test"]], Path("run/task"), seed, train=train, validation=held)
        plan, _ = make_tuning("any", task, run, inputs, unused, unused)
    return plan.origin


@pytest.mark.parametrize("chosen", [False, True], ids=["last", "chosen"])
@pytest.mark.parametrize(("task", "scored"), LANGUAGE_TASKS, ids=lambda value: getattr(value, "task", ""))
def test_each_setting_of_a_tuning_with_text_tells_checkpoints_apart(
    made: dict[str, Path], task: Any, scored: set[str], chosen: bool
) -> None:
    """How clips are scored does not change the weights, but which of them the validation split chooses, if there is one."""
    held = {"validation": "other train"} if chosen else {}
    before = language_origin(made, task, **held)
    apart = {key for key, changed in changes(task) if language_origin(made, changed, **held) != before}
    same = (TESTED - {"task"}) | NEUTRAL | (set() if chosen else scored)
    assert {key for key, _ in changes(task)} - apart == same


def test_validation_data_and_a_release_s_tokens_tell_checkpoints_apart(made: dict[str, Path]) -> None:
    task = LANGUAGE_TASKS[0][0]
    held = [{}, {"validation": "train"}, {"validation": "other train"}]
    release = LANGUAGE_RUN.model_copy(update={"release": "umt.pth"})
    language = LANGUAGE_RUN.language
    assert language is not None
    umt = release.model_copy(update={"language": language.model_copy(update={"tokenization": "umt"})})
    found = [
        *(language_origin(made, task, **one) for one in held),
        *(language_origin(made, task, r) for r in (release, umt)),
    ]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_weights_data_seed_and_shape_of_a_tuning_with_text_tell_checkpoints_apart(made: dict[str, Path]) -> None:
    task = LANGUAGE_TASKS[0][0]
    found = [
        language_origin(made, task),
        language_origin(made, task, weights="other weights"),
        language_origin(made, task, train="other train"),
        language_origin(made, task, seed=1),
        *(
            language_origin(made, task, LANGUAGE_RUN.model_copy(update={key: "another"}))
            for key in ("frames", "stride", "sampling")
        ),
    ]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def fine_tuning_origin(made: dict[str, Path], folder: Path, task: Any = FINE_TUNING, **more: Any) -> Any:
    """What the checkpoints of a fine-tuning on labels are held against."""
    plans: list[Any] = []

    def stop(_: Any, __: Any, plan: Any, *___: Any) -> None:
        plans.append(plan)
        raise Planned

    weights, train = made[more.get("weights", "weights")], made[more.get("train", "train")]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Planned):
        patch.setitem(fine_tune.__globals__, "fit_to_test", stop)
        run = RUN.model_copy(update=more.get("run", {}))
        seed = more.get("seed", 0)
        fine_tune(
            task,
            run,
            EvaluationInputs(weights, [made["test"]], folder, seed, train=[train]),
            Process(0, 1, torch.device("cpu")),
        )
    return plans[0].origin


def test_what_decides_a_fine_tuning_tells_checkpoints_apart(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(**more: Any) -> Any:
        return fine_tuning_origin(made, tmp_path, **more)

    # Weights of another name or shape cannot be loaded, and nothing is trained with them here.
    monkeypatch.setitem(fine_tune.__globals__, "load_checked_encoder", lambda *_: zoo.build(RUN).encoder)
    settings: list[dict[str, Any]] = [
        {"layer_decay": 0.5},
        {"drop_path": 0.3},
        {"head_dropout": 0.5},
        {"label_smoothing": 0.0},
        {"sampling": "sparse"},
        {"repeats": 5},
        {"precision": "bf16"},
        {"sampling": "tsn"},
        {"stride": 2},
        {"augmentation": {"mixup": 0.5}},
        {"optimisation": {"learning_rate": 0.01}},
        {"optimisation": {"epochs": 3}},
    ]
    found = [plan(), *(plan(task=fine_tuning(**change)) for change in settings)]
    found += [plan(train="other train"), plan(weights="other weights"), plan(seed=1), plan(run={"frames": 2})]
    assert all(one != other for number, one in enumerate(found) for other in found[:number])
    # What is only done in testing resumes, and so do other loading processes.
    assert plan(task=fine_tuning(views=3, crops=3)) == plan(run={"workers": 0, "checkpoint_every": 7}) == found[0]
