"""Zero-shot retrieval with the contrastive head: clips for captions, and captions for clips.

Captions are represented by the packed text vectors, and clips by the head's embedding of all their tokens. As usual,
only its own clip is correct for a caption, and only its own captions are correct for a clip. Generated captions can be
identical, in which case even a perfect model cannot identify the correct clip. The metrics therefore also contain the
number of clips that share a caption, and the recalls if each of these counts as correct (`same_text`).
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.config import Retrieval, Run
from stm.distributed.process import Process
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import average_vectors
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.results import make_evaluation_receipt, write_metrics
from stm.evaluation.retrieval import DEPTHS
from stm.evaluation.retrieval.embed import check_encoder, check_width, embed_clips, load_checked_embedder
from stm.evaluation.retrieval.queries import Queries, collect_queries, first_source
from stm.evaluation.retrieval.ranking import rank_right, recall_intervals, recall_metrics
from stm.storage.tables import write_table
from stm.training.batches import read_text_model

_log = logging.getLogger(__name__)

RANKS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("rank", pa.float64(), nullable=False),  # rank of the clip, with the caption as query
        pa.field("caption_rank", pa.float64(), nullable=False),  # rank of the clip's best caption, clip as query
    ]
)


def retrieve(task: Retrieval, run: Run, inputs: EvaluationInputs, process: Process) -> None:
    """Ranks clips for captions and captions for clips; see `stm.evaluation.evaluate`.

    Clips without a caption from the source are excluded, both as queries and as candidates.
    """
    test = clips_to_test(task, run, inputs.test, inputs.seed)
    embedder = load_checked_embedder(inputs.weights, run)
    source = task.source or first_source(test.index)
    queries, captioned = collect_queries(test.index, source, task.count)
    check_width(embedder, queries.vectors.shape[1], f"{test.index.tars[0].parent}: its captions' vectors have")
    check_encoder(
        embedder, read_text_model(inputs.test), f"{test.index.tars[0].parent}: its captions' vectors come from"
    )
    vectors = average_vectors(embed_clips(embedder, run, test, process))[captioned]
    if not process.first:
        return
    ranks = rank_queries(queries, vectors)
    receipt = make_evaluation_receipt(task, run, inputs, test)
    metrics = {
        **ranks.metrics,
        "source": source,
        "clips_without_caption": len(test) - len(captioned),
    }
    keys = [test.index[int(number)].key for number in captioned]
    columns = {
        "key": [keys[clip] for clip in queries.clips.tolist()],
        "caption": queries.captions,
        "rank": ranks.clip_ranks,
        "caption_rank": ranks.caption_ranks[queries.clips],
    }
    write_table(inputs.output / "ranks.parquet", pa.table(columns, schema=RANKS_SCHEMA).sort_by("key"), receipt)
    write_metrics(task, inputs, metrics, receipt)


@dataclass(frozen=True)
class Ranks:
    """The ranks and metrics of a retrieval."""

    clip_ranks: NDArray[np.float64]  # [Q], rank of each caption's clip
    caption_ranks: NDArray[np.float64]  # [clips], rank of each clip's best caption
    metrics: dict[str, Any]


def rank_queries(queries: Queries, clips: NDArray[np.float32]) -> Ranks:
    """Ranks of the correct clips and captions, and the metrics of both directions.

    Args:
        queries: the captions.
        clips: [clips, D], unit vectors of the captioned clips.

    Returns:
        The ranks, and `text_to_video`, `video_to_text` (see `recall_metrics`), `confidence95` of their recalls,
        `queries`, `clips`, `chance` (of text to video), and `same_text`: the number of `clips` that share a caption
        with another clip, and the recalls if all clips with a text are correct for it.
    """
    texts = queries.vectors
    clip_ranks = rank_right(texts, clips, queries.own_clip())
    caption_ranks = rank_right(clips, texts, queries.own_captions())
    sharing = queries.clips_of_text()
    shared = {clip for clips_of_one in sharing if len(clips_of_one) > 1 for clip in clips_of_one.tolist()}
    metrics = {
        "text_to_video": recall_metrics(clip_ranks),
        "video_to_text": recall_metrics(caption_ranks),
        "confidence95": {
            "text_to_video": recall_intervals(clip_ranks, len(clips)),
            "video_to_text": recall_intervals(caption_ranks, len(clips)),
        },
        "queries": len(texts),
        "clips": len(clips),
        "chance": {f"r{depth}": min(1.0, depth / len(clips)) for depth in DEPTHS},
        "same_text": {
            "clips": len(shared),
            "text_to_video": recall_metrics(rank_right(texts, clips, sharing)),
            "video_to_text": recall_metrics(rank_right(clips, texts, queries.captions_of_texts())),
        },
    }
    if shared:
        _log.info(f"retrieval: {len(shared)} of {len(clips)} clips share a caption with another; see `same_text`")
    return Ranks(clip_ranks, caption_ranks, metrics)
