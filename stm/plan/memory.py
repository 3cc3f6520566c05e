"""Memory per GPU of runs and evaluations, by arithmetic on shapes.

Counted are weights, gradients, AdamW's state and the activations that a step keeps for its backward pass; without training,
the weights and the largest intermediate results. Not counted: CUDA's own gigabyte, fragmentation, and what torch.compile saves
by recomputing. `tests/plan/test_memory.py` compares the numbers with what torch keeps on small models.
"""

from dataclasses import replace
from typing import NamedTuple, cast

from stm.config import (
    Captioning,
    EvaluationTask,
    LanguageRun,
    LanguageTask,
    MultipleChoice,
    PretrainRun,
    QuestionAnswering,
    Run,
    VideoTextRetrieval,
    is_language_run,
)
from stm.models.sizes import SIZES
from stm.models.vit import Architecture
from stm.models.weights.zoo import describe
from stm.plan.bert_shape import read_bert
from stm.plan.branches import branch_of
from stm.plan.language_costs import tokens_of_text
from stm.pretrained.sizes import clip_tower

CLIPS_WITHOUT_TRAINING = 32  # clips per forward pass of evaluations; see stm.evaluation.features and language_clips


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float  # including those of frozen models
    gradients: float
    optimiser: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def pretraining_memory(run: Run) -> Memory:
    """Estimate the memory of a pretraining run on each of its GPUs; nothing for a `release`, which is only converted."""
    if run.release is not None or run.optimisation.epochs == 0:
        return Memory(4 * _student_weights(run), 0, 0, 0)
    parts = run.optimisation.accumulate * run.world_size
    shared = run.world_size if run.parallel == "fsdp" else 1
    activations = max(_step_activations(run, medium.frames, medium.batch_size // parts) for medium in run.media)
    width = _bytes_of(run.precision)
    return _trained(_student_weights(run), activations, width, shared, frozen=_teacher_weights(run))


def evaluation_memory(run: Run, task: EvaluationTask, processes: int) -> Memory:
    """Estimate the memory of an evaluation on each GPU.

    Args:
        processes: that share a batch, one per GPU.
    """
    if task.needs == "language":
        assert is_language_run(run)  # checked when the config was parsed
        return _language_evaluation(run, cast(LanguageTask, task), processes)
    shape, width = describe(run), _bytes_of(getattr(task, "precision", run.precision))
    weights = _encoder_weights(shape)
    optimisation = getattr(task, "optimisation", None)
    if optimisation is None or not task.trains:
        return _inference(weights, shape, width)
    batch = optimisation.batch_size // (optimisation.accumulate * processes)
    checkpointed = bool(getattr(task, "gradient_checkpointing", False))
    kept = batch * (_pixels(shape) + _encode(shape, shape.tokens, width, checkpointed))
    return _trained(weights, kept, width)


def _bytes_of(precision: str) -> int:
    """Bytes per value that a matrix product reads."""
    return 4 if precision == "float32" else 2


def _trained(weights: float, activations: float, width: int, shared: int = 1, frozen: float = 0.0) -> Memory:
    """The memory of training `weights` parameters: float32, with AdamW's two moments, divided among `shared` processes.

    Autocast keeps a copy of the weights in the lower precision for the backward pass.
    """
    copies = weights * width if width < 4 else 0.0
    return Memory(
        4 * (weights / shared + frozen) + copies / shared, 4 * weights / shared, 8 * weights / shared, activations
    )


def _inference(weights: float, shape: Architecture, width: int) -> Memory:
    """Without gradients only one block's intermediate results are in memory, for all clips of a forward pass."""
    return Memory(
        4 * weights, 0, 0, CLIPS_WITHOUT_TRAINING * (_pixels(shape) + _block(shape.tokens, shape.width, width))
    )


# ------------------------------------------------------------------------------------------------ numbers of weights


def _block_weights(width: int, mlp_ratio: float = 4.0) -> float:
    """Four matrices of attention and two of the MLP, with their biases, and two norms."""
    hidden = int(width * mlp_ratio)
    return 4 * width**2 + 4 * width + 2 * width * hidden + hidden + width + 4 * width


def _encoder_weights(shape: Architecture) -> float:
    embedding = shape.token_values * shape.width + shape.width
    return embedding + shape.depth * _block_weights(shape.width, shape.mlp_ratio) + 2 * shape.width


def _decoder_weights(shape: Architecture) -> float:
    width = shape.decoder_width
    head = width * shape.token_values + shape.token_values
    # Input projection without a bias, mask token, blocks, norm, head.
    entry = shape.width * width + width
    return entry + shape.decoder_depth * _block_weights(width, shape.mlp_ratio) + 2 * width + head


def _student_weights(run: Run) -> float:
    """The weights that a run trains, without small heads."""
    shape = describe(run)
    weights = _encoder_weights(shape)
    if isinstance(run, PretrainRun):
        return weights + (_decoder_weights(shape) if run.reconstruction.weight > 0 else 0)
    if isinstance(run, LanguageRun):
        weights += branch_of(run, run.frames, shape.tokens, 0).weights
    return weights + (_model_weights(run) if is_language_run(run) else 0)


def _model_weights(run: LanguageRun) -> float:
    """The BERT, and the projections to the joint space."""
    assert run.language is not None
    width = SIZES[run.model].width
    return read_bert(run).weights(width) + 2 * (width + 1) * run.language.embedding


def _teacher_weights(run: Run) -> float:
    teacher = getattr(run, "teacher", None)
    tower = None if teacher is None else clip_tower(teacher.model)
    return 0.0 if tower is None else tower.weights


# ------------------------------------------------------------------------------------- activations, in bytes per sample


def _block(tokens: float, width: int, value: int, mlp_ratio: float = 4.0) -> float:
    """What a vision block keeps for its backward pass.

    Kept in the precision of matrix products: the inputs of both projections, queries, keys, values and their weighted mean,
    the MLP's hidden layer before and after its activation; in float32: the inputs of both norms.

    Args:
        value: bytes per value that a matrix product reads.
    """
    return tokens * ((6 * width + 2 * int(width * mlp_ratio)) * value + 2 * width * 4)


def _blocks(tokens: float, width: int, depth: int, value: int, mlp_ratio: float, checkpointed: bool = False) -> float:
    """What a stack of blocks keeps; with checkpointing, each block's input, and one block's activations at a time."""
    one = _block(tokens, width, value, mlp_ratio)
    return depth * tokens * width * value + one if checkpointed else depth * one


def _pixels(shape: Architecture) -> float:
    """A clip in uint8: of its tokens, only the encoded ones are converted."""
    return shape.frames * 3 * shape.image_size**2


def _encode(shape: Architecture, tokens: float, value: int, checkpointed: bool = False) -> float:
    """The encoder's blocks, the embedding's input, and the final norm's input and output."""
    ends = tokens * (shape.token_values * value + shape.width * (4 + value))
    return ends + _blocks(tokens, shape.width, shape.depth, value, shape.mlp_ratio, checkpointed)


def _step_activations(run: Run, frames: int, batch: int) -> float:
    """Activations of one forward pass of pretraining on `batch` samples, repeats included."""
    shape, value = describe(run), _bytes_of(run.precision)
    mask = next(medium.mask for medium in run.media if medium.frames == frames)
    slots = max(1, frames // run.tubelet)
    masked = slots * int(mask.ratio * shape.slot_tokens)
    kept = slots * shape.slot_tokens - masked
    checkpointed = bool(getattr(run, "gradient_checkpointing", False))
    sample = _pixels(replace(shape, frames=frames)) + _encode(shape, kept, value, checkpointed)
    if isinstance(run, PretrainRun):
        sample += _reconstruction(run, shape, kept, masked, value)
    elif isinstance(run, LanguageRun):
        sample += _guided(run, shape, frames, kept, masked, value)
    return batch * sample


def _reconstruction(run: PretrainRun, shape: Architecture, kept: int, masked: int, value: int) -> float:
    if run.reconstruction.weight == 0:
        return 0.0
    decoded = round(masked * run.decode_ratio)
    tokens, width = kept + decoded, shape.decoder_width
    ends = kept * shape.width * value + decoded * width * (4 + value)  # input projection; norm and head
    # The predicted pixels, and their difference to the true ones.
    pixels = decoded * shape.token_values * (4 + value)
    return ends + pixels + _blocks(tokens, width, shape.decoder_depth, value, shape.mlp_ratio)


def _guided(run: LanguageRun, shape: Architecture, frames: int, kept: int, masked: int, value: int) -> float:
    """The teacher's features, the masked tokens' own pass (STM), and the text side."""
    teacher = clip_tower(run.teacher.model)
    features: float = run.teacher.layers * frames * shape.slot_tokens * (teacher.width if teacher else shape.width) * 4
    # The student's features of the aligned layers, and their heads' outputs.
    aligned: float = run.teacher.layers * kept * shape.width * 4 * 3
    if not run.objectives.alignment:
        features = aligned = 0.0
    student = _encode(shape, masked, value) if run.method == "stm" else 0.0
    if run.language is None:
        return features + aligned + student + branch_of(run, frames, kept, masked).kept * value
    memory = tokens_of_text(run, kept, masked)
    objectives = run.objectives
    passes = 1 + bool(objectives.masked_language), 3 * bool(objectives.matching) + bool(objectives.masked_language)
    text = read_bert(run).activations(
        shape.width, run.language.max_tokens, memory, value, *passes, checkpointed=run.language.gradient_checkpointing
    )
    words = run.language.max_tokens * read_bert(run).vocabulary * (4 + value) if objectives.masked_language else 0
    branch = branch_of(run, frames, kept, masked).kept * value
    return features + aligned + student + branch + text + words


def _language_evaluation(run: LanguageRun, task: LanguageTask, processes: int) -> Memory:
    assert run.language is not None
    shape = replace(describe(run), frames=task.frames or run.frames)
    value, bert = _bytes_of(task.precision), read_bert(run)
    weights = _encoder_weights(shape) + _model_weights(run)
    optimisation = task.optimisation
    if optimisation is None or not task.trains:
        return _inference(weights, shape, value)
    batch = optimisation.batch_size // (optimisation.accumulate * processes)
    tokens = task.max_tokens or run.language.max_tokens
    sample = _pixels(shape) + _encode(shape, shape.tokens, value, task.gradient_checkpointing)
    if isinstance(task, VideoTextRetrieval | MultipleChoice):
        sample += bert.activations(shape.width, tokens, shape.tokens, value, 1, 3)
    elif isinstance(task, QuestionAnswering):
        sample += bert.activations(shape.width, tokens, shape.tokens, value, 1, 1)
        sample += bert.decoding(shape.width, task.max_answer_tokens - 1, tokens, value)
        weights += bert.decoder_weights(shape.width)
    elif isinstance(task, Captioning):  # which trains without the BERT, once the decoder is copied from it
        sample += bert.decoding(shape.width, task.max_caption_tokens - 1, shape.tokens, value)
        weights = _encoder_weights(shape) + bert.decoder_weights(shape.width)
    return _trained(weights, batch * sample, value)
