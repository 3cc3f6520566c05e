"""The contrastive branch (TGM, section 3.4): a head maps a clip's pooled tokens to the text embedding space."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stm.config import Contrast
from stm.models.head import PredictionHead
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.models.weights.checks import check_tensors
from stm.objectives.contrast import match_pairs

EXTRA = "contrast"
"""Key of the branch in a weights file."""

MIN_TEMPERATURE = 0.01  # CLIP's value: it clips the logit scale at 100
# Slightly above the exact logarithm: `exp` may round below the minimum, where the clamp in `temperature` has no
# gradient.
_MIN_LOG_TEMPERATURE = math.log(MIN_TEMPERATURE) + 2e-6


class ContrastHead(nn.Module):
    """Prediction head, temperature and loss."""

    def __init__(self, width: int, text_width: int, settings: Contrast) -> None:
        """
        Args:
            width: width of the encoder.
            text_width: width of the caption vectors.
            settings: loss weight, temperature and head size.
        """
        super().__init__()
        self.width = width
        self.text_width = text_width
        self.settings = settings
        self.text_model: dict[str, str] | None = None  # encoder of the caption vectors, if named in the shards
        self.head = PredictionHead(width, settings.hidden, text_width, settings.layers)
        start = torch.tensor(math.log(settings.temperature))
        # Learned in log space, as in CLIP, so that steps are relative and the temperature stays positive.
        self.log_temperature = nn.Parameter(start) if settings.learnable else None

    @property
    def observes(self) -> bool:
        """Whether the contrastive loss is only measured and does not train the encoder (TGM, Figure 4).

        A head learns something even from the features of a random encoder, so that its loss says nothing about the
        encoder by itself. The control is a run whose reconstruction has weight 0 too: the same head, on an encoder that
        stays at its random initial weights.
        """
        return self.settings.weight == 0

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: it would pull the temperature to 1. CLIP does not decay its logarithm either."""
        return {"log_temperature"}

    @property
    def temperature(self) -> float | Tensor:
        """The temperature; a scalar tensor if it is learned."""
        if self.log_temperature is None:
            return self.settings.temperature
        return self.log_temperature.exp().clamp(min=MIN_TEMPERATURE)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeds clips: the encoder's token features [B, K, width] -> unit vectors, float32 [B, text_width]."""
        vectors = self.head(tokens.mean(dim=1))
        return normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)

    def forward(self, tokens: Tensor, text: Tensor, present: Tensor) -> dict[str, Tensor]:
        """The contrastive loss of a batch.

        The head's batch norm uses all clips; the loss uses only clips with a caption.

        Args:
            tokens: features of the visible tokens, [B, K, width].
            text: unit vectors of the captions, float32 [B, text_width].
            present: bool [B], whether the clip has a caption.

        Returns:
            Scalars: "contrast", the loss; "accuracy", the share of clips whose own caption is the most similar;
            "temperature" if it is learned.

        Raises:
            ValueError: the text vectors do not have the head's output width.
        """
        self._clamp_temperature()
        match = match_pairs(self.embed(tokens), text, self.temperature, present)
        values = {"contrast": match.loss, "accuracy": match.accuracy}
        if isinstance(self.temperature, Tensor):
            values["temperature"] = self.temperature.detach()
        return values

    @torch.no_grad()
    def _clamp_temperature(self) -> None:
        """Resets the temperature, as CLIP does, if the last step moved it below the minimum.

        A clamp in the forward pass has no gradient there, so the temperature could never rise again.
        """
        if self.log_temperature is not None and self.training:
            self.log_temperature.clamp_(min=_MIN_LOG_TEMPERATURE)

    def describe(self) -> dict[str, Any]:
        """JSON values that `load_contrast_head` needs in addition to the weights."""
        about = {"width": self.width, "text_width": self.text_width, "text_model": self.text_model}
        return {**about, "settings": self.settings.model_dump(mode="json")}


class VideoEmbedder(nn.Module):
    """Embeds clips as unit vectors in the text embedding space, with an encoder and the branch trained with it."""

    def __init__(self, encoder: VideoEncoder, branch: ContrastHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.branch = branch

    def forward(self, video: Tensor, kept: Tensor | None = None) -> Tensor:
        """Embeds video [B, T, 3, S, S], uint8 or float in [0, 1], from kept tokens [B, K] (None: all of them).

        Returns float32 [B, text_width]. Call this in eval mode: in training mode, batch norm makes each embedding depend
        on the other clips of the batch.
        """
        return self.branch.embed(self.encoder(video, kept))


def load_contrast_head(path: Path) -> ContrastHead:
    """Loads the branch from a run's weights, in eval mode.

    Raises:
        ValueError: the file cannot be read, its run had no `contrast`, or its weights do not fit its header.
    """
    tensors, about = zoo.load_extra(path, EXTRA)
    try:
        sizes = about["width"], about["text_width"], Contrast.model_validate(about["settings"])
        with torch.device("meta"):  # allocates no memory, regardless of the sizes in the header
            blank = ContrastHead(*sizes).state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise zoo.WeightsError(f"{path}: its header does not describe a valid {EXTRA!r} ({error!r})") from error
    check_tensors(tensors, blank, f"{path} has a {EXTRA!r}")
    branch = ContrastHead(*sizes)
    branch.load_state_dict(tensors)
    branch.text_model = about.get("text_model")
    return branch.eval()


def load_embedder(path: Path) -> VideoEmbedder:
    """Loads the embedder for zero-shot classification and retrieval, in eval mode; raises as `load_contrast_head` does."""
    return VideoEmbedder(zoo.load_encoder(path), load_contrast_head(path)).eval()
