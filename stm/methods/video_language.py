"""Training step on video and language: a frozen teacher, a student that sees a subset of tokens, and text (UMT stage 2).

UMT, STM and ClusterSTM differ in which tokens the student sees, what it predicts for the other tokens, and which tokens
the text is compared with. Each method implements these in a `Branch` in a separate module; the text objectives are
implemented here. Without `language`, this is UMT's first stage.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stm.config import LanguageRun, Mask, Objectives
from stm.data.loader import Batch
from stm.distributed.shares import Share
from stm.masking import Guides, get_strategy
from stm.masking.cluster import make_cluster_strategy
from stm.methods.base import Method, Part
from stm.models.teachers.frame_teacher import FrameTeacher, TeacherOutput
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import EXTRA, VideoLanguageModel
from stm.models.vit import Architecture, VideoEncoder
from stm.models.weights import zoo
from stm.objectives.contrast import contrast_ids
from stm.objectives.masked_language import mask_words, masked_language_loss
from stm.objectives.matching import matching_loss, sample_negatives
from stm.objectives.positives import hash_captions


class MediaMasks:
    """Selects the visible tokens of clips and images, with separate mask settings for each."""

    def __init__(self, run: LanguageRun) -> None:
        self.video = run.mask
        self.image = run.images.mask if run.images else run.mask
        self._cluster = run.cluster

    def keep(self, batch: Mapping[str, Any], teacher_output: TeacherOutput, extra: Guides | None = None) -> Tensor:
        """The visible tokens.

        Args:
            batch: "video" [B, T, 3, S, S] and "guides".
            teacher_output: the teacher's output for the batch.
            extra: guides computed by the method.

        Returns:
            int64 [B, K], sorted ascending.
        """
        mask = self.image if batch["video"].shape[1] == 1 else self.video
        guides: dict[str, Tensor] = {**batch["guides"], "attention": teacher_output.attention, **(extra or {})}
        if "features" in get_strategy(mask.strategy).needs:
            guides["features"] = normalize(teacher_output.tokens, dim=-1)
        return self._get_strategy(mask)(guides, mask.ratio)

    def _get_strategy(self, mask: Mask) -> Callable[[Guides, float], Tensor]:
        # The registered "cluster" uses default settings, because strategies accept only guides and a ratio.
        if mask.strategy == "cluster" and self._cluster is not None:
            return make_cluster_strategy(self._cluster)
        return get_strategy(mask.strategy)


class EncodedText(NamedTuple):
    """The captions of a batch, encoded by the text layers."""

    tokens: Tensor  # int64 [B, X]
    states: Tensor  # [B, X, W]


class BranchOutput(NamedTuple):
    """A branch's result for a batch."""

    tokens: Tensor  # [B, K, W], student features that the text is compared with
    losses: dict[str, Tensor]  # unweighted scalars, named as in `Objectives`
    values: dict[str, Tensor]  # scalars that are only logged


def compare_pairs(
    model: VideoLanguageModel,
    video: Tensor,
    tokens: Tensor,
    text: EncodedText,
    ids: Tensor,
    objectives: Objectives,
    share: Share | None = None,
) -> dict[str, Tensor]:
    """The contrastive and matching losses of a batch, also used in fine-tuning; a loss with weight 0 is skipped.

    Args:
        video: clip embeddings in the common space, [B, E]: unit vectors, or the mean of the frames' unit vectors (see
            `embed_frames`).
        tokens: the student's features that the text is compared with, [B, K, W].
        text: the encoded captions; row i belongs to clip i.
        ids: int64 [B] or [B, I], see `sample_ids`; rows with an id in common are positives of each other.
        objectives: the weights of the losses and the settings of pairs.
        share: the rows of the joint batch, whose noise is drawn; None: each process has noise of its own.

    Returns:
        "contrastive" and "matching", unweighted scalars.
    """
    if model.training:
        model.clamp_temperature()
    losses: dict[str, Tensor] = {}
    captions = model.embed_text(text.states)
    if objectives.contrastive:
        losses["contrastive"] = contrast_ids(video, captions, ids, model.temperature, objectives.contrastive_divisor)
    if objectives.matching:
        with torch.no_grad():
            similarity = video @ captions.T
            if not objectives.hard_negatives:
                similarity = torch.zeros_like(similarity)
            among = objectives.negatives_among
            wrong_text, wrong_video = (
                sample_negatives(values, ids, model.temperature, _pair_noise(values, share), among)
                for values in (similarity, similarity.T)
            )
        # UMT's order: the true pairs, each caption with a wrong clip, each clip with a wrong caption. All three share
        # one pass through the fusion layers.
        states = torch.cat([text.states, text.states, text.states[wrong_text]])
        ids = torch.cat([text.tokens, text.tokens, text.tokens[wrong_text]])
        losses["matching"] = matching_loss(model.match(states, ids, torch.cat([tokens, tokens[wrong_video], tokens])))
    return losses


def _pair_noise(similarity: Tensor, share: Share | None) -> Tensor | None:
    """A process's block of the noise of all pairs of the joint batch, [B, B]; None: to be drawn where it is used."""
    if share is None or share.count == 1:
        return None
    pairs = len(similarity) * share.count
    dtype = torch.promote_types(similarity.dtype, torch.float32)
    return share.take(share.take(torch.rand(pairs, pairs, dtype=dtype, device=similarity.device)), dim=1)


def sample_ids(batch: Mapping[str, Any], shared_texts: bool) -> Tensor:
    """The ids by which the rows of a batch are positives of each other, for `compare_pairs`.

    Args:
        batch: "clip" int64 [B], clip indices; with `shared_texts` also "caption_hash" int64 [B], see `hash_captions`.
        shared_texts: whether clips with equal captions share them.

    Returns:
        int64 [B]; with `shared_texts` [B, 2].
    """
    return torch.stack([batch["clip"], batch["caption_hash"]], dim=1) if shared_texts else batch["clip"]


class Branch(Protocol):
    """A module that implements the masking, student pass and predictions of a method.

    Like a `Method`, it may define `accept_text_model` and `learning_rate_factors` (see stm/training/optimizer.py).
    """

    def __call__(
        self, encoder: VideoEncoder, batch: Mapping[str, Any], teacher_output: TeacherOutput, text: EncodedText | None
    ) -> BranchOutput: ...


class VideoOnly(nn.Module):
    """The model of a run without text; its encoder is saved and evaluated."""

    def __init__(self, encoder: VideoEncoder) -> None:
        super().__init__()
        self.encoder = encoder


class VideoLanguage(Method):
    """Combines the teacher, a branch and the text objectives."""

    has_unused_parameters = True  # a step on images does not use the parameters that compare frames
    teacher: FrameTeacher

    def __init__(
        self, model: VideoLanguageModel | VideoOnly, branch: nn.Module, teacher: FrameTeacher, run: LanguageRun
    ) -> None:
        """
        Args:
            model: the student and, in a run with `language`, the text layers and heads.
            branch: see `Branch`.
            teacher: the frozen teacher.
            run: the settings; its objectives define the loss weights.
        """
        super().__init__(teacher)
        self.model = model
        self.branch = branch
        self.objectives = run.objectives
        self.text = isinstance(model, VideoLanguageModel)
        self.max_tokens = run.language.max_tokens if run.language is not None else 0
        factors: Mapping[str, float] = getattr(branch, "learning_rate_factors", {})
        # The optimiser looks up factors by full parameter names.
        self.learning_rate_factors = {f"branch.{name}": factor for name, factor in factors.items()}

    @property
    def student(self) -> VideoEncoder:
        return self.model.encoder

    def accept_text_model(self, text_model: dict[str, str] | None) -> None:
        if accept := getattr(self.branch, "accept_text_model", None):
            accept(text_model)

    def prepare(self, batch: Batch) -> Batch:
        """Adds the captions' "tokens", int64 [B, X], if the model has text, and "caption_hash", int64 [B], if clips share it."""
        if not self.text:
            return batch
        captions = batch["caption"]
        hashes = {"caption_hash": hash_captions(captions)} if self.objectives.shared_texts else {}
        return {**batch, "tokens": self.encode_captions(captions), **hashes}

    def parts(self) -> dict[str, Part]:
        """The branch (mask predictor, decoders) for the report, and the text layers and heads for evaluation."""
        parts = {"branch": Part(self.branch.state_dict(), {})}
        if self.text:
            parts[EXTRA] = Part(self._model.language_state(), self._model.describe())
        return parts

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Computes the losses of one step.

        Args:
            batch: "video" uint8 [B, T, 3, S, S] (images: T = 1) and "guides" with "noise" float32 [B, T, N]; with text
                also "tokens" int64 [B, X], "clip" int64 [B] (rows with the same index are of the same clip) and, if
                clips share captions, "caption_hash" int64 [B].

        Returns:
            Float32 scalars: "loss", the weighted sum of the run's losses; each loss by name; and values that are only
            logged.
        """
        with torch.no_grad():
            teacher_output = self.teacher(batch["video"])
        text = self.read(batch["tokens"]) if self.text else None
        output = self.branch(self.model.encoder, batch, teacher_output, text)
        losses = dict(output.losses)
        if text is not None:
            losses |= self.compare(output.tokens, text, sample_ids(batch, self.objectives.shared_texts))
        weights = {name: getattr(self.objectives, name) for name in losses}
        total = sum(
            (weights[name] * value.float() for name, value in losses.items()),
            torch.zeros((), device=teacher_output.features.device),
        )
        values = dict(output.values)
        if text is not None:
            values["temperature"] = self._model.temperature.detach()
        return {"loss": total, **losses, **values}

    @property
    def _model(self) -> VideoLanguageModel:
        assert isinstance(self.model, VideoLanguageModel)
        return self.model

    def encode_captions(self, captions: list[str]) -> Tensor:
        """Tokenizes captions: token ids, int64 [B, X]."""
        return self._model.language.tokenizer.encode(captions, self.max_tokens)

    def read(self, tokens: Tensor) -> EncodedText:
        """Encodes captions, int64 [B, X], with the text layers."""
        return EncodedText(tokens, self._model.encode_text(tokens))

    def compare(self, tokens: Tensor, text: EncodedText, ids: Tensor) -> dict[str, Tensor]:
        """The losses of the text objectives with a nonzero weight.

        Args:
            tokens: the student's features that the text is compared with, [B, K, W].
            ids: int64 [B] or [B, I], see `sample_ids`.
        """
        losses = compare_pairs(self._model, self._model.embed_video(tokens), tokens, text, ids, self.objectives)
        if self.objectives.masked_language:
            losses["masked_language"] = self._predict_masked_words(tokens, text.tokens)
        return losses

    def _predict_masked_words(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """The masked language modelling loss: masked words are predicted from the other words and the video."""
        model = self._model
        language = model.language
        masked, targets = mask_words(
            ids,
            probability=self.objectives.mask_probability,
            mask_id=language.mask_id,
            special=(language.pad_id, language.cls_id),
            vocabulary=language.vocabulary,
        )
        # Encode the masked captions in a second pass: the states of the full captions would leak the masked words.
        fused = model.fuse(model.encode_text(masked), masked, tokens)
        objectives = self.objectives
        words = model.predict_words(fused)
        return masked_language_loss(words, targets, objectives.word_average, objectives.negatives_among)


def build_video_language(
    run: LanguageRun, branch: Callable[[LanguageRun, Architecture, FrameTeacher], nn.Module]
) -> VideoLanguage:
    """Builds UMT, STM or ClusterSTM with a newly initialised student; seed torch first for reproducible weights.

    Args:
        run: the settings.
        branch: builds the method's `Branch` from the run, the student's architecture and the teacher.

    Raises:
        ValueError: a model cannot be loaded, or the models' widths do not match.
    """
    architecture = zoo.describe(run)
    encoder = VideoEncoder(architecture, run.drop_path)
    model: VideoLanguageModel | VideoOnly = VideoOnly(encoder)
    if run.language is not None:
        language = SplitBert.load(run.language)
        model = VideoLanguageModel(encoder, language, run.language.embedding, run.language.temperature)
    teacher = FrameTeacher.load(run.teacher, architecture.image_size // architecture.patch_size)
    return VideoLanguage(model, branch(run, architecture, teacher), teacher, run)


def check_aligned_layers(run: LanguageRun, architecture: Architecture, teacher: FrameTeacher) -> None:
    """Rejects a teacher with more layers to align than the student has blocks.

    Raises:
        ValueError: the teacher has more layers; the message contains both numbers.
    """
    if teacher.layers > architecture.depth:
        raise ValueError(
            f"teacher.layers {teacher.layers} is more than the {architecture.depth} blocks of the student (model: {run.model}), "
            f"whose last layers are aligned with the teacher's; set it to {architecture.depth} or less"
        )
