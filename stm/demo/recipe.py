"""Hyperparameters of the demo's small models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Amounts of data and training; the defaults produced the shipped assets."""

    clips: int = 6000  # training clips, two frames each
    held_out_clips: int = 300  # clips for the measurement, two frames each
    clip_steps: int = 600  # of 32 frames, 12 crops each
    blip2_steps: int = 8000  # of 32 frames
    seed: int = 0
    threads: int = 2  # torch threads, and rendering processes
