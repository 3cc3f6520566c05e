"""What the tests of video and language share: small BERTs on disk, captions, clips."""

from pathlib import Path
from typing import Any

import torch
from model_parts import disturb
from torch import Tensor
from transformers import BertForMaskedLM

from stm.config import Language
from stm.models.text.small_bert import make_bert
from stm.models.vit import Architecture

WORDS = ["a red square moves left", "two-tone circle", "over the grass, slowly"]
TEXTS = ["A red square moves left over the grass", "circle", "two-tone circle slowly moves", "a zebra"]
LAYERS, FUSION, WIDTH = 5, 3, 48

CLIPS = Architecture(32, 8, 1, 4, width=WIDTH, depth=2, heads=3, decoder_width=0, decoder_depth=0, decoder_heads=0)


def write_bert(folder: Path, **sizes: Any) -> BertForMaskedLM:
    """A BERT with weights far from their initial 0 and 1, written to `folder`; also itself, in eval mode."""
    make_bert(folder, WORDS, **{"width": WIDTH, "layers": LAYERS, "heads": 4, **sizes})
    model = BertForMaskedLM.from_pretrained(folder)
    disturb(model).save_pretrained(folder)
    return model.eval()


def ask(folder: Path, **values: Any) -> Language:
    return Language(**{"model": str(folder), "fusion_layer": FUSION, "max_tokens": 12, "embedding": 16, **values})


def look(batch: int, tokens: int = 7, width: int = WIDTH) -> Tensor:
    """What an encoder might see, float64 [B, K, W]."""
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
