"""The plan's memory per GPU against what torch would allocate at full size: forward and backward pass without any data.

Tensors are fake: they have shapes and lifetimes, and no contents, so that this needs neither a GPU nor much memory. Counted is
the peak of a step, with weights, gradients and AdamW's state; not CUDA's own memory, fragmentation and workspaces of kernels.
In 16 bits, norms are computed in float32, and attention by fused kernels, as on a GPU. Weights of others are random.

    python -m benchmarks.memory                                   # a task or run of each kind
    python -m benchmarks.memory --config umt-large --names umt msrvtt --gpus 8
"""

import argparse
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertTokenizer

from benchmarks._table import Row, report
from benchmarks.language_masking import make_teacher
from stm.config import (
    Captioning,
    Checkpointing,
    Config,
    FineTune,
    LanguageRun,
    LanguageTask,
    PretrainRun,
    Run,
    load_config,
)
from stm.config.training import MediumSettings
from stm.evaluation.classification.finetune import Classifier
from stm.evaluation.tuning import AnswerTuning, CaptionTuning, PairTuning
from stm.masking import get_strategy
from stm.methods.clusterstm import ClusterWise
from stm.methods.contrast_head import ContrastHead
from stm.methods.mae import MAE
from stm.methods.stm import SpatioTemporalBranch
from stm.methods.umt import UnmaskedTeacher
from stm.methods.video_language import VideoLanguage, VideoOnly
from stm.models.checkpointing import set_checkpointing
from stm.models.sizes import SIZES
from stm.models.text.small_bert import SPECIAL
from stm.models.text.split_bert import SplitBert, Tokenizer
from stm.models.video_language import VideoLanguageModel
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.plan.bert_shape import read_bert
from stm.plan.memory import evaluation_memory, pretraining_memory

CONFIGS = Path(__file__).parents[1] / "config"
SHOWN = {
    "tgm": ["tube-k400", "tgm-ssv2-contrast", "finetune-ssv2"],
    "umt": ["umt-b16", "umt-l16", "k710-b16", "k710-l16"],
    "stm": ["umt", "stm", "msrvtt", "activitynet", "msrvtt-qa"],
    "clusterstm": ["clusterstm", "msrvtt-captioning"],
    "umt-large": ["umt", "msrvtt", "activitynet", "msrvtt-mc", "msrvtt-qa"],
}
BRANCHES = {"umt": UnmaskedTeacher, "stm": SpatioTemporalBranch, "clusterstm": ClusterWise}
TEXT_WIDTH = 512  # of TGM's captions
AIM = "0.95 to 1.2"

Step = tuple[nn.Module, dict[str, Any]]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations returned and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, Tensor):
                self.add(value.untyped_storage())
        return results

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage, unless it is counted already."""
        key = storage._cdata
        if key not in self._alive:
            self._alive.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def peak_bytes(make: Callable[[], Step], precision: str, parts: Checkpointing) -> int:
    """The most bytes that a training step holds; `make` builds a module and a batch."""
    with LiveBytes() as live:
        module, batch = make()
        for weight in (*module.parameters(), *module.buffers()):  # which may have been made before
            live.add(weight.untyped_storage())
        set_checkpointing(module.train(), parts)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in trained:  # as in all passes but the first one, and as DDP allocates them
            parameter.grad = torch.zeros_like(parameter)
        moments = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
        live.peak = live.now
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module(batch)["loss"]
        loss.backward()
        assert len(moments) == 2 * len(trained)
        return live.peak


@contextmanager
def fake_tensors() -> Iterator[None]:
    """A block whose tensors have no contents; what would read them is left out."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _attend))
        stack.enter_context(mock.patch.object(functional, "layer_norm", _normalise))
        stack.enter_context(mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **options: tensor))
        stack.enter_context(mock.patch("stm.masking.registry.check_first", lambda kept, *others: kept))
        yield


_layer_norm = functional.layer_norm


def _normalise(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """On a GPU, autocast computes norms in float32; on the CPU, it does not."""
    with torch.autocast("cpu", enabled=False):
        exact = x.float() if torch.is_floating_point(x) and x.dtype == torch.bfloat16 else x
        return _layer_norm(exact, shape, weight, bias, eps)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """The fused kernels of a GPU: on the CPU, attention with dropout would keep all weights."""
    kernels, causal = torch.ops.aten, bool(options.get("is_causal"))
    if attn_mask is None:
        fused: Tensor = kernels._scaled_dot_product_flash_attention(query, key, value, dropout_p, causal)[0]
        return fused
    bias = torch.zeros(attn_mask.shape, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    masked: Tensor = kernels._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, causal)[
        0
    ]
    return masked


# ---------------------------------------------------------------------------------------------------------- models


def make_bert(run: LanguageRun) -> SplitBert:
    """A BERT of the size of the run's."""
    assert run.language is not None
    shape, width = read_bert(run), SIZES[run.model].width
    backend = BertTokenizer(vocab={word: number for number, word in enumerate(SPECIAL)}).backend_tokenizer
    tokenizer = Tokenizer(backend.to_str(), {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"})
    config = BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=max(1, width // 64),
        num_hidden_layers=shape.text_layers + shape.fusion_layers,
    )
    return SplitBert(config, shape.text_layers, tokenizer)


def make_pretraining(run: Run, medium: MediumSettings, samples: int, teacher: Any) -> Step:
    shape = zoo.describe(run)
    slots = max(1, medium.frames // run.tubelet)
    guides = ("noise", "similarity", "motion", "flow", "attention")
    batch = {
        "video": torch.zeros(samples, medium.frames, 3, run.image_size, run.image_size, dtype=torch.uint8),
        "guides": {name: torch.zeros(samples, slots, shape.slot_tokens) for name in guides},
        "clip": torch.arange(samples),
        "caption_index": torch.zeros(samples, dtype=torch.int64),
    }
    if isinstance(run, PretrainRun):
        contrast = ContrastHead(shape.width, TEXT_WIDTH, run.contrast) if run.contrast else None
        batch["text"] = torch.zeros(samples, TEXT_WIDTH)
        mask = run.mask
        method = MAE(
            zoo.build(run), get_strategy(mask.strategy), mask.ratio, run.decode_ratio, run.reconstruction, contrast
        )
        return method, batch
    assert isinstance(run, LanguageRun)
    encoder, language = VideoEncoder(shape, run.drop_path), run.language
    model: Any = VideoLanguageModel(encoder, make_bert(run), language.embedding) if language else VideoOnly(encoder)
    batch["text"] = torch.zeros(samples, teacher.feature_width)
    if language:
        batch["tokens"] = torch.zeros(samples, language.max_tokens, dtype=torch.int64)
    return VideoLanguage(model, BRANCHES[run.method](run, shape, teacher), teacher, run), batch


def make_tuning(run: Run, task: FineTune | LanguageTask, samples: int) -> Step:
    shape = zoo.describe(run)
    if not isinstance(task, FineTune):
        shape = replace(shape, frames=task.frames or run.frames)
    encoder = VideoEncoder(shape, task.drop_path)
    video = torch.zeros(samples, shape.frames, 3, shape.image_size, shape.image_size, dtype=torch.uint8)
    batch = {"video": video, "label": torch.zeros(samples, dtype=torch.int64), "clip": torch.arange(samples)}
    if isinstance(task, FineTune):
        return Classifier(encoder, 400), batch
    assert isinstance(run, LanguageRun) and run.language is not None
    model = VideoLanguageModel(encoder, make_bert(run), run.language.embedding)
    length = task.max_caption_tokens if isinstance(task, Captioning) else task.max_tokens or run.language.max_tokens
    batch["tokens"] = torch.zeros(samples, length, dtype=torch.int64)
    if task.task == "question_answering":
        batch["answers"] = torch.zeros(samples, task.max_answer_tokens, dtype=torch.int64)
        return AnswerTuning(model), batch
    return (CaptionTuning(model) if isinstance(task, Captioning) else PairTuning(model, task)), batch


# ------------------------------------------------------------------------------------------------------- measuring


def measure_run(run: Run) -> tuple[int, float]:
    """Samples per GPU of the larger medium, and bytes."""
    peaks = []
    teacher = None if isinstance(run, PretrainRun) else make_teacher(run, run.image_size // run.patch_size)  # type: ignore[arg-type]
    weights = 0 if teacher is None else sum(4 * parameter.numel() for parameter in teacher.parameters())
    for medium in run.media:
        samples = medium.batch_size // (run.optimisation.accumulate * run.world_size)
        with fake_tensors():
            step = lambda: make_pretraining(run, medium, samples, teacher)  # noqa: B023, E731
            peaks.append((samples, weights + peak_bytes(step, run.precision, run.gradient_checkpointing)))
    return max(peaks, key=lambda peak: peak[1])


def measure_task(run: Run, task: Any, gpus: int) -> tuple[int, float]:
    """Samples per GPU, and bytes."""
    samples = task.optimisation.batch_size // (task.optimisation.accumulate * gpus)
    with fake_tensors():
        step = lambda: make_tuning(run, task, samples)  # noqa: E731
        return samples, peak_bytes(step, task.precision, task.gradient_checkpointing)


def compare(config: Config, name: str, gpus: int) -> Iterator[Row]:
    """A row with the config's setting, and one without checkpointing if that differs."""
    run = config.runs[name] if name in config.runs else config.runs[config.runs_of(name)[0]]
    section: Any = run if name in config.runs else config.evaluate[name]
    for parts in dict.fromkeys((section.gradient_checkpointing, "none")):
        changed = section.model_copy(update={"gradient_checkpointing": parts})
        if section is run:
            gpus, (samples, found) = run.world_size, measure_run(changed)
            planned = pretraining_memory(changed).total
        else:
            samples, found = measure_task(run, changed, gpus)
            planned = evaluation_memory(run, changed, gpus).total
        what = f"{config.name} {name}, checkpointing {parts}, {samples} per GPU of {gpus}"
        ratio = planned / found
        yield Row(what, f"{planned / 1e9:.1f} GB", ratio, ratio, ratio, f"fake tensors, {found / 1e9:.1f} GB", AIM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=SHOWN, nargs="+", default=list(SHOWN))
    parser.add_argument("--names", nargs="+", help="runs and evaluations; default: one of each kind")
    parser.add_argument("--gpus", type=int, default=8, help="that share the batch of an evaluation")
    a = parser.parse_args()
    rows = []
    for name in a.config:
        config = load_config(CONFIGS / f"{name}.yaml")
        for part in a.names or SHOWN[name]:
            for row in compare(config, part, a.gpus):
                print(f"{row.what:70} plan {row.speed:>9}  {row.against:28} {row.ratio:.3f}", flush=True)
                rows.append(row)
    report(rows)


if __name__ == "__main__":
    main()
