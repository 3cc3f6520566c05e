"""Small runs and random batches for the tests of methods."""

from typing import Any

import torch

from stm.config import PretrainRun


def make_run(**changes: Any) -> PretrainRun:
    values: dict[str, Any] = {
        "model": "tiny",
        "image_size": 64,
        "patch_size": 16,
        "frames": 8,
        "mask": {"strategy": "tube", "ratio": 0.75},
    }
    return PretrainRun(**(values | changes))


def draw_guides(run: PretrainRun, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shape = (batch, run.frames // run.tubelet, (run.image_size // run.patch_size) ** 2)
    return {name: torch.rand(shape, generator=generator) for name in ("noise", "similarity", "motion")}


def draw_batch(run: PretrainRun, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    slots, tokens = run.frames // run.tubelet, (run.image_size // run.patch_size) ** 2
    guides = {name: torch.rand(batch, slots, tokens, generator=generator) for name in ("noise", "similarity", "motion")}
    shape = (batch, run.frames, 3, run.image_size, run.image_size)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    # Blocky pictures on top of the noise: the colours of a tubelet differ, and so do their means.
    video = (video // 4 + torch.arange(run.image_size) * 2 % 180).to(torch.uint8)
    return {
        "video": video,
        "guides": guides,
        "key": [f"k{seed}-{i}" for i in range(batch)],
        "label": torch.zeros(batch),
    }
