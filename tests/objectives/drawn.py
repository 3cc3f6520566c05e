"""Random pairs, captions and noise that the tests of losses share."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

PAD, CLS, SEP, MASK, WORDS = 0, 2, 3, 4, 50


def draw_pairs(rows: int, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video, text = normalize(torch.randn(2, rows, width, generator=generator, dtype=torch.float64), dim=2)
    return video, text


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_captions(batch: int, length: int) -> Tensor:
    """[CLS] words [SEP] [PAD] ..., int64 [batch, length]."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, WORDS, (batch, length), generator=generator)
    ends = torch.randint(2, length, (batch, 1), generator=generator)
    places = torch.arange(length)
    tokens = torch.where(places == ends, SEP, torch.where(places > ends, PAD, tokens))
    return torch.where(places == 0, CLS, tokens)
