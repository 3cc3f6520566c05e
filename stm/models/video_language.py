"""The video-language model (UMT, second stage): a video encoder, a split BERT, and the heads that compare them.

Clips and captions are compared in two ways: as single vectors in a joint space (contrastive loss, fast retrieval), and
token by token in the BERT's fusion layers (matching, masked language modelling).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stm.models.text.split_bert import SplitBert
from stm.models.vit import Architecture, VideoEncoder
from stm.models.weights import zoo
from stm.models.weights.checks import check_tensors
from stm.pretrained.hub import ModelError

EXTRA = "language"
"""Key of the language weights in a weights file."""

ANSWERS = "answers"
"""Key of the weights of a decoder of answers in a weights file."""

PARTS = {
    "retrieval heads": ("pool_norm.", "video_projection.", "text_projection.", "matching_head.", "temperature"),
    "language modelling head": ("language.transform.", "language.word_bias"),
}
"""The parts that a fine-tuned release may lack, with the beginnings of their tensors' names."""

TEMPERATURES = (0.001, 0.5)  # UMT's bounds
_MOST_FEATURES = 2**16  # dimensions of the joint space; headers are untrusted


class VideoLanguageModel(nn.Module):
    """Encoder, split BERT, projections to the joint space, contrastive temperature, and matching head."""

    def __init__(
        self, encoder: VideoEncoder, language: SplitBert, embedding: int = 512, temperature: float = 0.07
    ) -> None:
        """
        Args:
            encoder: a video encoder of width W. It becomes a submodule, as does `language`.
            language: a BERT of the same width.
            embedding: E, width of the joint space; UMT: 512 for base models, 768 for large ones.
            temperature: initial value of the learned contrastive temperature.

        Raises:
            ModelError: the widths differ.
        """
        super().__init__()
        width = encoder.architecture.width
        if width != language.width:
            raise ModelError(
                f"the video encoder is {width} wide and the BERT {language.width}: the fusion layers attend from one to the "
                "other, so take a BERT as wide as the encoder (base: bert-base-uncased, 768; large: bert-large-uncased, 1024)"
            )
        self.encoder = encoder
        self.language = language
        self.embedding = embedding
        self.absent: tuple[str, ...] = ()  # those of `PARTS` that were not trained, because a release lacks them
        self.pool_norm = nn.LayerNorm(width, eps=encoder.architecture.norm_eps)  # UMT's vit.py: 1e-6
        self.video_projection = nn.Linear(width, embedding)
        self.text_projection = nn.Linear(width, embedding)
        self.matching_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Captions, int64 [B, X] -> output of the last text layer, float [B, X, W]."""
        states: Tensor = self.language(tokens)
        return states

    def embed_text(self, states: Tensor) -> Tensor:
        """The output of `encode_text` [B, X, W] -> the captions' unit vectors, from [CLS], float32 [B, E]."""
        return _to_unit(self.text_projection(states[:, 0]))

    def pool_video(self, features: Tensor) -> Tensor:
        """The encoder's token features [B, K, W] -> their mean after LayerNorm [B, W]."""
        pooled: Tensor = self.pool_norm(features.mean(dim=1))
        return pooled

    def embed_video(self, features: Tensor) -> Tensor:
        """Token features [B, K, W] -> the clips' unit vectors, float32 [B, E]."""
        return _to_unit(self.video_projection(self.pool_video(features)))

    def embed_frames(self, features: Tensor, frames: int) -> Tensor:
        """Embeddings of unmasked clips as in UMT: the mean of the frames' unit vectors.

        The dot product with a caption's vector is then the mean of the frames' similarities. The vector has a norm of at
        most 1, which decreases as the frames differ more.

        Args:
            features: features of all tokens, [B, T * N, W], ordered by frame.
            frames: T.

        Returns:
            Float32 [B, E].

        Raises:
            ValueError: the number of tokens is not divisible by the number of frames.
        """
        if features.shape[1] % frames:
            raise ValueError(f"{features.shape[1]} tokens are not divisible by {frames} frames")
        single = self.embed_video(features.unflatten(1, (frames, -1)).flatten(0, 1))
        return single.unflatten(0, (-1, frames)).mean(dim=1)

    def fuse(self, states: Tensor, tokens: Tensor, memory: Tensor) -> Tensor:
        """Passes captions through the fusion layers, which cross-attend to clips.

        Args:
            states: [B, X, W], the output of `encode_text`.
            tokens: int64 [B, X], the same captions.
            memory: the encoder's features [B, K, W], row i for caption i; [1, K, W] if one clip is shared by all.

        Returns:
            Float [B, X, W].
        """
        return self.language.fuse(states, tokens, memory)

    def match(self, states: Tensor, tokens: Tensor, memory: Tensor) -> Tensor:
        """Logits [B, 2] (no, yes) that a caption matches its clip, from the fused [CLS]; arguments as in `fuse`."""
        logits: Tensor = self.matching_head(self.fuse(states, tokens, memory)[:, 0])
        return logits

    def predict_words(self, fused: Tensor) -> Tensor:
        """The output of `fuse` [B, X, W] -> word logits [B, X, V]."""
        return self.language.predict_words(fused)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamps the temperature to its bounds in place, as UMT does before each step. A differentiable clamp in the forward
        pass has zero gradient outside the bounds, so the temperature would never return."""
        self.temperature.clamp_(*TEMPERATURES)

    def language_state(self) -> dict[str, Tensor]:
        """All weights except the encoder's and those `absent`. No tensor appears twice, since safetensors rejects shared
        tensors."""
        without = ("encoder.", *(start for part in self.absent for start in PARTS[part]))
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(without)}

    def describe(self) -> dict[str, Any]:
        """Everything except weights that `load_video_language` needs, as JSON values."""
        absent = {"absent": list(self.absent)} if self.absent else {}
        return {**self.language.describe(), "embedding": self.embedding, **absent}


def load_video_language(
    path: Path, drop_path: float = 0.0, architecture: Architecture | None = None
) -> VideoLanguageModel:
    """Load the model from a run's weights, in eval mode.

    The file must have been saved with `zoo.save(model.encoder, path, extra={EXTRA: model.language_state()}, header={EXTRA:
    model.describe()})`.

    Args:
        path: the weights file.
        drop_path: the encoder's stochastic depth rate, for fine-tuning.
        architecture: for a different clip length or image size; see `zoo.read`.

    Raises:
        WeightsError: the file cannot be read, its run had no text model, or its weights do not match its header.
    """
    tensors, about = zoo.load_extra(path, EXTRA)
    encoder = zoo.load_encoder(path, drop_path, architecture)
    try:
        with torch.device("meta"):  # no memory is allocated, whatever the header's sizes
            blank = _rebuild(encoder, about).language_state()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise zoo.WeightsError(f"{path}: its header does not describe a valid {EXTRA!r} ({error})") from error
    check_tensors(tensors, blank, f"{path} has a {EXTRA!r}")
    model = _rebuild(encoder, about)
    model.load_state_dict(tensors, strict=False)  # checked above; the encoder's weights are already loaded
    return model.eval()


def _rebuild(encoder: VideoEncoder, about: Mapping[str, Any]) -> VideoLanguageModel:
    embedding = about.get("embedding")
    if not isinstance(embedding, int) or not 0 < embedding <= _MOST_FEATURES:
        raise ModelError(f"invalid embedding {embedding!r}: must be 1 to {_MOST_FEATURES}")
    model = VideoLanguageModel(encoder, SplitBert.rebuild(about), embedding)
    absent = about.get("absent", [])
    if not isinstance(absent, list) or not set(absent) <= PARTS.keys():
        raise ModelError(f"invalid absent {absent!r}")
    model.absent = tuple(absent)
    return model


def _to_unit(vectors: Tensor) -> Tensor:
    """Unit vectors, in float32 or wider even under autocast: losses divide their dot products by temperatures of 0.01."""
    return normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
