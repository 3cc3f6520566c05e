"""Captioning: a decoder generates captions, which are scored against reference captions."""

from stm.config import Captioning
from stm.evaluation.task import Metric, Task

TASKS = (
    Task(
        Captioning,
        "Captions",
        # Papers report the scores multiplied by 100. They are not percentages: CIDEr can exceed 100.
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
