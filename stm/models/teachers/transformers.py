"""transformers' CLIP and SigLIP image towers as teachers, from the hub or a local folder."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from stm.models.teachers.frozen import resize_positions
from stm.models.teachers.tower import ClassTokenTower, LoadedTower, Part, ProbeTower, Tower, project_joint, split_heads
from stm.pretrained.hub import ModelError, ModelSource, explain_missing, find_model, load_complete

# What a folder's config says it is -> what to load of it. A CLIP needs its projection.
CLASSES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
}


def load_transformers(name: str) -> LoadedTower:
    """The image tower of a CLIP or SigLIP, on the CPU, in float32.

    Args:
        name: a hub id or a local folder.

    Raises:
        ModelError: it cannot be had, lacks weights, or is no CLIP and no SigLIP with an image tower.
    """
    source = find_model(name)
    try:
        kind = transformers.AutoConfig.from_pretrained(**source.arguments).model_type
    except (OSError, ValueError, KeyError) as error:
        raise explain_missing(source, error) from error
    if kind not in CLASSES:
        known = ", ".join(CLASSES.values())
        raise ModelError(f"model {name!r} is of the kind {kind!r}; a teacher is one of {known}")
    model = load_complete(getattr(transformers, CLASSES[kind]), source, "float32", torch.device("cpu"))
    mean, deviation = _read_statistics(source)
    identity = source.identify(getattr(model.config, "_commit_hash", None))
    return LoadedTower(make_tower(model, name), identity, mean, deviation)


def make_tower(model: Any, name: str = "teacher.model") -> Tower:
    """A tower around the image half of a model of `CLASSES`, which is taken over; its text half is let go."""
    vision = getattr(model, "vision_model", model)
    if hasattr(model, "visual_projection"):
        return TransformersClipTower(vision, model.visual_projection)
    if getattr(vision, "head", None) is None:
        raise ModelError(f"model {name!r} has neither CLIP's projection nor SigLIP's pooling head")
    return TransformersSiglipTower(vision)


def _read_statistics(source: ModelSource) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation of the pixels, where there is an image processor beside the weights."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(**source.arguments)
    except (OSError, ValueError):
        return None, None
    return tuple(processor.image_mean), tuple(processor.image_std)


def _embed(vision: Any, pixels: Tensor) -> Tensor:
    convolution = vision.embeddings.patch_embedding
    return convolution(pixels.to(convolution.weight.dtype)).flatten(2).transpose(1, 2)


def _resize(vision: Any, cells: int, class_tokens: int) -> None:
    table = vision.embeddings.position_embedding
    table.weight = resize_positions(table.weight, cells, class_tokens)
    table.num_embeddings = len(table.weight)


def _blocks(vision: Any) -> list[Callable[[Tensor], Tensor]]:
    return [partial(layer, attention_mask=None) for layer in vision.encoder.layers]


class TransformersClipTower(ClassTokenTower):
    """CLIPVisionModel and the projection of CLIPModel or CLIPVisionModelWithProjection."""

    def __init__(self, vision: Any, projection: nn.Linear) -> None:
        super().__init__()
        self.vision, self.projection = vision, projection
        self.patch = vision.config.patch_size
        self.heads = vision.config.num_attention_heads
        self.token_width = self.stem_width = vision.config.hidden_size
        self.feature_width = projection.out_features
        self.last = vision.encoder.layers[-1]

    def resize(self, cells: int) -> None:
        _resize(self.vision, cells, class_tokens=1)

    def embed(self, pixels: Tensor) -> Tensor:
        return _embed(self.vision, pixels)

    def enter(self, stem: Tensor) -> Tensor:
        embeddings = self.vision.embeddings
        token = embeddings.class_embedding.to(stem.dtype).expand(len(stem), 1, -1)
        states = torch.cat([token, stem], dim=1) + embeddings.position_embedding.weight.to(stem.dtype)
        return self.vision.pre_layrnorm(states)  # transformers' spelling

    @property
    def blocks(self) -> list[Callable[[Tensor], Tensor]]:
        return _blocks(self.vision)

    @property
    def depth(self) -> int:
        return len(self.vision.encoder.layers)

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.projection(self.vision.post_layernorm(tokens))

    def project(self, states: Tensor, part: Part) -> Tensor:
        attention = self.last.self_attn
        maps = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        return split_heads(maps[part](self.last.layer_norm1(states)), self.heads)

    def finish(self, states: Tensor, mixed: Tensor) -> Tensor:
        states = states + self.last.self_attn.out_proj(mixed)
        return states + self.last.mlp(self.last.layer_norm2(states))


class TransformersSiglipTower(ProbeTower):
    """SiglipVisionModel with its head; SigLIP 2 of fixed size is the same model."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.vision, self.head = vision, vision.head
        self.patch = vision.config.patch_size
        self.heads = vision.config.num_attention_heads
        self.token_width = self.stem_width = self.feature_width = vision.config.hidden_size

    def resize(self, cells: int) -> None:
        _resize(self.vision, cells, class_tokens=0)

    def embed(self, pixels: Tensor) -> Tensor:
        return _embed(self.vision, pixels)

    def enter(self, stem: Tensor) -> Tensor:
        return stem + self.vision.embeddings.position_embedding.weight.to(stem.dtype)

    @property
    def blocks(self) -> list[Callable[[Tensor], Tensor]]:
        return _blocks(self.vision)

    @property
    def depth(self) -> int:
        return len(self.vision.encoder.layers)

    def to_joint(self, tokens: Tensor) -> Tensor:
        return self.vision.post_layernorm(tokens)

    def project(self, states: Tensor, part: Part) -> Tensor:
        return project_joint(self.head.attention, states, part)

    def ask(self) -> Tensor:
        return self.head.probe

    def finish(self, mixed: Tensor) -> Tensor:
        pooled = self.head.attention.out_proj(mixed)
        return pooled + self.head.mlp(self.head.layernorm(pooled))
