"""The estimated memory is what torch keeps for the backward pass, on small models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_runs import make_batch, make_run, make_small_bert
from torch import Tensor, nn

from stm.config import FineTune, PretrainRun, parse_run
from stm.config.language_tasks import Captioning, LanguageTask, QuestionAnswering, VideoTextRetrieval
from stm.evaluation.classification.finetune import Classifier
from stm.evaluation.tuning import AnswerTuning, CaptionTuning, PairTuning
from stm.methods import build_method
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import VideoLanguageModel
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.plan.memory import evaluation_memory, pretraining_memory

BATCH = 4


def kept_bytes(module: nn.Module, forward: Callable[[], dict[str, Tensor]]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, beside the module's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    kept: list[Tensor] = []  # which also keeps their storages from being used again

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert forward()["loss"].requires_grad
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in own)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def mae(**changes: Any) -> PretrainRun:
    values = {
        "model": "tiny",
        "image_size": 64,
        "patch_size": 8,
        "frames": 8,
        "mask": {"strategy": "random", "ratio": 0.75},
        "optimisation": {"batch_size": BATCH},
    }
    run = parse_run({**values, **changes})
    assert isinstance(run, PretrainRun)
    return run


def clips(frames: int, size: int) -> Tensor:
    return torch.randint(0, 256, (BATCH, frames, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("changes", [{}, {"decode_ratio": 0.5}, {"mask": {"strategy": "random", "ratio": 0.5}}])
def test_masked_autoencoding_needs_what_is_estimated(changes: dict[str, Any]) -> None:
    run = mae(**changes)
    method = build_method(run)
    batch = {"video": clips(8, 64), "guides": {"noise": torch.rand(BATCH, 4, 64)}, "label": torch.zeros(BATCH)}
    memory = pretraining_memory(run)
    assert memory.activations == pytest.approx(kept_bytes(method, lambda: method(batch)), rel=0.1)
    assert memory.weights == pytest.approx(4 * count(method), rel=0.001)
    assert (memory.gradients, memory.optimiser) == (memory.weights, 2 * memory.weights)


def test_fine_tuning_with_labels_needs_what_is_estimated() -> None:
    run = mae()
    task = FineTune.model_validate({"task": "finetune", "drop_path": 0, "optimisation": {"batch_size": BATCH}})
    model = Classifier(VideoEncoder(zoo.describe(run)), 10)
    batch = {"video": clips(8, 64), "label": torch.zeros(BATCH, dtype=torch.int64)}
    memory = evaluation_memory(run, task, 1)
    assert memory.activations == pytest.approx(kept_bytes(model, lambda: model(batch)), rel=0.1)
    assert memory.weights == pytest.approx(4 * count(model), rel=0.01)


@pytest.mark.parametrize("method", ["umt", "stm", "clusterstm"])
def test_pretraining_with_text_needs_what_is_estimated(method: str, tmp_path: Path) -> None:
    run = make_run(method, make_small_bert(tmp_path), image_size=64, patch_size=8)
    made = build_method(run, 96).train()
    batch = {**make_batch(BATCH), "guides": {"noise": torch.rand(BATCH, 4, 64)}}
    batch = made.prepare(batch)
    memory = pretraining_memory(run)
    kept = kept_bytes(made, lambda: made(batch))
    assert memory.activations == pytest.approx(kept, rel=0.1)
    assert memory.gradients == pytest.approx(4 * count(made), rel=0.03)


TUNED: dict[str, Any] = {"optimisation": {"batch_size": BATCH}}
TASKS: dict[str, tuple[LanguageTask, type[nn.Module]]] = {
    "retrieval": (VideoTextRetrieval.model_validate({"task": "video_text_retrieval", **TUNED}), PairTuning),
    "questions": (
        QuestionAnswering.model_validate({"task": "question_answering", "max_tokens": 8, **TUNED}),
        AnswerTuning,
    ),
    "captioning": (
        Captioning.model_validate({"task": "captioning", "max_caption_tokens": 8, **TUNED}),
        CaptionTuning,
    ),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_fine_tuning_with_text_needs_what_is_estimated(name: str, checkpointed: bool, tmp_path: Path) -> None:
    task, tuning = TASKS[name]
    task = task.model_copy(update={"gradient_checkpointing": checkpointed})
    run = make_run("umt", make_small_bert(tmp_path), image_size=64, patch_size=8)
    assert run.language is not None
    encoder = VideoEncoder(zoo.describe(run))
    encoder.gradient_checkpointing = checkpointed
    model = VideoLanguageModel(encoder, SplitBert.load(run.language), 32)
    module = tuning(model).train()
    batch = make_batch(BATCH)
    tokens = model.language.tokenizer.encode(batch["caption"], 8)
    batch |= {"tokens": tokens, "answers": tokens[:, :5]}
    kept = kept_bytes(module, lambda: module(batch))
    memory = evaluation_memory(run, task, 1)
    assert memory.weights == pytest.approx(4 * count(module), rel=0.05)
    # With checkpointing, the forward pass keeps all but the activations of the block that is computed again, of 256 tokens:
    # inputs of its two norms and projections, queries, keys, values, their mean, and the hidden layer twice, of 128 values each.
    again = BATCH * 256 * 4 * 128 * (2 + 2 + 3 + 1 + 2 * 4) if checkpointed else 0
    assert memory.activations - again == pytest.approx(kept, rel=0.13)
