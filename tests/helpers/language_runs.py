"""Small runs with text, whose teacher is the repository's small CLIP, and batches for them."""

from pathlib import Path

import torch

from stm.config import LanguageRun
from stm.models.text.small_bert import make_bert

WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "moves", "left", "right", "over", "wood", "sand"]
CLIP = "local-dir:stm/assets/demo-clip"
TEACHER = {"model": CLIP, "layers": 2}


def make_small_bert(folder: Path, width: int = 128) -> str:
    """Write a BERT of 3 layers with random weights; return its folder."""
    make_bert(folder, WORDS, width=width, layers=3, heads=4, seed=0)
    return str(folder)


def make_run(method: str, bert: str | None, **changes: object) -> LanguageRun:
    """A run on 4 frames of 64 x 64 pixels, 4 x 4 tokens each."""
    language = {"model": bert, "fusion_layer": 2, "max_tokens": 8, "embedding": 32} if bert else None
    values = {
        "method": method,
        "model": "tiny",
        "image_size": 64,
        "patch_size": 16,
        "frames": 4,
        "decoder_depth": 1,
        "workers": 0,
        "teacher": TEACHER,
        "language": language,
        "optimisation": {
            "epochs": 2,
            "batch_size": 4,
            "warmup_epochs": 1,
            "scale_by_batch": False,
            "learning_rate": 1e-3,
        },
    }
    if bert is None:
        values["objectives"] = {"contrastive": 0, "matching": 0, "masked_language": 0}
    return LanguageRun.model_validate({**values, **changes})


def make_batch(samples: int = 4, frames: int = 4, seed: int = 0) -> dict:
    """Random pixels, noise and captions, and random text vectors of the small CLIP's width."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(samples, 96, generator=generator)
    words = torch.randint(len(WORDS), (samples, 5), generator=generator)
    return {
        "video": torch.randint(0, 256, (samples, frames, 3, 64, 64), generator=generator, dtype=torch.uint8),
        "guides": {"noise": torch.rand(samples, frames, 16, generator=generator)},
        "text": vectors / vectors.norm(dim=1, keepdim=True),
        "clip": torch.arange(samples),
        "caption": [" ".join(WORDS[w] for w in row) for row in words.tolist()],
    }
