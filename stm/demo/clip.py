"""The demo's small CLIP, trained on crops at every scale, so that single patches of an object match its caption.

CLIP (Radford et al. 2021, arXiv 2103.00020) learns from whole images and their captions. The similarity stage applies it to
single patches (TGM, section 3.3), to which a model of this size would not generalise. The model is therefore also
trained on patches: texts are contrasted with patches of the object that they name, of other objects, and of the
background.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from stm.demo.auxiliary_head import AuxiliaryHead, named_targets
from stm.demo.crops import BACKDROP, DISTRACTOR, EDGE, PART, WHOLE, match, sample_crops
from stm.demo.frames import Frame, all_texts, sample_background_text, sample_object_text
from stm.demo.optimizer import MuonAdamW
from stm.demo.tokenizer import build_tokenizer, collect_words, save_tokenizer
from stm.jobs.progress import Progress
from stm.storage.files import write_bytes, write_json

IMAGE_SIZE, PATCH_SIZE = 48, 12  # pixels
WIDTH, LAYERS, HEADS, TEXT_LAYERS, EMBEDDING = 128, 4, 4, 2, 96
CONTEXT = 24  # tokens; the longest generated caption has 16 words
FRAMES_PER_STEP = 32  # 12 crops and 2 texts each
WORD_DROPOUT = 0.03  # fraction of words replaced by [UNK], so that captions with unknown words still work
MAX_SCALE = 100.0  # CLIP's upper bound on the inverse temperature


def write_config(folder: Path) -> None:
    """Write the tokenizer and `open_clip_config.json`, the files that open_clip needs in addition to the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(collect_words(all_texts()), add_end=True)
    save_tokenizer(tokenizer, folder)
    vision = {
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "width": WIDTH, "layers": LAYERS,
        "head_width": WIDTH // HEADS, "no_ln_pre": True,  # BLIP-2's image tower (initialised from this) has none
    }  # fmt: skip
    text = {
        "context_length": CONTEXT, "vocab_size": len(tokenizer), "width": WIDTH, "heads": HEADS, "layers": TEXT_LAYERS,
        "hf_tokenizer_name": "local", "pool_type": "eos", "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }  # fmt: skip
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    model = {"embed_dim": EMBEDDING, "vision_cfg": vision, "text_cfg": text}
    write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": preprocess})


def build_clip(folder: Path, seed: int) -> tuple[open_clip.CLIP, Callable[..., Tensor]]:
    """An untrained model and its tokenizer, from the config in `folder`."""
    torch.manual_seed(seed)
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    return open_clip.CLIP(**config["model_cfg"]), open_clip.get_tokenizer(f"local-dir:{folder}")


def save_clip(model: open_clip.CLIP, folder: Path) -> None:
    """Write the weights in half precision; open_clip loads them as float32."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(folder / "open_clip_model.safetensors", save(state))


def normalise(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# ------------------------------------------------------------------------------------------------------------ losses


def choose_text(similarity: Tensor, matches: Tensor) -> Tensor:
    """Image-to-text loss: per crop, cross-entropy over texts with possibly several positives. [C, texts] -> scalar."""
    every = similarity.masked_fill(matches < 0, -torch.inf).logsumexp(1)  # ambiguous pairs are excluded
    positives = similarity.masked_fill(matches != 1, -torch.inf).logsumexp(1)
    return (every - positives)[(matches == 1).any(1)].mean()


def choose_crop(similarity: Tensor, matches: Tensor) -> Tensor:
    """Text-to-image loss: for each text, every positive crop against all negative crops. [C, texts] -> scalar."""
    # Positives do not compete with each other, because both a scene and a patch may show the object.
    negatives = similarity.masked_fill(matches != 0, -torch.inf).logsumexp(0, keepdim=True)
    return functional.softplus(negatives - similarity)[matches == 1].mean()


def rank_in_frame(similarity: Tensor, kinds: Tensor, same_frame: Tensor) -> Tensor:
    """Ranking loss per object text: named object above distractors above background; a scalar.

    Args:
        similarity: [C, B], crops by object texts.
        kinds: [C], the kinds of the crops.
        same_frame: bool [C, B], whether a crop is from the frame of a text.

    A patch with only a sliver of the object (EDGE) counts as the object, because masking it hides part of the object.
    """
    backdrop = (kinds == BACKDROP)[:, None].expand_as(
        similarity
    )  # from every frame in the batch, because none shows an object
    distractor = (kinds == DISTRACTOR)[:, None] & same_frame
    named = ((kinds == PART) | (kinds == EDGE) | (kinds == WHOLE))[:, None] & same_frame
    below_named = similarity.masked_fill(~(backdrop | distractor), -torch.inf).logsumexp(0, keepdim=True)
    below_distractor = similarity.masked_fill(~backdrop, -torch.inf).logsumexp(0, keepdim=True)
    first = functional.softplus(below_named - similarity)[named].mean()
    second = functional.softplus(below_distractor - similarity)[distractor]
    return first + 0.5 * second.sum() / max(len(second), 1)


# ---------------------------------------------------------------------------------------------------------- training


def train_clip(
    model: open_clip.CLIP, tokenize: Callable[..., Tensor], frames: Sequence[Frame], steps: int, seed: int
) -> None:
    """Train `model` in place, with bfloat16 autocast."""
    rng = np.random.default_rng([seed, 1])
    auxiliary_head = AuxiliaryHead(EMBEDDING)
    optimizer = MuonAdamW((model, auxiliary_head), steps)
    model.train()
    with Progress("demo CLIP", steps, "steps") as progress:
        for _ in range(steps):
            batch = [frames[i] for i in rng.choice(len(frames), min(FRAMES_PER_STEP, len(frames)), replace=False)]
            contrast, auxiliary = clip_losses(model, auxiliary_head, tokenize, batch, rng)
            optimizer.step(contrast + auxiliary)
            with torch.no_grad():
                model.logit_scale.clamp_(0, float(np.log(MAX_SCALE)))
            progress.advance(note=f"loss {contrast.item():.3f}, auxiliary {auxiliary.item():.3f}")
    model.eval()


def clip_losses(
    model: open_clip.CLIP,
    auxiliary_head: AuxiliaryHead,
    tokenize: Callable[..., Tensor],
    frames: Sequence[Frame],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """The contrastive loss of crops and texts, and the auxiliary loss of the crops of whole objects; two scalars."""
    crops = sample_crops(frames, IMAGE_SIZE, rng)
    pairs = [sample_object_text(f, rng) for f in frames] + [sample_background_text(f, rng) for f in frames]
    tokens = _drop_words(tokenize([text for text, _ in pairs]), rng)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = model.encode_image(normalise(crops.pixels)), model.encode_text(tokens)
    image, text = image.float(), text.float()
    kinds, owner = torch.from_numpy(crops.kinds), torch.from_numpy(crops.frames)
    whole = kinds == WHOLE
    auxiliary = auxiliary_head.loss(image[None, whole], named_targets(frames)[None, owner[whole]])
    similarity = model.logit_scale.exp() * functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
    matches = torch.from_numpy(match(crops, frames, [meaning for _, meaning in pairs]))
    same_frame = owner[:, None] == torch.arange(len(frames))
    ranking = rank_in_frame(similarity[:, : len(frames)], kinds, same_frame)
    return choose_text(similarity, matches) + choose_crop(similarity, matches) + ranking, auxiliary


def _drop_words(tokens: Tensor, rng: np.random.Generator) -> Tensor:
    """Replace a random few words with [UNK]; special tokens are unchanged."""
    unknown, first_word, end = 1, 4, int(tokens.max())  # ids assigned by build_tokenizer
    word = (tokens >= first_word) & (tokens < end)
    dropped = torch.from_numpy(rng.random(tokens.shape) < WORD_DROPOUT)
    return tokens.masked_fill(word & dropped, unknown)
