"""Entry points for torch.hub, which clones the repository and imports stm from the clone: nothing needs to be installed but
`dependencies`.

    model = torch.hub.load("owner/stm", "encoder", weights="weights.safetensors")   # "owner" is the repository's
    model = torch.hub.load("path/to/a/clone", "encoder", weights="weights.safetensors", source="local")

`weights` is a safetensors file of stm, a VideoMAE `.pth`, a folder that `stm convert` wrote, or a transformers folder or hub id
of a VideoMAE. Models are in eval mode and take clips [B, T, 3, S, S], uint8 or float in [0, 1], if not said otherwise.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stm.models.vit import VideoEncoder, VideoMAE
    from stm.models.weights.classifier import VideoClassifier
    from stm.models.weights.timm import ClipTransformer

# What the entry points import; transformers is needed besides for its folders and hub ids.
dependencies = ["numpy", "pyarrow", "pydantic", "safetensors", "timm", "torch", "yaml"]


def encoder(weights: str) -> "VideoEncoder":
    """The video encoder: `model(video)` returns tokens [B, L, width], `model.forward_features(video)` their mean."""
    from stm.models.weights import zoo

    return zoo.load_encoder(weights).eval()


def mae(weights: str) -> "VideoMAE":
    """Encoder and decoder, as pretrained: `model(video, kept, decoded)` predicts pixels.

    `kept` and `decoded` are token indices, int64 [B, K] and [B, M]; predictions are [B, M, tubelet * patch^2 * 3].
    """
    from stm.models.vit import VideoMAE
    from stm.models.weights import zoo

    model = zoo.load_any(weights)
    if not isinstance(model, VideoMAE):
        raise ValueError(f"{weights}: has no decoder; the entry point `encoder` loads it")
    return model.eval()


def classifier(weights: str) -> "VideoClassifier":
    """A fine-tuned classifier: `model(video)` returns logits [B, classes], `model.labels` are the classes' names."""
    from stm.models.weights import zoo

    return zoo.load_classifier(weights).eval()


def timm_encoder(weights: str) -> "ClipTransformer":
    """A timm `VisionTransformer` for clips, normalised and channels first: float [B, 3, T, S, S].

    `model(clip)` returns the mean of the tokens [B, width], or a classifier's logits.
    """
    from stm.models.weights import zoo

    return zoo.to_timm(zoo.read(weights))
