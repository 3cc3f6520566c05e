"""Hyperparameters of the demo's small models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Amounts of data and training; the shipped assets were produced with the defaults."""

    clips: int = 6000  # training clips, two frames each
    held_out_clips: int = 300  # evaluation clips, two frames each
    clip_steps: int = 600  # steps of 32 frames with 12 crops each
    blip2_steps: int = 8000  # steps of 32 frames
    seed: int = 0
    threads: int = 2  # number of torch threads and of rendering processes
