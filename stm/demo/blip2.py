"""The demo's small BLIP-2: image tower, Q-Former and a small OPT, trained to caption single frames.

It is a small `Blip2ForConditionalGeneration` (Li et al. 2023, arXiv 2301.12597), so that the caption stage runs the
same code as with the published weights. Like the original, it is initialised with CLIP's trained image tower; unlike
the original, it trains all weights, because the tower is small.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from stm.demo.auxiliary_head import AuxiliaryHead, token_targets
from stm.demo.clip import PATCH_SIZE
from stm.demo.frames import Frame
from stm.demo.optimizer import MuonAdamW
from stm.demo.tokenizer import IMAGE, build_tokenizer, collect_words
from stm.jobs.progress import Progress
from stm.storage.files import read_json, write_json

IMAGE_SIZE = 96  # pixels; 8 x 8 tokens of 12 pixels
QUERY_TOKENS = 8
BATCH_SIZE = 32
IGNORED = -100  # label of positions without a loss (convention of transformers)


def build_processor(captions: Sequence[str]) -> Blip2Processor:
    """The processor: images resized to squares of `IMAGE_SIZE`, pixels in [-1, 1], one token per word of `captions`."""
    images = BlipImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    tokenizer = build_tokenizer(collect_words(captions), add_end=False)
    return Blip2Processor(images, tokenizer, num_query_tokens=QUERY_TOKENS)


def build_config(tokenizer: PreTrainedTokenizerFast, tower: VisionTransformer) -> Blip2Config:
    """The model's config: an image tower with the dimensions of open_clip's `tower`, and other parts of equal width."""
    width, heads = tower.conv1.out_channels, tower.transformer.resblocks[0].attn.num_heads
    vision = {
        "hidden_size": width,
        "intermediate_size": tower.transformer.resblocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": heads,
        "image_size": IMAGE_SIZE,
        "patch_size": tower.patch_size[0],
        "layer_norm_eps": 1e-5,  # as in open_clip
        "initializer_range": 0.02,
    }
    qformer = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": 2 * width,
        "cross_attention_frequency": 1,
        "encoder_hidden_size": width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 16,
    }
    language = {
        "model_type": "opt",
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=QUERY_TOKENS,
        image_token_index=tokenizer.vocab[IMAGE],
    )


def tower_state(tower: VisionTransformer, image_size: int) -> dict[str, Tensor]:
    """The weights of open_clip's `VisionTransformer` (without `ln_pre`), renamed for `Blip2VisionModel`.

    The position embedding is resampled to `image_size`; the projection to CLIP's joint space has no counterpart.
    """
    state = tower.state_dict()
    mapped = {
        "embeddings.class_embedding": state["class_embedding"].view(1, 1, -1),
        "embeddings.patch_embedding.weight": state["conv1.weight"],
        # CLIP's patch embedding has no bias.
        "embeddings.patch_embedding.bias": torch.zeros_like(state["class_embedding"]),
        "embeddings.position_embedding": _resample_positions(
            state["positional_embedding"], image_size // tower.patch_size[0]
        ),
        "post_layernorm.weight": state["ln_post.weight"],
        "post_layernorm.bias": state["ln_post.bias"],
    }
    names = {
        "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.in_proj_": "self_attn.qkv.",
        "attn.out_proj.": "self_attn.projection.", "mlp.c_fc.": "mlp.fc1.", "mlp.c_proj.": "mlp.fc2.",
    }  # fmt: skip
    for index in range(len(tower.transformer.resblocks)):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                source = state[f"transformer.resblocks.{index}.{theirs}{kind}"]
                mapped[f"encoder.layers.{index}.{ours}{kind}"] = source
    return {name: tensor.detach().clone() for name, tensor in mapped.items()}


def _resample_positions(positions: Tensor, side: int) -> Tensor:
    """[1 + n*n, D] -> [1, 1 + side*side, D], bicubic; the class token's embedding is unchanged."""
    old_side = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].T.reshape(1, -1, old_side, old_side)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])[None]


def build_model(
    tokenizer: PreTrainedTokenizerFast, tower: VisionTransformer, seed: int
) -> Blip2ForConditionalGeneration:
    """A model whose image tower has the weights of `tower`; all other weights are random."""
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(build_config(tokenizer, tower))
    # transformers initialises all queries to zero; distinct queries can attend to different parts of the image.
    nn.init.normal_(model.query_tokens, std=0.02)
    model.vision_model.load_state_dict(tower_state(tower, IMAGE_SIZE))
    return model


def encode_captions(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """The token sequences for training: image placeholders, [BOS] and words as in `generate`, then [EOS] and padding.

    Returns:
        input ids, attention mask and labels, each int64 [B, L].
    """
    placeholders = [tokenizer.convert_tokens_to_ids(IMAGE)] * QUERY_TOKENS
    rows = [placeholders + tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in captions]
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).long()
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[:, : QUERY_TOKENS + 1] = IGNORED  # no loss on the placeholders and [BOS]
    return ids, mask, labels


def train_blip2(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, frames: Sequence[Frame], steps: int, seed: int
) -> None:
    """Train `model` in place on frames and their appearance captions."""
    rng = np.random.default_rng([seed, 2])
    images = resize(processor, frames)
    targets = token_targets(frames, IMAGE_SIZE // PATCH_SIZE)
    auxiliary_head = AuxiliaryHead(model.vision_model.post_layernorm.normalized_shape[0])
    optimizer = MuonAdamW((model, auxiliary_head), steps)
    model.train()
    with Progress("demo BLIP-2", steps, "steps") as progress:
        for _ in range(steps):
            batch = rng.choice(len(frames), min(BATCH_SIZE, len(frames)), replace=False)
            pixels, labels = flip(images[batch], targets[batch], rng)
            captions = [frames[i].appearance for i in batch]
            language, auxiliary = losses(model, auxiliary_head, processor, pixels, captions, labels)
            optimizer.step(language + auxiliary)
            progress.advance(note=f"loss {language.item():.3f}, auxiliary {auxiliary.item():.3f}")
    model.eval()


def resize(processor: Blip2Processor, frames: Sequence[Frame]) -> Tensor:
    """All frames, resized by the processor shipped with the model: uint8 [N, 3, S, S]."""
    parts = [
        processor.image_processor(
            [torch.from_numpy(f.pixels).permute(2, 0, 1) for f in frames[start : start + 256]],
            do_rescale=False, do_normalize=False, return_tensors="pt",
        )["pixel_values"].round().clamp(0, 255).to(torch.uint8)
        for start in range(0, len(frames), 256)
    ]  # fmt: skip
    return torch.cat(parts)


def flip(images: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Flip each image together with its targets, horizontally and vertically, each with probability 1/2.

    Args:
        images: uint8 [B, 3, S, S].
        targets: uint8 [B, side, side, attributes].

    Returns:
        float32 [B, 3, S, S] in [-1, 1], and int64 [B, side * side, attributes].
    """
    flips = torch.from_numpy(rng.random((2, len(images), 1, 1, 1)) < 0.5)
    for flipped, axis in zip(flips, (2, 1), strict=True):
        images = torch.where(flipped, images.flip(axis + 1), images)
        targets = torch.where(flipped, targets.flip(axis), targets)
    return images.float().div_(127.5).sub_(1), targets.flatten(1, 2).long()


def losses(
    model: Blip2ForConditionalGeneration, auxiliary_head: AuxiliaryHead, processor: Blip2Processor, pixels: Tensor,
    captions: Sequence[str], targets: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The cross-entropy of the captions' words and [EOS], and the auxiliary loss of the image tokens; two scalars."""
    ids, mask, labels = encode_captions(processor.tokenizer, captions)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(pixel_values=pixels, input_ids=ids, attention_mask=mask)
        auxiliary = auxiliary_head.loss(result.vision_outputs.last_hidden_state[:, 1:], targets)
    logits = result.logits[:, QUERY_TOKENS:-1].float()
    language = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, QUERY_TOKENS + 1 :].flatten(), ignore_index=IGNORED
    )
    return language, auxiliary


def save_blip2(model: Blip2ForConditionalGeneration, processor: Blip2Processor, folder: Path) -> None:
    """Write half-precision weights, config, processor and tokenizer; `from_pretrained` loads the weights as float32."""
    model.generation_config.max_new_tokens = 24
    copy = deepcopy(model).half()
    copy.save_pretrained(folder)
    processor.save_pretrained(folder)
    # transformers loads weights in the config's dtype, and half precision is slow on a CPU.
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "dtype": "float32"})


@torch.no_grad()
def describe_frames(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, frames: Sequence[Frame], batch_size: int = 64
) -> list[str]:
    """Greedy captions, computed through the public API: processor, `generate`, decode."""
    captions: list[str] = []
    for start in range(0, len(frames), batch_size):
        inputs = processor(images=[f.pixels for f in frames[start : start + batch_size]], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        captions += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return captions
