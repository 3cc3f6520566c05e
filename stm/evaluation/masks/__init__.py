"""Measurements of masks: coverage of true boxes, agreement of cached and computed maps, how long objects stay kept."""

from stm.config import MaskPersistence
from stm.evaluation.task import Metric, Task

TASKS = (
    Task(
        MaskPersistence,
        "Mask persistence",
        (
            Metric("kept_share", "object kept", "confidence95.kept_share", "chance.kept_share"),
            Metric("persistence", "object kept again", "confidence95.persistence", "chance.persistence"),
        ),
        "stm.evaluation.masks.kept_objects:measure_persistence",
    ),
)
