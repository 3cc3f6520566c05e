"""Retrieval of clips by captions and of captions by clips: zero-shot by TGM's contrast, and by the models with text."""

from stm.config import Retrieval, VideoTextRetrieval
from stm.evaluation.task import Metric, Task

DEPTHS = (1, 5, 10)  # of the recalls that are reported


def _metrics(part: str = "") -> tuple[Metric, ...]:
    """Recalls and ranks of both directions, those of text to video first.

    Args:
        part: in which part of `metrics.json` they stand, with a dot behind it.
    """
    found: list[Metric] = []
    for direction in ("text_to_video", "video_to_text"):
        title, place = direction.replace("_", "-"), f"{part}{direction}"
        for depth in DEPTHS:
            interval = f"{part}confidence95.{direction}.r{depth}"
            chance = f"chance.r{depth}" if direction == "text_to_video" else None
            found.append(Metric(f"{place}.r{depth}", f"{title} R@{depth}", interval, chance))
        for rank in ("median_rank", "mean_rank"):
            label = f"{title} {rank.replace('_', ' ')}"
            found.append(Metric(f"{place}.{rank}", label, higher_is_better=False, scale=1.0, unit=""))
    return tuple(found)


TASKS = (
    Task(Retrieval, "Retrieval", _metrics(), "stm.evaluation.retrieval.zero_shot:retrieve"),
    Task(
        VideoTextRetrieval,
        "Retrieval",
        _metrics("reranked.") + _metrics("dual_encoder."),
        "stm.evaluation.retrieval.video_text:retrieve_texts",
    ),
)
