"""Weights, work and memory of what STM and ClusterSTM train beside the student: masks and decoders.

UMT's linear heads are negligible. Details of the networks are in `stm.models.spatiotemporal` and `stm.models.feature_decoders`.
"""

from dataclasses import replace
from typing import NamedTuple

from stm.config import LanguageRun
from stm.models.architecture import Architecture, describe
from stm.models.cost import blocks_cost
from stm.pretrained.sizes import clip_tower, clip_width


class Part(NamedTuple):
    """One part: number of weights, forward FLOPs and kept values per sample."""

    weights: float
    flops: float = 0.0
    kept: float = 0.0  # values, in the precision of matrix products

    def times(self, count: int) -> "Part":
        return Part(*(count * value for value in self))

    def plus(self, other: "Part") -> "Part":
        return Part(*(own + more for own, more in zip(self, other, strict=True)))


def branch_of(run: LanguageRun, frames: int, kept: int, masked: int) -> Part:
    """Return what a run's method adds to the student, for a sample of `frames` frames with `kept` and `masked` tokens."""
    shape, joint = describe(run), clip_width(run.teacher.model)
    if run.spatio_temporal is not None:
        decoder = _layer_decoder(shape, run.spatio_temporal.features, joint, frames).times(run.teacher.layers)
        return decoder.plus(_mask(run, shape, frames))
    if run.cluster is not None and run.objectives.relevance:
        checkpointed = run.gradient_checkpointing in ("video", "all")
        shape = replace(shape, decoder_depth=run.cluster.decoder_depth)
        return _token_decoder(shape, joint, kept, masked, checkpointed)
    return Part(0)


def _token_decoder(shape: Architecture, joint: int, kept: int, masked: int, checkpointed: bool) -> Part:
    """ClusterSTM's blocks over visible and masked tokens, and a projection to the teacher's joint space."""
    width, tokens, hidden = shape.decoder_width, kept + masked, int(shape.decoder_width * shape.mlp_ratio)
    depth = shape.decoder_depth
    weights = shape.width * width + depth * (4 * width**2 + 2 * width * hidden) + width * joint
    ends = 2 * kept * shape.width * width + 2 * masked * width * joint
    # As in `stm.plan.memory`: the norms' inputs, of eight values at most, are counted at the precision of the others.
    block = tokens * (8 * width + 2 * hidden)
    blocks = depth * tokens * width + block if checkpointed else depth * block
    values = blocks + kept * shape.width + masked * (2 * width + 2 * joint)
    return Part(weights, blocks_cost(tokens, width, depth, shape.mlp_ratio) + ends, values)


def _pair_predictor(width: int, features: int, pairs: float) -> Part:
    """A convolutional network on `pairs` tokens of pairs of frames; its last layers work on smaller maps."""
    half = features // 2
    large = 9 * 2 * width + 2 * width * features + 9 * features**2 + 9 * features * half
    weights = large + 9 * half**2
    return Part(weights, 2 * pairs * (large + 9 * half**2 / 4), pairs * (6 * width + 4 * features + half))


def _layer_decoder(shape: Architecture, features: int, joint: int, frames: int) -> Part:
    """STM's decoder of one layer of the student."""
    width, tokens = shape.width, frames * shape.slot_tokens
    projections = 2 * width**2 + width * joint
    if frames == 1:  # images: the head alone
        pairs = _pair_predictor(width, features, 0)
        own = 3 * (features // 2) ** 2 + features // 2 * width
        return Part(projections + pairs.weights + own, 2 * tokens * width * joint, tokens * (2 * width + joint))
    pairs = _pair_predictor(width, features, (frames - 1) * shape.slot_tokens)
    own = 3 * (features // 2) ** 2 + features // 2 * width
    values = tokens * (4 * width + 2 * joint + 2 * features)
    return pairs.plus(Part(projections + own, 2 * tokens * (projections + own), values))


def _mask(run: LanguageRun, shape: Architecture, frames: int) -> Part:
    """STM's learned mask; images are masked by the teacher's attention."""
    assert run.spatio_temporal is not None
    if run.mask.strategy != "spatiotemporal":
        return Part(0)
    tower, width = clip_tower(run.teacher.model), run.spatio_temporal.width
    stem = tower.width if tower else shape.width
    tokens = frames * shape.slot_tokens if frames > 1 else 0
    pairs = _pair_predictor(width, run.spatio_temporal.features, (frames - 1) * shape.slot_tokens)
    return pairs.plus(Part(stem * width, 2 * tokens * stem * width, tokens * (stem + width)))
