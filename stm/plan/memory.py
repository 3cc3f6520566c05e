"""Memory per GPU of runs and evaluations, by arithmetic on shapes.

Counted are weights, gradients, AdamW's state and the most that a step holds of activations and their gradients; without training,
the weights and the largest intermediate results. Not counted: CUDA's own gigabyte, fragmentation, workspaces of kernels, and what
torch.compile saves by recomputing. `tests/plan/test_memory.py` compares the numbers with what torch allocates for small models,
and `python -m benchmarks.memory` with what it would allocate at full size.
"""

from dataclasses import replace
from typing import Literal, NamedTuple, cast

from stm.config import (
    Captioning,
    Checkpointing,
    EvaluationTask,
    FineTune,
    LanguageRun,
    LanguageTask,
    MultipleChoice,
    PretrainRun,
    QuestionAnswering,
    Run,
    VideoTextRetrieval,
    is_language_run,
)
from stm.models.architecture import Architecture, describe
from stm.models.sizes import SIZES
from stm.plan.bert_shape import read_bert
from stm.plan.branches import branch_of
from stm.plan.language_costs import tokens_of_text
from stm.plan.phases import Phase, peak
from stm.pretrained.sizes import clip_tower, clip_width

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
    shape, weights = describe(run), _encoder_weights(describe(run))
    if not isinstance(task, FineTune) or not task.trains:
        return _inference(weights, shape, _bytes_of(run.precision))
    width, batch = _bytes_of(task.precision), task.optimisation.batch_size // (task.optimisation.accumulate * processes)
    phases = [
        Phase(_pixels(shape)),
        _encode(shape, shape.tokens, width, _recomputes("video", task.gradient_checkpointing)),
    ]
    return _tuned(weights, batch * peak(phases), width, task.parallel, processes)


def _recomputes(side: Literal["video", "text"], parts: Checkpointing) -> bool:
    return parts in (side, "all")


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


def _tuned(weights: float, activations: float, width: int, parallel: str, processes: int) -> Memory:
    """The memory of fine-tuning, by default with the whole model in each process; with `fsdp`, beside the parts that are trained,
    each holds a copy for tests (see `stm.training.loop.fit_to_test`)."""
    if parallel != "fsdp" or processes == 1:
        return _trained(weights, activations, width)
    return _trained(weights, activations, width, processes, frozen=weights)


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


def _blocks(tokens: float, width: int, depth: int, value: int, mlp_ratio: float, checkpointed: bool) -> Phase:
    """A stack of blocks; with checkpointing, it keeps each block's input, and one block's activations at a time."""
    one = _block(tokens, width, value, mlp_ratio)
    gradients = tokens * (int(width * mlp_ratio) + width) * value  # of the MLP's hidden layer and of the block's output
    return Phase(depth * tokens * width * value, one + gradients) if checkpointed else Phase(depth * one, gradients)


def _pixels(shape: Architecture) -> float:
    """A clip in uint8: of its tokens, only the encoded ones are converted."""
    return shape.frames * 3 * shape.image_size**2


def _encode(shape: Architecture, tokens: float, value: int, checkpointed: bool) -> Phase:
    """The encoder's blocks, the embedding's input, and the final norm's input and output."""
    ends = tokens * (shape.token_values * value + shape.width * (4 + value))
    return _blocks(tokens, shape.width, shape.depth, value, shape.mlp_ratio, checkpointed).plus(ends)


def _step_activations(run: Run, frames: int, batch: int) -> float:
    """Activations of one forward pass of pretraining on `batch` samples, repeats included."""
    shape, value = describe(run), _bytes_of(run.precision)
    mask = next(medium.mask for medium in run.media if medium.frames == frames)
    slots = max(1, frames // run.tubelet)
    masked = slots * int(mask.ratio * shape.slot_tokens)
    kept = slots * shape.slot_tokens - masked
    phases = [Phase(_pixels(replace(shape, frames=frames)))]
    if isinstance(run, LanguageRun):
        phases += _guided(run, shape, frames, kept, masked, value)
    else:
        phases.append(_encode(shape, kept, value, _recomputes("video", run.gradient_checkpointing)))
    if isinstance(run, PretrainRun) and run.reconstruction.weight > 0:
        phases += _reconstruction(run, shape, kept, masked, value)
    return batch * peak(phases)


def _reconstruction(run: PretrainRun, shape: Architecture, kept: int, masked: int, value: int) -> list[Phase]:
    """The decoder, and the loss of the predicted pixels."""
    decoded = round(masked * run.decode_ratio)
    tokens, width = kept + decoded, shape.decoder_width
    ends = kept * shape.width * value + decoded * width * (4 + value)  # input projection; norm and head
    checkpointed = _recomputes("video", run.gradient_checkpointing)
    decoder = _blocks(tokens, width, shape.decoder_depth, value, shape.mlp_ratio, checkpointed).plus(ends)
    # The predictions, and their difference to the true pixels; two more copies while targets are made, and of gradients.
    pixels = decoded * shape.token_values
    return [decoder, Phase(pixels * (4 + value), pixels * 2 * 4)]


def _guided(run: LanguageRun, shape: Architecture, frames: int, kept: int, masked: int, value: int) -> list[Phase]:
    """The teacher's pass, the text, the student's passes (STM has one over the masked tokens), and the objectives."""
    parts = run.gradient_checkpointing
    video, text = _recomputes("video", parts), _recomputes("text", parts)
    student = [_encode(shape, kept, value, video)]
    if run.method == "stm":
        student.append(_encode(shape, masked, value, video))
    student.append(Phase(branch_of(run, frames, kept, masked).kept * value))
    if run.objectives.alignment:
        student.append(_align(run, shape, kept, frames * shape.slot_tokens))
    phases = [_teach(run, shape, frames * shape.slot_tokens), *student]
    if run.language is None:
        return phases
    bert, tokens, memory = read_bert(run), run.language.max_tokens, tokens_of_text(run, kept, masked)
    read = bert.read(shape.width, tokens, value, text)
    fused = bert.fuse(shape.width, tokens, memory, value, text)
    phases.append(read)
    if run.objectives.matching:
        phases.append(fused.times(_PAIRS).plus(_PAIRS * memory * shape.width * 4))
    if run.objectives.masked_language:
        phases += [read, fused, bert.predict(shape.width, tokens, value)]
    return phases


def _teach(run: LanguageRun, shape: Architecture, tokens: int) -> Phase:
    """The teacher's float32 outputs, held by the forward pass: features of its last layers, its tokens and its embeddings."""
    tower = clip_tower(run.teacher.model)
    width, joint, layers = tower.width if tower else shape.width, clip_width(run.teacher.model), run.teacher.layers
    # Before that, the states of these layers and a copy of the features.
    return Phase(tokens * (layers * joint + 2 * width) * 4, tokens * layers * (joint + width) * 4)


def _align(run: LanguageRun, shape: Architecture, kept: int, tokens: int) -> Phase:
    """The student's features of the aligned layers, their heads' outputs, and the unit vectors that the loss compares."""
    compared = tokens if run.method == "stm" else kept
    layers = run.teacher.layers
    return Phase(3 * layers * kept * shape.width * 4, 5 * layers * compared * clip_width(run.teacher.model) * 4)


_PAIRS = 3  # that matching fuses per sample, in one pass over copies: the true pair, one with a wrong text, one with a wrong clip


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
    parts, width = task.gradient_checkpointing, shape.width
    video, text = _recomputes("video", parts), _recomputes("text", parts)
    phases = [Phase(_pixels(shape)), _encode(shape, shape.tokens, value, video)]
    read, fused = bert.read(width, tokens, value, text), bert.fuse(width, tokens, shape.tokens, value, text)
    if isinstance(task, VideoTextRetrieval | MultipleChoice):
        phases += [read, fused.times(_PAIRS).plus(_PAIRS * shape.tokens * width * 4)]
    elif isinstance(task, QuestionAnswering):
        answer = task.max_answer_tokens - 1
        phases += [read, fused, bert.fuse(width, answer, tokens, value, text), bert.predict(width, answer, value)]
        weights += bert.decoder_weights(width)
    elif isinstance(task, Captioning):  # which trains without the BERT, once the decoder is copied from it
        caption = task.max_caption_tokens - 1
        phases += [bert.fuse(width, caption, shape.tokens, value, text), bert.predict(width, caption, value)]
        weights = _encoder_weights(shape) + bert.decoder_weights(width)
    return _tuned(weights, batch * peak(phases), value, task.parallel, processes)
