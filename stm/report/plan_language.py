"""Arithmetic of the runs and evaluations with text, for the plan; same conventions as `stm.models.cost`."""

from stm.config import LanguageRun
from stm.models.cost import blocks_cost
from stm.models.sizes import SIZES
from stm.models.vit import Architecture
from stm.models.zoo import describe

# Layers of the BERT that goes with a student: UMT takes bert-base with B and bert-large with L, whose widths are theirs.
_BERT_DEPTH = {"tiny": 4, "small": 12, "base": 12, "large": 24, "huge": 24}


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
    fusing = fusion_flops(width, words, met, max(1, _BERT_DEPTH[run.model] - run.language.fusion_layer))
    reads = 1 + bool(wanted.masked_language)
    fuses = 3 * bool(wanted.matching) + bool(wanted.masked_language)
    return reads * reading + fuses * fusing


def fusion_flops(width: int, words: int, met: int, layers: int) -> float:
    """Forward FLOPs of fusion layers on one caption of `words` tokens that meets `met` tokens of a clip."""
    crossing = 2 * (2 * words * width**2 + 2 * met * width**2) + 4 * words * met * width
    return blocks_cost(words, width, layers, 4.0) + layers * crossing
