"""Arithmetic of the runs and evaluations with text, for the plan; same conventions as `stm.models.cost`.

Where a number hangs on the data (candidates that tie, lengths of texts), it is the most that there can be.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stm.config import Captioning, LanguageRun, LanguageTask, MultipleChoice, QuestionAnswering, VideoTextRetrieval
from stm.models.cost import blocks_cost, encoding_cost
from stm.models.sizes import SIZES
from stm.models.vit import Architecture
from stm.models.weights.zoo import describe
from stm.plan.clips import Clips, Texts
from stm.pretrained.local_files import local_model_files

# Layers of the BERT that goes with a student: UMT takes bert-base with B and bert-large with L, whose widths are theirs.
_BERT_DEPTH = {"tiny": 4, "small": 12, "base": 12, "large": 24, "huge": 24}
_BERT_WORDS = 30522


def language_step_flops(run: LanguageRun, teacher_image: float, image: bool = False) -> float:
    """FLOPs of one sample's forward and backward pass.

    Args:
        run: its mask, objectives and text side.
        teacher_image: FLOPs of the teacher's forward pass on one frame.
        image: of an image batch instead of a clip.
    """
    shape, mask = describe(run), run.images.mask if image and run.images else run.mask
    frames = 1 if image else run.frames
    hidden = frames * int(mask.ratio * shape.slot_tokens)
    kept = frames * shape.slot_tokens - hidden
    student = _encoder(shape, kept) + (_encoder(shape, hidden) if run.method == "stm" else 0)
    met = hidden if run.method == "stm" else kept  # as released, STM's text meets the hidden tokens
    return 3 * (student + _text(run, met)) + frames * teacher_image


def _encoder(shape: Architecture, tokens: int) -> float:
    embedding = 2 * tokens * shape.token_values * shape.width
    return embedding + blocks_cost(tokens, shape.width, shape.depth, shape.mlp_ratio)


def _text(run: LanguageRun, met: int) -> float:
    """The text layers once, and once more for masked words; the fusion layers on three pairs and on the masked words."""
    if run.language is None:
        return 0.0
    width, words, wanted = SIZES[run.model].width, run.language.max_tokens, run.objectives
    reading = blocks_cost(words, width, run.language.fusion_layer, 4.0)
    fusing = fusion_flops(width, words, met, _read_bert(run)[0])
    reads = 1 + bool(wanted.masked_language)
    fuses = 3 * bool(wanted.matching) + bool(wanted.masked_language)
    return reads * reading + fuses * fusing


def fusion_flops(width: int, words: int, met: int, layers: int) -> float:
    """Forward FLOPs of fusion layers on one caption of `words` tokens that meets `met` tokens of a clip."""
    crossing = 2 * (2 * words * width**2 + 2 * met * width**2) + 4 * words * met * width
    return blocks_cost(words, width, layers, 4.0) + layers * crossing


def _read_bert(run: LanguageRun) -> tuple[int, int]:
    """Its fusion layers, and the words that it knows: of a local BERT as its files say."""
    assert run.language is not None
    layers, words = _BERT_DEPTH[run.model], _BERT_WORDS
    for path in local_model_files(run.language.model):
        if Path(path).name == "config.json":
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            layers, words = int(values["num_hidden_layers"]), int(values["vocab_size"])
    return max(1, layers - run.language.fusion_layer), words


class Work(NamedTuple):
    """What an evaluation takes."""

    flops: float
    clips: float  # read, all passes together


class _Prices:
    """FLOPs of a task's parts, forward."""

    def __init__(self, task: LanguageTask, run: LanguageRun) -> None:
        assert run.language is not None
        shape = replace(describe(run), frames=task.frames or run.frames)
        self.seen, self.width, self.length = shape.tokens, shape.width, task.max_tokens or run.language.max_tokens
        self.layers, self.words = _read_bert(run)
        self.encode = encoding_cost(shape)  # a clip
        self.read = blocks_cost(self.length, self.width, run.language.fusion_layer, 4.0)  # a text alone
        self.fuse = fusion_flops(self.width, self.length, self.seen, self.layers)  # a text with a clip

    def write(self, tokens: int, met: int) -> float:
        """A text by the decoder, which looks at `met` states; each token's successor is predicted among all words."""
        head = 2 * tokens * self.width * (self.width + self.words)
        return fusion_flops(self.width, tokens, met, self.layers) + head


class _TaskWork(NamedTuple):
    """What a task computes: (task, prices, ...) -> FLOPs of forward passes."""

    visit: Callable[[Any, _Prices], float]  # of a training sample
    test: Callable[[Any, _Prices, int, Texts], float]  # of a split's clips and texts
    validate: Callable[[Any, _Prices, int, Texts], float]  # likewise, of the validation split after an epoch
    samples: Callable[[Texts], float] = lambda texts: texts.captions  # in a training epoch


def language_work(task: LanguageTask, run: LanguageRun, clips: Clips) -> Work:
    """Fine-tuning, the looks at the validation split after each epoch, and the test.

    Args:
        clips: of the dataset that the task is done on.
    """
    price, work, optimisation = _Prices(task, run), _WORK[task.task], task.optimisation
    test = _count(clips, task.test_split)
    flops, read = work.test(task, price, *test), float(test[0])
    if optimisation is None:
        return Work(flops, read)
    visits = optimisation.epochs * work.samples(_count(clips, task.train_split)[1])
    flops += 3 * visits * work.visit(task, price)  # forward, and twice that backward
    read += visits
    if task.validation_split is not None:
        held = _count(clips, task.validation_split)
        flops += optimisation.epochs * work.validate(task, price, *held)
        read += optimisation.epochs * held[0]
    return Work(flops, read)


def _count(clips: Clips, split: str) -> tuple[int, Texts]:
    """A split's clips and texts; where nothing is known of these, each clip has a caption and a question."""
    count = clips.per_split.get(split, 0)
    return count, clips.texts.get(split, Texts(count, count, 0))


def _tune_pairs(task: VideoTextRetrieval | MultipleChoice, price: _Prices) -> float:
    """The pair, and a wrong text and a wrong clip."""
    return price.encode + price.read + 3 * price.fuse


def _compare_all(task: VideoTextRetrieval, price: _Prices, clips: int, texts: Texts) -> float:
    """The dual encoder."""
    return clips * price.encode + texts.captions * price.read


def _retrieve(task: VideoTextRetrieval, price: _Prices, clips: int, texts: Texts) -> float:
    return _compare_all(task, price, clips, texts) + count_pairs(texts.captions, clips, task.depth) * price.fuse


def _choose(task: MultipleChoice, price: _Prices, clips: int, texts: Texts) -> float:
    return clips * price.encode + texts.choices * (price.read + price.fuse)


def _tune_answers(task: QuestionAnswering, price: _Prices) -> float:
    return price.encode + price.read + price.fuse + price.write(task.max_answer_tokens - 1, price.length)


def _answer(task: QuestionAnswering, price: _Prices, clips: int, texts: Texts) -> float:
    ranked = min(task.depth, task.answers or task.depth) * price.write(task.max_answer_tokens - 1, price.length)
    per_question = price.read + price.fuse + price.write(1, price.length) + ranked
    return clips * price.encode + texts.questions * per_question


def _tune_captions(task: Captioning, price: _Prices) -> float:
    return price.encode + price.write(task.max_caption_tokens - 1, price.seen)


def _caption(task: Captioning, price: _Prices, clips: int, texts: Texts) -> float:
    return clips * (price.encode + task.beams * price.write(task.max_caption_tokens, price.seen))


_WORK = {
    "video_text_retrieval": _TaskWork(_tune_pairs, _retrieve, _compare_all),
    "multiple_choice": _TaskWork(_tune_pairs, _choose, _choose),
    "question_answering": _TaskWork(_tune_answers, _answer, _answer, lambda texts: texts.questions),
    "captioning": _TaskWork(_tune_captions, _caption, _caption),
}


def count_pairs(texts: float, clips: float, depth: int) -> float:
    """Pairs that re-ranking asks about, at most: each text's `depth` best clips and each clip's best texts, none twice."""
    return min(texts * min(depth, clips) + clips * min(depth, texts), texts * clips)
