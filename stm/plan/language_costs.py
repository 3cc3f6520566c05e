"""FLOPs of runs and evaluations with text, for the plan, following the conventions of `stm.models.cost`.

Values that depend on the data (tied candidates, text lengths) are upper bounds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from stm.config import Captioning, LanguageRun, LanguageTask, MultipleChoice, QuestionAnswering, VideoTextRetrieval
from stm.models.architecture import Architecture, describe
from stm.models.cost import blocks_cost, encoding_cost
from stm.models.sizes import SIZES
from stm.plan.bert_shape import read_bert
from stm.plan.branches import branch_of
from stm.plan.clips import Clips, Texts


def language_step_flops(run: LanguageRun, teacher_image: float, image: bool = False) -> float:
    """FLOPs of one sample's forward and backward pass, including the teacher's forward pass.

    Args:
        run: specifies the mask, the objectives and the text encoder.
        teacher_image: FLOPs of the teacher's forward pass on one frame.
        image: whether the sample is an image instead of a clip.
    """
    shape = describe(run)
    mask = run.images.mask if image and run.images else run.mask
    frames = 1 if image else run.frames
    masked = frames * int(mask.ratio * shape.slot_tokens)
    kept = frames * shape.slot_tokens - masked
    student = _encoder(shape, kept) + (_encoder(shape, masked) if run.method == "stm" else 0)
    text = _text(run, tokens_of_text(run, kept, masked))
    # Backward costs twice as much as forward; what is computed again costs another forward pass.
    again = (student if run.gradient_checkpointing in ("video", "all") else 0.0) + (
        text if run.gradient_checkpointing in ("text", "all") else 0.0
    )
    branch = branch_of(run, frames, kept, masked).flops
    return 3 * (student + branch + text) + again + frames * teacher_image


def tokens_of_text(run: LanguageRun, kept: int, masked: int) -> int:
    """Number of a clip's tokens that the text attends to."""
    if run.spatio_temporal is None:
        return kept
    return {"invisible": masked, "visible": kept, "all": kept + masked}[run.spatio_temporal.text]


def _encoder(shape: Architecture, tokens: int) -> float:
    embedding = 2 * tokens * shape.token_values * shape.width
    return embedding + blocks_cost(tokens, shape.width, shape.depth, shape.mlp_ratio)


def _text(run: LanguageRun, clip_tokens: int) -> float:
    """Forward FLOPs of the text encoder for one caption, including all passes that the objectives need."""
    if run.language is None:
        return 0.0
    width = SIZES[run.model].width
    tokens = run.language.max_tokens
    objectives = run.objectives
    text_pass = blocks_cost(tokens, width, run.language.fusion_layer, 4.0)
    fusion_pass = fusion_flops(width, tokens, clip_tokens, read_bert(run).fusion_layers)
    text_passes = 1 + bool(objectives.masked_language)
    # Matching compares three pairs: the positive one, and one hard negative per modality.
    fusion_passes = 3 * bool(objectives.matching) + bool(objectives.masked_language)
    return text_passes * text_pass + fusion_passes * fusion_pass


def fusion_flops(width: int, tokens: int, memory: int, layers: int) -> float:
    """Forward FLOPs of fusion layers on a text of `tokens` tokens that cross-attends to `memory` tokens."""
    cross_attention = 2 * (2 * tokens * width**2 + 2 * memory * width**2) + 4 * tokens * memory * width
    return blocks_cost(tokens, width, layers, 4.0) + layers * cross_attention


class Work(NamedTuple):
    """The work of one evaluation."""

    flops: float
    clips: float  # number of clips read, over all passes
    trained: float = 0.0  # those read for training, which are augmented


class _Forward:
    """Forward FLOPs of the components of a task's model."""

    def __init__(self, task: LanguageTask, run: LanguageRun) -> None:
        assert run.language is not None
        shape = replace(describe(run), frames=task.frames or run.frames)
        self.clip_tokens = shape.tokens
        self.text_tokens = task.max_tokens or run.language.max_tokens
        self.width = shape.width
        bert = read_bert(run)
        self.layers, self.vocabulary = bert.fusion_layers, bert.vocabulary
        self.clip = encoding_cost(shape)
        self.text = blocks_cost(self.text_tokens, self.width, run.language.fusion_layer, 4.0)
        self.fusion = fusion_flops(self.width, self.text_tokens, self.clip_tokens, self.layers)  # of one text and clip

    def decode(self, tokens: int, memory: int) -> float:
        """FLOPs of decoding a text of `tokens` tokens, with attention to `memory` tokens and vocabulary prediction."""
        head = 2 * tokens * self.width * (self.width + self.vocabulary)
        return fusion_flops(self.width, tokens, memory, self.layers) + head


class _TaskWork(NamedTuple):
    """Forward FLOPs of one task type."""

    train: Callable[[Any, _Forward], float]  # per training sample
    test: Callable[[Any, _Forward, int, Texts], float]  # for all clips and texts of a split
    validate: Callable[[Any, _Forward, int, Texts], float]  # the same, after each epoch
    samples: Callable[[Texts], float] = lambda texts: texts.captions  # per training epoch


def language_work(task: LanguageTask, run: LanguageRun, clips: Clips) -> Work:
    """Compute the work of fine-tuning, of validation after each epoch, and of testing.

    Args:
        clips: the clips of the dataset that the task is evaluated on.
    """
    forward = _Forward(task, run)
    work = _WORK[task.task]
    optimisation = task.optimisation
    test = _count(clips, task.test_split)
    flops = work.test(task, forward, *test)
    read = float(test[0])
    if optimisation is None:
        return Work(flops, read)
    samples = optimisation.epochs * work.samples(_count(clips, task.train_split)[1])
    trained = work.train(task, forward)
    again = {"none": 0.0, "video": forward.clip, "text": trained - forward.clip, "all": trained}
    # A backward pass costs twice a forward pass; what is computed again costs another.
    flops += samples * (3 * trained + again[task.gradient_checkpointing])
    read += samples
    if task.validation_split is not None:
        validation = _count(clips, task.validation_split)
        flops += optimisation.epochs * work.validate(task, forward, *validation)
        read += optimisation.epochs * validation[0]
    return Work(flops, read, samples)


def _count(clips: Clips, split: str) -> tuple[int, Texts]:
    """Return the clips and texts of a split; if the texts are unknown, assume one caption and one question per clip."""
    count = clips.per_split.get(split, 0)
    return count, clips.texts.get(split, Texts(count, count, 0))


def _train_pairs(task: VideoTextRetrieval | MultipleChoice, forward: _Forward) -> float:
    """FLOPs of one training sample; three pairs are fused: the positive one and one hard negative per modality."""
    return forward.clip + forward.text + 3 * forward.fusion


def _compare_all(task: VideoTextRetrieval, forward: _Forward, clips: int, texts: Texts) -> float:
    """FLOPs of retrieval with the dual encoder alone, without re-ranking."""
    return clips * forward.clip + texts.captions * forward.text


def _retrieve(task: VideoTextRetrieval, forward: _Forward, clips: int, texts: Texts) -> float:
    return _compare_all(task, forward, clips, texts) + count_pairs(texts.captions, clips, task.depth) * forward.fusion


def _choose(task: MultipleChoice, forward: _Forward, clips: int, texts: Texts) -> float:
    return clips * forward.clip + texts.choices * (forward.text + forward.fusion)


def _train_answers(task: QuestionAnswering, forward: _Forward) -> float:
    return (
        forward.clip + forward.text + forward.fusion + forward.decode(task.max_answer_tokens - 1, forward.text_tokens)
    )


def _answer(task: QuestionAnswering, forward: _Forward, clips: int, texts: Texts) -> float:
    # The first token of every answer is scored in one step; only the `depth` most probable answers are fully decoded.
    ranked = min(task.depth, task.answers or task.depth) * forward.decode(
        task.max_answer_tokens - 1, forward.text_tokens
    )
    per_question = forward.text + forward.fusion + forward.decode(1, forward.text_tokens) + ranked
    return clips * forward.clip + texts.questions * per_question


def _train_captions(task: Captioning, forward: _Forward) -> float:
    return forward.clip + forward.decode(task.max_caption_tokens - 1, forward.clip_tokens)


def _caption(task: Captioning, forward: _Forward, clips: int, texts: Texts) -> float:
    return clips * (forward.clip + task.beams * forward.decode(task.max_caption_tokens, forward.clip_tokens))


_WORK = {
    "video_text_retrieval": _TaskWork(_train_pairs, _retrieve, _compare_all),
    "multiple_choice": _TaskWork(_train_pairs, _choose, _choose),
    "question_answering": _TaskWork(_train_answers, _answer, _answer, lambda texts: texts.questions),
    "captioning": _TaskWork(_train_captions, _caption, _caption),
}


def count_pairs(texts: float, clips: float, depth: int) -> float:
    """Upper bound on re-ranked pairs: the `depth` best clips per text and best texts per clip, each pair once."""
    return min(texts * min(depth, clips) + clips * min(depth, texts), texts * clips)
