"""transformers' CLIP and SigLIP image towers as teachers, from the hub or a local folder."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from stm.models.teachers.tower import (
    ClassTokenTower,
    LoadedTower,
    ProbeTower,
    Projection,
    Tower,
    project_joint,
    resize_positions,
    split_heads,
)
from stm.pretrained.hub import ModelError, ModelSource, explain_missing, find_model, load_complete
from stm.storage.machine_errors import is_machine_error

# Maps the model type in a config to the class to load. CLIP needs its projection.
CLASSES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
}


def load_transformers(name: str) -> LoadedTower:
    """Load the image tower of a CLIP or SigLIP, on the CPU, in float32.

    Args:
        name: a hub id or a local folder.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or is not a CLIP or SigLIP with an image tower.
    """
    source = find_model(name)
    try:
        kind = transformers.AutoConfig.from_pretrained(**source.arguments).model_type
    except (OSError, ValueError, KeyError) as error:
        raise explain_missing(source, error) from error
    if kind not in CLASSES:
        known = ", ".join(CLASSES.values())
        raise ModelError(f"model {name!r} is of type {kind!r}; a teacher is one of {known}")
    model = load_complete(getattr(transformers, CLASSES[kind]), source, "float32", torch.device("cpu"))
    mean, deviation = _read_statistics(source)
    identity = source.identify(getattr(model.config, "_commit_hash", None))
    scale = float(model.logit_scale.detach().exp()) if hasattr(model, "logit_scale") else None
    return LoadedTower(make_tower(model, name), identity, mean, deviation, scale)


def make_tower(model: Any, name: str = "teacher.model") -> Tower:
    """Wrap the image half of a model of `CLASSES` in a tower, modifying it in place; the text half is dropped."""
    vision = getattr(model, "vision_model", model)
    if hasattr(model, "visual_projection"):
        return TransformersClipTower(vision, model.visual_projection)
    if getattr(vision, "head", None) is None:
        raise ModelError(f"model {name!r} has neither CLIP's projection nor SigLIP's pooling head")
    return TransformersSiglipTower(vision)


def _read_statistics(source: ModelSource) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation of the pixels, from the image processor's config next to the weights, if it exists."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(**source.arguments)
    except (OSError, ValueError) as error:
        if is_machine_error(error):
            raise
        return None, None
    return tuple(processor.image_mean), tuple(processor.image_std)


class _TransformersTower(Tower):
    """Common base of transformers' CLIP and SigLIP image towers."""

    class_tokens: int  # rows of the position embedding that do not belong to patches

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.vision = vision
        self.entry_norm = getattr(vision, "pre_layrnorm", nn.Identity())  # sic, in transformers; SigLIP has none
        self.patch = vision.config.patch_size
        self.heads = vision.config.num_attention_heads
        self.depth = len(vision.encoder.layers)
        self.token_width = self.stem_width = self.feature_width = vision.config.hidden_size

    def resize(self, patches_per_side: int) -> None:
        embeddings, table = self.vision.embeddings, self.vision.embeddings.position_embedding
        table.weight = resize_positions(table.weight, patches_per_side, self.class_tokens)
        table.num_embeddings = len(table.weight)
        embeddings.position_ids = torch.arange(len(table.weight), device=table.weight.device)[None]
        embeddings.image_size = patches_per_side * self.patch

    @property
    def convolution(self) -> nn.Conv2d:
        return self.vision.embeddings.patch_embedding

    def run_blocks(self, pixels: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        # Avoids `output_hidden_states`: the hooks that transformers uses for it break the compiled graph.
        states = [self.entry_norm(self.vision.embeddings(pixels))]
        for layer in self.vision.encoder.layers[: numbers[-1] + 1]:
            states.append(layer(states[-1], attention_mask=None))
        return [states[number + 1] for number in numbers]


class TransformersClipTower(_TransformersTower, ClassTokenTower):
    """CLIPVisionModel and the projection of CLIPModel or CLIPVisionModelWithProjection."""

    class_tokens = 1

    def __init__(self, vision: Any, projection: nn.Linear) -> None:
        super().__init__(vision)
        self.projection = projection
        self.feature_width = projection.out_features
        self.last = vision.encoder.layers[-1]

    def run_last(self, states: Tensor) -> Tensor:
        return self.last(states, attention_mask=None)

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.projection(self.vision.post_layernorm(tokens))

    def project(self, states: Tensor, part: Projection) -> Tensor:
        attention = self.last.self_attn
        maps = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        return split_heads(maps[part](self.last.layer_norm1(states)), self.heads)

    def finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        states = states + self.last.self_attn.out_proj(mixed)
        return states + self.last.mlp(self.last.layer_norm2(states))


class TransformersSiglipTower(_TransformersTower, ProbeTower):
    """SiglipVisionModel with its head; fixed-resolution SigLIP 2 uses the same class."""

    class_tokens = 0

    def __init__(self, vision: Any) -> None:
        super().__init__(vision)
        self.head = vision.head

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.vision.post_layernorm(tokens)

    def project(self, states: Tensor, part: Projection) -> Tensor:
        return project_joint(self.head.attention, states, part)

    @property
    def probe(self) -> Tensor:
        return self.head.probe

    def finish(self, mixed: Tensor) -> Tensor:
        pooled = self.head.attention.out_proj(mixed)
        return pooled + self.head.mlp(self.head.layernorm(pooled))
