"""The video-language model (UMT, second stage): a video encoder, a split BERT, and the heads that compare them.

Clips and captions are compared twice: as single vectors in a joint space (the contrast, and fast retrieval), and token by
token in the BERT's fusion layers (matching, masked language modelling).
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
"""Key of the text side in a weights file."""

TEMPERATURES = (0.001, 0.5)  # UMT's bounds
_MOST_FEATURES = 2**16  # of the joint space; a header may come from anyone


class VideoLanguageModel(nn.Module):
    """Encoder, split BERT, projections to the joint space, temperature of the contrast, and matching head."""

    def __init__(
        self, encoder: VideoEncoder, language: SplitBert, embedding: int = 512, temperature: float = 0.07
    ) -> None:
        """
        Args:
            encoder: of width W. It becomes part of this module, as does `language`.
            language: a BERT of the same width.
            embedding: E, width of the joint space; UMT: 512 with a base model, 768 with a large one.
            temperature: initial value of the contrast's temperature, which is learned.

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
        self.pool_norm = nn.LayerNorm(width, eps=encoder.architecture.norm_eps)  # [INF] the encoder's epsilon
        self.video_projection = nn.Linear(width, embedding)
        self.text_projection = nn.Linear(width, embedding)
        self.matching_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Captions, int64 [B, X] -> states of the text layers, float [B, X, W]."""
        states: Tensor = self.language(tokens)
        return states

    def embed_text(self, states: Tensor) -> Tensor:
        """[B, X, W] of `encode_text` -> unit vectors of the captions, from their [CLS], float32 [B, E]."""
        return _to_unit(self.text_projection(states[:, 0]))

    def pool_video(self, features: Tensor) -> Tensor:
        """The encoder's features of a clip's tokens, [B, K, W] -> their mean after LayerNorm, [B, W]."""
        pooled: Tensor = self.pool_norm(features.mean(dim=1))
        return pooled

    def embed_video(self, features: Tensor) -> Tensor:
        """[B, K, W] -> unit vectors of the clips, float32 [B, E]."""
        return _to_unit(self.video_projection(self.pool_video(features)))

    def embed_frames(self, features: Tensor, frames: int) -> Tensor:
        """Vectors of unmasked clips, as UMT compares them: the mean over frames of each frame's unit vector.

        The product with a caption's vector is then the mean of the frames' similarities. Such a vector has at most length 1:
        the more the frames differ, the shorter it is.

        Args:
            features: of all tokens, [B, T * N, W], frame after frame.
            frames: T.

        Returns:
            Float32 [B, E].

        Raises:
            ValueError: the number of tokens is not divisible by the frames.
        """
        if features.shape[1] % frames:
            raise ValueError(f"{features.shape[1]} tokens are not divisible by {frames} frames")
        single = self.embed_video(features.unflatten(1, (frames, -1)).flatten(0, 1))
        return single.unflatten(0, (-1, frames)).mean(dim=1)

    def fuse(self, states: Tensor, tokens: Tensor, memory: Tensor) -> Tensor:
        """Captions through the fusion layers, which cross-attend to clips.

        Args:
            states: [B, X, W] of `encode_text`.
            tokens: int64 [B, X], the same captions.
            memory: the encoder's features [B, K, W], row i for caption i; [1, K, W] where one clip serves all.

        Returns:
            Float [B, X, W].
        """
        return self.language.fuse(states, tokens, memory)

    def match(self, states: Tensor, tokens: Tensor, memory: Tensor) -> Tensor:
        """Whether captions belong to clips, from the fused [CLS]: logits [B, 2] of no and yes; arguments as in `fuse`."""
        logits: Tensor = self.matching_head(self.fuse(states, tokens, memory)[:, 0])
        return logits

    def predict_words(self, fused: Tensor) -> Tensor:
        """[B, X, W] of `fuse` -> logits of the words [B, X, V]."""
        return self.language.predict_words(fused)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamps the temperature to its bounds, as UMT does before each step. A clamp in the forward pass would leave it
        without a gradient outside them, and it would never come back."""
        self.temperature.clamp_(*TEMPERATURES)

    def language_state(self) -> dict[str, Tensor]:
        """All weights but the encoder's. No tensor is in it twice, which safetensors would refuse."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("encoder.")}

    def describe(self) -> dict[str, Any]:
        """What `load_video_language` needs in addition to the weights, as JSON values."""
        return {**self.language.describe(), "embedding": self.embedding}


def load_video_language(
    path: Path, drop_path: float = 0.0, architecture: Architecture | None = None
) -> VideoLanguageModel:
    """The model from a run's weights, in eval mode.

    It was saved with `zoo.save(model.encoder, path, extra={EXTRA: model.language_state()}, header={EXTRA:
    model.describe()})`.

    Args:
        path: the file.
        drop_path: of the encoder, for fine-tuning.
        architecture: for a different clip length or image size, see `zoo.read`.

    Raises:
        WeightsError: the file cannot be read, its run had no text, or its weights do not fit its header.
    """
    tensors, about = zoo.load_extra(path, EXTRA)
    encoder = zoo.load_encoder(path, drop_path, architecture)
    try:
        with torch.device("meta"):  # allocates no memory, whatever sizes the header asks for
            blank = _rebuild(encoder, about).language_state()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise zoo.WeightsError(f"{path}: its header does not describe a valid {EXTRA!r} ({error})") from error
    check_tensors(tensors, blank, f"{path} has a {EXTRA!r}")
    model = _rebuild(encoder, about)
    model.load_state_dict(tensors, strict=False)  # checked above; the encoder has its weights
    return model.eval()


def _rebuild(encoder: VideoEncoder, about: Mapping[str, Any]) -> VideoLanguageModel:
    embedding = about.get("embedding")
    if not isinstance(embedding, int) or not 0 < embedding <= _MOST_FEATURES:
        raise ModelError(f"invalid embedding {embedding!r}: must be 1 to {_MOST_FEATURES}")
    return VideoLanguageModel(encoder, SplitBert.rebuild(about), embedding)


def _to_unit(vectors: Tensor) -> Tensor:
    """Unit vectors, in float32 at least, also under autocast: losses divide their products by temperatures of 0.01."""
    return normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
