"""Text-to-video and video-to-text retrieval: with the dual encoder alone, and re-ranked by the matching head (UMT)."""

from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stm.config import LanguageRun, VideoTextRetrieval
from stm.data.dataset import ClipDataset
from stm.distributed.process import Process
from stm.distributed.shares import join_rows
from stm.evaluation.checkpoint_selection import tune, untrained
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.language_clips import CaptionPairs, encode_clips, load_model, open_clips, over_rows
from stm.evaluation.results import make_evaluation_receipt, write_metrics
from stm.evaluation.retrieval import DEPTHS
from stm.evaluation.retrieval.rerank import Reranked, match_score, rank_scores, rerank, retrieval_metrics
from stm.evaluation.tuning import PairTuning, encode_pairs, make_tuning, text_length, with_texts
from stm.models.video_language import VideoLanguageModel
from stm.storage.tables import write_table

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("keys", pa.list_(pa.string()), nullable=False),  # keys of the correct clips
        pa.field("caption", pa.string(), nullable=False),
        pa.field("rank", pa.float64(), nullable=False),  # rank of the best correct clip with the dual encoder
        pa.field("reranked", pa.float64(), nullable=False),  # the same rank after re-ranking
    ]
)


def retrieve_texts(task: VideoTextRetrieval, run: LanguageRun, inputs: EvaluationInputs, process: Process) -> None:
    """Fine-tunes if the task has `optimisation`, then retrieves in both directions; see `stm.evaluation.evaluate`.

    Every caption of a clip is a query, and any of them is correct for the clip (MSVD). If the benchmark's clips share
    captions, each distinct text is one query, and any of its clips is correct (SSv2). Clips without a caption are
    excluded.
    """
    torch.manual_seed(inputs.seed)
    model = load_model(inputs.weights, run, task, task.drop_path).to(process.device)
    which, discard = untrained(task), None
    if task.trains:
        which, discard = _tune(task, run, model, inputs, process)
    test = open_clips(task, run, inputs.test, inputs.seed, False, task.source)
    pairs = _Pairs(model.eval(), test, task, run, process, inputs.shared_texts)
    reranked = pairs.rerank(model, process)
    if not process.first:
        return
    receipt = make_evaluation_receipt(task, run, inputs, test)
    clips = len(pairs.clips)
    metrics = {
        "dual_encoder": retrieval_metrics(pairs.similarity, pairs.right),
        "reranked": retrieval_metrics(pairs.similarity, pairs.right, reranked),
        "shared_texts": inputs.shared_texts,
        "chance": {f"r{depth}": _chance(pairs.right, clips, depth) for depth in DEPTHS},
        "checkpoint": which,
        "clips_without_caption": len(test) - clips,
    }
    names = [test.index[int(clip)].key for clip in pairs.clips]
    keys = [sorted(names[clip] for clip in own) for own in pairs.right]
    columns = {
        "keys": keys,
        "caption": pairs.texts,
        "rank": rank_scores(pairs.similarity, pairs.right),
        "reranked": rank_scores(pairs.similarity, pairs.right, reranked.text_to_video),
    }
    order = sorted(range(len(keys)), key=keys.__getitem__)
    write_table(
        inputs.output / "predictions.parquet", pa.table(columns, schema=PREDICTIONS_SCHEMA).take(order), receipt
    )
    write_metrics(task, inputs, metrics, receipt)
    if discard is not None:
        discard()


class _Pairs:
    """The encoded clips and captions of a split, and their similarity. The processes share the clips and have all captions.

    Attributes:
        clips: int64 [V], indices of the clips that have captions.
        own: int64 [n], places in `clips` of the process's clips.
        texts: the Q query texts.
        right: the correct clips of each query; see `gather_queries`.
        tokens: int64 [Q, X], tokens of the queries.
        states: float32 [Q, X, W], encoded queries, on the CPU.
        features: [n, L, W], token features of the process's clips, on the CPU; None without clips.
        similarity: float32 [Q, V], cosines.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        dataset: ClipDataset,
        task: VideoTextRetrieval,
        run: LanguageRun,
        process: Process,
        shared: bool,
    ) -> None:
        device = process.device
        self.depth = task.depth
        numbers = [dataset.caption_numbers(clip) for clip in range(len(dataset))]
        self.clips: NDArray[np.int64] = np.array([c for c, own in enumerate(numbers) if own], dtype=np.int64)
        if not len(self.clips):
            raise ValueError(
                f"no clip of {dataset.index.tars[0].parent} has a caption: retrieval needs captions as queries"
            )
        captions = [[dataset.index[c].captions[n] for n in numbers[c]] for c in self.clips.tolist()]
        self.texts, self.right = gather_queries(captions, shared)
        self.tokens = model.language.tokenizer.encode(self.texts, text_length(task, run))
        # Stored for the matching head: re-encoding a text for each of its pairs would dominate the cost of re-ranking.
        self.states = over_rows(model.encode_text, self.tokens, device=device)
        encoded, clips = (
            encode_clips(model, dataset, process, run.workers, task.precision),
            torch.from_numpy(self.clips),
        )
        self.own = torch.isin(clips, encoded.clips).nonzero()[:, 0]
        self.features = encoded.of(clips[self.own]) if len(self.own) else None
        frames = dataset.geometry.frames

        def embed(features: Tensor) -> Tensor:
            return model.embed_frames(features.to(self.states.dtype), frames)

        # The first process's, so that all have the same similarities and short lists.
        texts = process.gather(over_rows(model.embed_text, self.states, device=device))[0]
        videos = None if self.features is None else over_rows(embed, self.features, device=device)
        self.similarity = (texts @ join_rows(process, self.own, videos, len(clips)).T).numpy()

    def rerank(self, model: VideoLanguageModel, process: Process) -> Reranked:
        """The logits of the matching head, which each process computes for its own clips."""
        place = {video: number for number, video in enumerate(self.own.tolist())}

        def score(texts: Tensor, video: int) -> Tensor:
            assert self.features is not None  # for a process without clips nothing is scored
            return match_score(model, self.states, self.tokens, self.features)(texts, place[video])

        return rerank(self.similarity, score, self.depth, process=process, videos=list(place))


def gather_queries(captions: Sequence[Sequence[str]], shared: bool) -> tuple[list[str], list[NDArray[np.int64]]]:
    """The queries of a retrieval, and the correct clips of each.

    Args:
        captions: the captions of each clip (at least one).
        shared: if True, a caption shared by several clips is one query, and each of these clips is correct; if False,
            every caption is a separate query for its own clip.

    Returns:
        Q texts, in order of first occurrence, and the sorted indices of each text's clips.
    """
    pairs = [(text, clip) for clip, own in enumerate(captions) for text in own]
    if not shared:
        return [text for text, _ in pairs], [np.array([clip]) for _, clip in pairs]
    clips: dict[str, list[int]] = {}
    for text, clip in pairs:
        clips.setdefault(text, []).append(clip)
    return list(clips), [np.unique(own) for own in clips.values()]


def _chance(right: Sequence[NDArray[np.int64]], clips: int, depth: int) -> float:
    """Recall of a random ranking: the probability that a correct clip is among `depth` random ones, averaged over queries."""
    depth = min(depth, clips)
    return float(np.mean([1 - comb(clips - len(own), depth) / comb(clips, depth) for own in right]))


def _tune(
    task: VideoTextRetrieval,
    run: LanguageRun,
    model: VideoLanguageModel,
    inputs: EvaluationInputs,
    process: Process,
) -> tuple[dict[str, Any], Callable[[], None]]:
    train = open_clips(task, run, inputs.train, inputs.seed, True, task.source, CaptionPairs)
    plan, batches = make_tuning("retrieval", task, run, inputs, train, process)
    batches = with_texts(batches, encode_pairs(model.language.tokenizer, text_length(task, run)))
    measure = None
    if inputs.validation:
        validation = open_clips(task, run, inputs.validation, inputs.seed, False, task.source)

        def measure(module: nn.Module) -> float:
            """Mean of the dual encoder's R@1, R@5 and R@10 in both directions: re-ranking after each epoch is too slow."""
            pairs = _Pairs(model, validation, task, run, process, inputs.shared_texts)
            metrics = retrieval_metrics(pairs.similarity, pairs.right)
            return float(np.mean([metrics[way][f"r{n}"] for way in ("text_to_video", "video_to_text") for n in DEPTHS]))

    return tune(PairTuning(model, task, inputs.shared_texts, process), batches, plan, inputs.output, process, measure)
