"""Vectors of texts by CLIP's text tower: one way, for the similarity maps and for the text stage."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from stm.pretrained.clip import Clip

TEXT_BATCH = 64  # texts a forward pass; beside the image tower the text tower costs next to nothing


@torch.inference_mode()
def embed_texts(clip: Clip, texts: Sequence[str], batch_size: int = TEXT_BATCH) -> np.ndarray:
    """Projected embeddings of texts at [EOS], of length 1: float32 [K, D].

    A text longer than the model's context is cut there, by the model's tokenizer. The last batch is filled up with
    empty texts to a full one, or to the next multiple of TEXT_BATCH: sums can differ in the last bit with the number
    of rows, so that few numbers of rows occur.
    """
    found = []
    unit = min(batch_size, TEXT_BATCH)
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        padded = part + [""] * (min(batch_size, -(-len(part) // unit) * unit) - len(part))
        features = clip.model.encode_text(clip.tokenizer(padded).to(clip.device))
        found.append(functional.normalize(features.float(), dim=-1)[: len(part)].cpu().numpy())
    return np.concatenate(found)
