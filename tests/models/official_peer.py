"""VideoMAE's published network as a function of its state dict, in plain torch, and made-up states in its format.

Written from the description of the model (joint attention, fixed positions, mean pooling), with nothing of stm's,
so that files in the official format have something independent to agree with.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

State = Mapping[str, Tensor]


def block_shapes(prefix: str, width: int, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number in range(depth):
        start = f"{prefix}blocks.{number}."
        for norm in ("norm1", "norm2"):
            yield f"{start}{norm}.weight", (width,)
            yield f"{start}{norm}.bias", (width,)
        yield f"{start}attn.q_bias", (width,)
        yield f"{start}attn.v_bias", (width,)
        yield f"{start}attn.qkv.weight", (3 * width, width)
        yield f"{start}attn.proj.weight", (width, width)
        yield f"{start}attn.proj.bias", (width,)
        yield f"{start}mlp.fc1.weight", (4 * width, width)
        yield f"{start}mlp.fc1.bias", (4 * width,)
        yield f"{start}mlp.fc2.weight", (width, 4 * width)
        yield f"{start}mlp.fc2.bias", (width,)


def fill(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights of a sensible size: norms near one, matrices that keep the variance."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "token" not in name:
            noise = noise / torch.Size(shape[1:]).numel() ** 0.5
        else:
            noise = noise * 0.1 + ("norm" in name and name.endswith("weight"))
        state[name] = noise
    return state


def pretraining_state(
    width: int, depth: int, inner: int, inner_depth: int, patch: int, tubelet: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    values = 3 * tubelet * patch**2
    shapes: dict[str, tuple[int, ...]] = {
        "mask_token": (1, 1, inner),
        "encoder.patch_embed.proj.weight": (width, 3, tubelet, patch, patch),
        "encoder.patch_embed.proj.bias": (width,),
        **dict(block_shapes("encoder.", width, depth)),
        "encoder.norm.weight": (width,),
        "encoder.norm.bias": (width,),
        **dict(block_shapes("decoder.", inner, inner_depth)),
        "decoder.norm.weight": (inner,),
        "decoder.norm.bias": (inner,),
        "decoder.head.weight": (values, inner),
        "decoder.head.bias": (values,),
        "encoder_to_decoder.weight": (inner, width),
    }
    return fill(shapes, seed)


def classifier_state(
    width: int, depth: int, classes: int, patch: int, tubelet: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, tubelet, patch, patch),
        "patch_embed.proj.bias": (width,),
        **dict(block_shapes("", width, depth)),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    return fill(shapes, seed)


def sines(positions: int, width: int) -> Tensor:
    """The table [1, positions, width], number by number in float64."""
    place = torch.arange(positions, dtype=torch.float64)[:, None]
    frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.stack([(place * frequency).sin(), (place * frequency).cos()], dim=-1)
    return table.flatten(1)[None].float()


def norm(x: Tensor, state: State, name: str, eps: float = 1e-6) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(x: Tensor, state: State, name: str, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    bias = torch.cat([state[f"{name}.q_bias"], torch.zeros(width, dtype=x.dtype), state[f"{name}.v_bias"]])
    joint = x @ state[f"{name}.qkv.weight"].T + bias
    query, key, value = joint.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = (query @ key.transpose(-1, -2)) * (width // heads) ** -0.5
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
    return mixed @ state[f"{name}.proj.weight"].T + state[f"{name}.proj.bias"]


def transform(x: Tensor, state: State, prefix: str, heads: int) -> Tensor:
    depth = sum(name.startswith(f"{prefix}blocks.") and name.endswith("norm1.weight") for name in state)
    for number in range(depth):
        at = f"{prefix}blocks.{number}"
        x = x + attend(norm(x, state, f"{at}.norm1"), state, f"{at}.attn", heads)
        hidden = functional.linear(
            norm(x, state, f"{at}.norm2"), state[f"{at}.mlp.fc1.weight"], state[f"{at}.mlp.fc1.bias"]
        )
        x = x + functional.linear(functional.gelu(hidden), state[f"{at}.mlp.fc2.weight"], state[f"{at}.mlp.fc2.bias"])
    return x


def embed(clip: Tensor, state: State, prefix: str) -> Tensor:
    """Normalised clip [B, 3, T, S, S] -> tokens with positions [B, L, width]."""
    weight = state[f"{prefix}patch_embed.proj.weight"]
    x = functional.conv3d(clip, weight, state[f"{prefix}patch_embed.proj.bias"], stride=tuple(weight.shape[2:]))
    x = x.flatten(2).transpose(1, 2)
    return x + sines(x.shape[1], x.shape[2]).to(x)


def encode(clip: Tensor, masked: Tensor, state: State, heads: int) -> Tensor:
    """The pretraining encoder: clip and masked bool [B, L] -> features of the visible tokens [B, K, width]."""
    x = embed(clip, state, "encoder.")
    x = torch.stack([row[~hidden] for row, hidden in zip(x, masked, strict=True)])
    return norm(transform(x, state, "encoder.", heads), state, "encoder.norm")


def reconstruct(clip: Tensor, masked: Tensor, state: State, heads: int, inner_heads: int) -> Tensor:
    """Predictions for the masked tokens [B, M, values], in the order of their numbers."""
    x = encode(clip, masked, state, heads) @ state["encoder_to_decoder.weight"].T
    table = sines(masked.shape[1], x.shape[-1]).to(x)[0]
    visible = x + torch.stack([table[~hidden] for hidden in masked])
    blank = state["mask_token"] + torch.stack([table[hidden] for hidden in masked])
    x = transform(torch.cat([visible, blank], dim=1), state, "decoder.", inner_heads)[:, -blank.shape[1] :]
    return functional.linear(norm(x, state, "decoder.norm"), state["decoder.head.weight"], state["decoder.head.bias"])


def classify(clip: Tensor, state: State, heads: int) -> Tensor:
    """Logits [B, classes] of a fine-tuned model."""
    x = transform(embed(clip, state, ""), state, "", heads).mean(1)
    return functional.linear(norm(x, state, "fc_norm"), state["head.weight"], state["head.bias"])
