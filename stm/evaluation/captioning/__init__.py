"""Captions that a decoder writes, and how they are scored."""

from stm.config import Captioning
from stm.evaluation.task import Metric, Task

TASKS = (
    Task(
        Captioning,
        "Captions",
        # Papers print the scores times 100. CIDEr is no share: it can be above 1.
        (
            Metric("cider", "CIDEr", unit=""),
            Metric("bleu4", "BLEU-4", unit=""),
            Metric("meteor", "METEOR", unit=""),
            Metric("rouge_l", "ROUGE-L", unit=""),
            Metric("exact", "exact"),
        ),
        "stm.evaluation.captioning.generate:caption",
    ),
)
