"""Checkpoints in the layout of UMT's second stage, with random weights, and what such a model computes, by formula.

The names are written out; the formulas (float64) use them directly. They agree with the release's own code on the same weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv3d, gelu, layer_norm, log_softmax, normalize

from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

WIDTH, DEPTH, HEADS, PATCH, EMBEDDING = 128, 4, 4, 8, 32
LAYERS, FUSION, POSITIONS = 3, 2, 512  # of the BERT, as in `language_runs.make_small_bert`

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def linear_shapes(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm_shapes(name: str, width: int = WIDTH) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def video_shapes(prefix: str = "vision_encoder.encoder.") -> Shapes:
    shapes: Shapes = {
        f"{prefix}patch_embed.proj.weight": (WIDTH, 3, 1, PATCH, PATCH),
        f"{prefix}patch_embed.proj.bias": (WIDTH,),
    }
    for block in range(DEPTH):
        start = f"{prefix}blocks.{block}"
        shapes |= {f"{start}.attn.q_bias": (WIDTH,), f"{start}.attn.v_bias": (WIDTH,)}
        shapes |= {f"{start}.attn.qkv.weight": (3 * WIDTH, WIDTH)}
        shapes |= linear_shapes(f"{start}.attn.proj", WIDTH, WIDTH)
        shapes |= linear_shapes(f"{start}.mlp.fc1", 4 * WIDTH, WIDTH) | linear_shapes(
            f"{start}.mlp.fc2", WIDTH, 4 * WIDTH
        )
        shapes |= norm_shapes(f"{start}.norm1") | norm_shapes(f"{start}.norm2")
    return shapes | norm_shapes(f"{prefix}norm")


def bert_shapes(prefix: str, vocabulary: int, layers: int, first_crossed: int) -> Shapes:
    shapes: Shapes = {
        f"{prefix}embeddings.position_ids": (1, POSITIONS),
        f"{prefix}embeddings.word_embeddings.weight": (vocabulary, WIDTH),
        f"{prefix}embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        f"{prefix}embeddings.token_type_embeddings.weight": (2, WIDTH),
        **norm_shapes(f"{prefix}embeddings.LayerNorm"),
    }
    for layer in range(layers):
        start = f"{prefix}encoder.layer.{layer}"
        for attention in ("attention", *(["crossattention"] if layer >= first_crossed else [])):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= linear_shapes(f"{start}.{attention}.{part}", WIDTH, WIDTH)
            shapes |= norm_shapes(f"{start}.{attention}.output.LayerNorm")
        shapes |= linear_shapes(f"{start}.intermediate.dense", 4 * WIDTH, WIDTH)
        shapes |= linear_shapes(f"{start}.output.dense", WIDTH, 4 * WIDTH) | norm_shapes(f"{start}.output.LayerNorm")
    return shapes


def word_head_shapes(prefix: str, vocabulary: int) -> Shapes:
    return {
        f"{prefix}cls.predictions.bias": (vocabulary,),
        **linear_shapes(f"{prefix}cls.predictions.transform.dense", WIDTH, WIDTH),
        **norm_shapes(f"{prefix}cls.predictions.transform.LayerNorm"),
        **linear_shapes(f"{prefix}cls.predictions.decoder", vocabulary, WIDTH),
    }


def make_release(kind: str, vocabulary: int, seed: int = 0) -> State:
    """The state dict of a model that is `pretrained`, or fine-tuned for `retrieval` or `questions`."""
    heads = {
        **norm_shapes("vision_encoder.pool_norm"),
        **linear_shapes("vision_proj", EMBEDDING, WIDTH),
        **linear_shapes("text_proj", EMBEDDING, WIDTH),
        **linear_shapes("itm_head", 2, WIDTH),
        "temp": (),
    }
    shapes = video_shapes()
    if kind == "pretrained":
        shapes |= bert_shapes("text_encoder.bert.", vocabulary, LAYERS, FUSION)
        shapes |= word_head_shapes("text_encoder.", vocabulary) | heads
        for decoder in range(2):
            shapes |= linear_shapes(f"vision_encoder.clip_decoder.{decoder}.head", 16, WIDTH)
            shapes |= norm_shapes(f"vision_encoder.clip_decoder.{decoder}.norm", 16)
        shapes |= {"clip_teacher.class_embedding": (16,), "clip_teacher.conv1.weight": (16, 3, 1, PATCH, PATCH)}
    else:
        shapes |= bert_shapes("text_encoder.", vocabulary, LAYERS, FUSION)
        if kind == "retrieval":
            shapes |= heads
        else:
            shapes |= bert_shapes("text_decoder.bert.", vocabulary, LAYERS - FUSION, 0)
            shapes |= word_head_shapes("text_decoder.", vocabulary)
    return fill(shapes, seed)


def fill(shapes: Shapes, seed: int) -> State:
    """Random weights, large enough for texts and clips to differ; position numbers and tied tensors as in BERT."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        scale = 0.4 if "crossattention" in name or name.startswith("itm_head") else 0.12
        state[name] = torch.randn(shape, generator=generator) * scale
        if "norm" in name.lower() and name.endswith("weight"):
            state[name] += 1
        if name == "temp":
            state[name] = torch.tensor(0.05)
        if name.endswith("position_ids"):
            state[name] = torch.arange(POSITIONS)[None]
    for name in state:
        if name.endswith("predictions.decoder.weight"):
            bert = name.replace("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
            state[name] = state[bert].clone()
        if name.endswith("predictions.decoder.bias"):
            state[name] = state[name.replace("decoder.bias", "bias")].clone()
    return state


# ---------------------------------------------------------------------------------------------------- formulas


class Formulas:
    """What a model with this state dict computes, in float64."""

    def __init__(self, state: State) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        # A BertForMaskedLM has its layers below "bert.", a BertModel at the root.
        nested = any(name.startswith("text_encoder.bert.") for name in state)
        self.bert = "text_encoder.bert." if nested else "text_encoder."

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def video(self, clips: Tensor, prefix: str = "vision_encoder.encoder.", last_norm: bool = True) -> Tensor:
        """Clips uint8 [B, T, 3, S, S] -> features of all tokens [B, L, W]."""
        mean, deviation = (torch.tensor(values).double()[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((clips.double() / 255 - mean) / deviation).transpose(1, 2)
        kernel = self.state[f"{prefix}patch_embed.proj.weight"]
        x = conv3d(pixels, kernel, self.state[f"{prefix}patch_embed.proj.bias"], stride=kernel.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        x = x + sine_table(x.shape[1])
        for block in range(DEPTH):
            start = f"{prefix}blocks.{block}"
            query, key, value = (self.norm(x, f"{start}.norm1", 1e-6) @ self.state[f"{start}.attn.qkv.weight"].T).chunk(
                3, -1
            )
            query, value = query + self.state[f"{start}.attn.q_bias"], value + self.state[f"{start}.attn.v_bias"]
            x = x + self.linear(attend(query, key, value), f"{start}.attn.proj")
            inner = gelu(self.linear(self.norm(x, f"{start}.norm2", 1e-6), f"{start}.mlp.fc1"))
            x = x + self.linear(inner, f"{start}.mlp.fc2")
        return self.norm(x, f"{prefix}norm", 1e-6) if last_norm else x

    def embed(self, tokens: Tensor, prefix: str) -> Tensor:
        start = f"{prefix}embeddings."
        x = self.state[f"{start}word_embeddings.weight"][tokens]
        x = x + self.state[f"{start}position_embeddings.weight"][: tokens.shape[1]]
        x = x + self.state[f"{start}token_type_embeddings.weight"][0]
        return self.norm(x, f"{start}LayerNorm", 1e-12)

    def layer(self, x: Tensor, name: str, mask: Tensor, memory: Tensor | None, memory_mask: Tensor | None) -> Tensor:
        """One BERT layer; masks [B, ..., keys] are True for what may be attended to."""
        pairs = [("attention", None, mask)] + ([("crossattention", memory, memory_mask)] if memory is not None else [])
        for part, other, seen in pairs:
            start, source = f"{name}.{part}", x if other is None else other
            query = self.linear(x, f"{start}.self.query")
            key, value = (self.linear(source, f"{start}.self.{kind}") for kind in ("key", "value"))
            out = self.linear(attend(query, key, value, seen), f"{start}.output.dense")
            x = self.norm(x + out, f"{start}.output.LayerNorm", 1e-12)
        out = self.linear(gelu(self.linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense")
        return self.norm(x + out, f"{name}.output.LayerNorm", 1e-12)

    def text(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, X], 0 for padding -> states [B, X, W] after the text layers."""
        x = self.embed(tokens, self.bert)
        for layer in range(FUSION):
            x = self.layer(x, f"{self.bert}encoder.layer.{layer}", (tokens != 0)[:, None, None], None, None)
        return x

    def fuse(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Tokens [B, X] and clip features [B, L, W] -> fused states [B, X, W]."""
        x = self.text(tokens)
        for layer in range(FUSION, LAYERS):
            x = self.layer(x, f"{self.bert}encoder.layer.{layer}", (tokens != 0)[:, None, None], memory, None)
        return x

    def similarity(self, features: Tensor, frames: int, tokens: Tensor) -> Tensor:
        """Mean over the frames of the cosines, [clips, texts]."""
        pooled = self.norm(features.unflatten(1, (frames, -1)).mean(2), "vision_encoder.pool_norm", 1e-6)
        clips = normalize(self.linear(pooled, "vision_proj"), dim=-1)
        texts = normalize(self.linear(self.text(tokens)[:, 0], "text_proj"), dim=-1)
        return (clips @ texts.T).mean(1)

    def match(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The match logits of all pairs, [clips, texts, 2]."""
        rows = [self.linear(self.fuse(tokens, f.expand(len(tokens), -1, -1))[:, 0], "itm_head") for f in features]
        return torch.stack(rows)

    def answer_scores(self, questions: Tensor, features: Tensor, answers: Tensor) -> Tensor:
        """Log-probabilities of answers, the first token counted twice; questions [Q, X], answers [A, Y] -> [Q, A]."""
        memory = self.fuse(questions, features)
        scores = []
        for states, words in zip(memory, questions != 0, strict=True):
            x = self.embed(answers[:, :-1], "text_decoder.bert.")
            causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
            for layer in range(LAYERS - FUSION):
                name = f"text_decoder.bert.encoder.layer.{layer}"
                x = self.layer(x, name, causal, states.expand(len(x), -1, -1), words)
            x = gelu(self.linear(x, "text_decoder.cls.predictions.transform.dense"))
            x = self.norm(x, "text_decoder.cls.predictions.transform.LayerNorm", 1e-12)
            found = log_softmax(self.linear(x, "text_decoder.cls.predictions.decoder"), -1)
            found = found.gather(2, answers[:, 1:, None])[..., 0] * (answers[:, 1:] != 0)
            scores.append(found.sum(1) + found[:, 0])
        return torch.stack(scores)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None = None) -> Tensor:
    """Multi-head attention, [B, X, W] and [B, Y, W] -> [B, X, W]."""
    split = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    q, k, v = split
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def sine_table(tokens: int) -> Tensor:
    """Row p, column j: the sine (cosine for odd j) of p / 10000^(2 floor(j / 2) / W)."""
    rows = [
        [(math.sin, math.cos)[j % 2](p / 10000 ** (2 * (j // 2) / WIDTH)) for j in range(WIDTH)] for p in range(tokens)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def rank_of(scores: Sequence[float], right: int) -> int:
    """The rank, from 1, of the right candidate."""
    return 1 + sum(score > scores[right] for score in scores)
