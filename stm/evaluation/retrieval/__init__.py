"""Retrieval: of clips by captions and captions by clips, with TGM's contrastive head or with video-language models, and
of clips by clips, with the frozen features of any run."""

from stm.config import Retrieval, VideoRetrieval, VideoTextRetrieval
from stm.evaluation.task import Metric, Task

DEPTHS = (1, 5, 10)  # K of the reported recalls R@K


def _metrics(part: str = "") -> tuple[Metric, ...]:
    """Recall and rank metrics of both directions, text to video first.

    Args:
        part: prefix of the keys in `metrics.json`, with a trailing dot.
    """
    metrics: list[Metric] = []
    for direction in ("text_to_video", "video_to_text"):
        title, place = direction.replace("_", "-"), f"{part}{direction}"
        for depth in DEPTHS:
            interval = f"{part}confidence95.{direction}.r{depth}"
            chance = f"chance.r{depth}" if direction == "text_to_video" else None
            metrics.append(Metric(f"{place}.r{depth}", f"{title} R@{depth}", interval, chance))
        for rank in ("median_rank", "mean_rank"):
            label = f"{title} {rank.replace('_', ' ')}"
            metrics.append(Metric(f"{place}.{rank}", label, higher_is_better=False, scale=1.0, unit=""))
    return tuple(metrics)


_NEIGHBOURS = tuple(
    Metric(f"r{depth}", f"video-to-video R@{depth}", f"confidence95.r{depth}", f"chance.r{depth}") for depth in DEPTHS
)

TASKS = (
    Task(Retrieval, "Retrieval", _metrics(), "stm.evaluation.retrieval.zero_shot:retrieve"),
    Task(
        VideoTextRetrieval,
        "Retrieval",
        _metrics("reranked.") + _metrics("dual_encoder."),
        "stm.evaluation.retrieval.video_text:retrieve_texts",
    ),
    Task(VideoRetrieval, "Video retrieval", _NEIGHBOURS, "stm.evaluation.retrieval.neighbours:retrieve_videos"),
)
