"""Training: the loop, its optimiser and schedule, checkpoints, logs and processes; and pretraining, which
uses them.

Here also is how the demo's small models were made (`demo_*`).
"""

from stm.training.pretraining import pretrain

__all__ = ["pretrain"]
