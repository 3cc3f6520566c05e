"""With activation checkpointing, whatever trains has the losses and gradients that it has without, bit for bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from language_runs import make_batch, make_run, make_small_bert
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from training_shards import make_run as make_masked_run
from two_processes import Values, run_in_two_processes

from stm.config import Checkpointing
from stm.distributed.fsdp import shard
from stm.distributed.process import Process
from stm.evaluation.classification.finetune import Classifier
from stm.evaluation.tuning import AnswerTuning, CaptionTuning, PairTuning
from stm.methods import build_method
from stm.models.checkpointing import Checkpointed, set_checkpointing
from stm.models.text.decoder import TextDecoder
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import VideoLanguageModel
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo

MASK = {"strategy": "random", "ratio": 0.5}
SETTINGS: tuple[Checkpointing, ...] = ("video", "text", "all")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_small_bert(tmp_path_factory.mktemp("bert"))


def read_gradients(module: nn.Module, batch: dict[str, Any]) -> Values:
    """The losses of a training step with dropout and stochastic depth, and all gradients."""
    module.zero_grad()
    torch.manual_seed(1)
    losses = module(batch)
    losses["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in losses.items()}, **gradients}


def check_equal(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys() and len(found) > 20
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def checkpointed(module: nn.Module) -> set[str]:
    return {
        type(part).__name__
        for part in module.modules()
        if isinstance(part, Checkpointed) and part.gradient_checkpointing
    }


def make_method(name: str, bert: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A method with stochastic depth and dropout, and a batch for it."""
    torch.manual_seed(0)
    if name == "mae":
        method = build_method(make_masked_run(mask=MASK, drop_path=0.5, decoder_depth=2, **changes))
        guides = {"noise": torch.rand(4, 2, 4)}
        return method.train(), {"video": torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8), "guides": guides}
    method = build_method(make_run(name, bert, drop_path=0.5, **changes), 96)
    return method.train(), method.prepare(make_batch())


@pytest.mark.parametrize("name", ["mae", "umt", "stm", "clusterstm"])
def test_pretraining_has_the_same_losses_and_gradients(name: str, bert: str) -> None:
    method, batch = make_method(name, bert)
    expected = read_gradients(method, batch)
    buffers = {key: value.clone() for key, value in method.named_buffers()}
    for setting in SETTINGS if name == "umt" else ("all",):
        again, _ = make_method(name, bert, gradient_checkpointing=setting)
        check_equal(read_gradients(again, batch), expected)
        for key, value in again.named_buffers():  # the running statistics of STM's norms
            assert torch.equal(value, buffers[key]), key


PARTS: dict[str, tuple[set[str], set[str]]] = {  # of the video, of the text
    "mae": ({"VideoEncoder", "VideoDecoder"}, set()),
    "umt": ({"VideoEncoder"}, {"SplitBert"}),
    "stm": ({"VideoEncoder"}, {"SplitBert"}),
    "clusterstm": ({"VideoEncoder", "TokenDecoder"}, {"SplitBert"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_run_says_which_side_is_recomputed(name: str, bert: str) -> None:
    video, text = PARTS[name]
    expected = {"none": set(), "video": video, "text": text, "all": video | text}
    method, _ = make_method(name, bert)
    assert checkpointed(method) == set()
    for setting, parts in expected.items():
        if text or setting != "text":
            assert checkpointed(make_method(name, bert, gradient_checkpointing=setting)[0]) == parts


def make_model(bert: str) -> VideoLanguageModel:
    torch.manual_seed(0)
    run = make_run("umt", bert, drop_path=0.5)
    assert run.language is not None
    return VideoLanguageModel(VideoEncoder(zoo.describe(run), 0.5), SplitBert.load(run.language), 32)


@pytest.mark.parametrize("tuning", [PairTuning, AnswerTuning, CaptionTuning])
@pytest.mark.parametrize("rank", [None, 1])  # the only process, or the second of two
def test_fine_tuning_with_text_has_the_same_losses_and_gradients(
    rank: int | None, tuning: Callable[..., nn.Module], bert: str
) -> None:
    process = None if rank is None else Process(rank, 2, torch.device("cpu"))
    results = []
    for setting in ("none", *SETTINGS):
        model = make_model(bert)
        set_checkpointing(model, setting)
        module = tuning(model, process=process).train()
        tokens = model.language.tokenizer.encode(make_batch()["caption"], 8)
        results.append(read_gradients(module, {**make_batch(), "tokens": tokens, "answers": tokens[:, :5]}))
        decoders = [part for part in module.modules() if isinstance(part, TextDecoder)]
        assert all(decoder.gradient_checkpointing == (setting in ("text", "all")) for decoder in decoders)
    for found in results[1:]:
        check_equal(found, results[0])


def test_fine_tuning_with_labels_has_the_same_losses_and_gradients() -> None:
    batch = {"video": torch.randint(0, 256, (4, 4, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(4)}
    results = []
    for setting in ("none", "video"):
        torch.manual_seed(0)
        encoder = VideoEncoder(zoo.describe(make_masked_run()), 0.5)
        set_checkpointing(encoder, setting)
        results.append(read_gradients(Classifier(encoder, 5).train(), batch))
    check_equal(results[1], results[0])


def count_saved(module: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes of different tensors that a forward pass keeps for the backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = module(batch)
    assert losses["loss"].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_each_side_keeps_less(bert: str) -> None:
    kept = {}
    for setting in ("none", *SETTINGS):
        method, batch = make_method("umt", bert, gradient_checkpointing=setting)
        kept[setting] = count_saved(method, batch)
    assert kept["all"] < kept["video"] < kept["none"] and kept["all"] < kept["text"] < kept["none"]


@pytest.mark.parametrize("name", ["mae", pytest.param("umt", marks=pytest.mark.slow)])
def test_compiled_it_has_the_same_losses_and_gradients(name: str, bert: str) -> None:
    results = []
    for setting in ("none", "all"):
        method, batch = make_method(name, bert, gradient_checkpointing=setting)
        # aot_eager traces the backward pass as the default backend does, and computes with torch's own kernels.
        method.compile(fullgraph=True, backend="aot_eager", dynamic=False)
        results.append(read_gradients(method, batch))
    check_equal(results[1], results[0])


def test_inference_recomputes_nothing(bert: str) -> None:
    method, batch = make_method("umt", bert, gradient_checkpointing="all")
    expected = count_saved(make_method("umt", bert)[0].eval(), batch)
    assert count_saved(method.eval(), batch) == expected


def train_in_a_process(rank: int, bert: str) -> Values:
    """The gradients of one of two processes, with and without checkpointing."""
    process = Process(rank, 2, torch.device("cpu"))
    values: Values = {}
    for setting in ("none", "all"):
        for parallel in ("ddp", "fsdp"):
            method, batch = make_method("umt", bert, gradient_checkpointing=setting)
            if parallel == "fsdp":
                shard(method, process, "float32")
            model = method if parallel == "fsdp" else process.wrap(method)
            torch.manual_seed(rank)
            losses = model(batch)
            losses["loss"].backward()
            values[f"{parallel}/{setting}/loss"] = losses["loss"]
            for name, parameter in method.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad
                    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    values[f"{parallel}/{setting}/{name}"] = whole.clone()
    return values


@pytest.mark.slow
def test_two_processes_have_the_same_losses_and_gradients(bert: str, tmp_path: Path) -> None:
    for values in run_in_two_processes(partial(train_in_a_process, bert=bert), tmp_path):
        for parallel in ("ddp", "fsdp"):
            plain, again = (
                {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
                for start in (f"{parallel}/none/", f"{parallel}/all/")
            )
            check_equal(again, plain)
