"""Zero-shot video-to-video retrieval: nearest neighbours by the cosine of frozen, pooled features.

Nothing is trained and no text is used, so runs of every method can be compared. A clip's vector is the mean of all its
tokens after the encoder's last norm, which is also what the linear probe reads.

TGM evaluates "zero-shot retrieval" with runs of masked autoencoding alone (section 4.5.1, Table 3), but says neither what
the candidates are nor what counts as found. Two readings are offered (`hit`):

- `class`: the usual protocol on UCF101 and HMDB51. Clips of the test split are queries, clips of the training split are
  candidates, and those with the query's label are correct.
- `clip`: instance retrieval. The first window of each test clip is a query, the second windows of all test clips are
  candidates, and the one of the same clip is correct. With the sampling `tsn` the two windows interleave, which is easy.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stm.config import Augmentation, Run, VideoRetrieval
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.data.sampling import view_windows
from stm.distributed.process import Process
from stm.evaluation.classification.clips import clips_to_test
from stm.evaluation.features import average_vectors, pooled_features
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.results import check_labels, load_checked_encoder, make_evaluation_receipt, write_metrics
from stm.evaluation.retrieval import DEPTHS
from stm.evaluation.retrieval.ranking import rank_right, recall_intervals
from stm.storage.tables import write_table

_log = logging.getLogger(__name__)

RANKS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("rank", pa.float64(), nullable=False),  # of the best correct candidate; infinite if there is none
    ]
)


class Search(NamedTuple):
    """Queries and candidates, and which candidates are correct for which query."""

    clips: NDArray[np.int64]  # [Q], index of each query's clip in the test split
    queries: NDArray[np.float32]  # [Q, D], unit vectors
    candidates: NDArray[np.float32]  # [C, D], unit vectors
    right: Sequence[NDArray[np.int64]]  # correct candidates of each query; may be empty
    left_out: NDArray[np.int64] | None = None  # [Q], the candidate that is the query's own clip


def retrieve_videos(task: VideoRetrieval, run: Run, inputs: EvaluationInputs, process: Process) -> None:
    """Ranks clips for clips; see `stm.evaluation.evaluate`.

    Raises:
        ValueError: `hit` is `class` and the clips have no labels, or it is `clip` and no test clip is long enough for
            two different windows.
    """
    train = None
    if task.hit == "class":
        train = ClipDataset(inputs.train, Geometry.of(run, task), Augmentation(), inputs.seed, False, guides=())
    test = clips_to_test(task, run, inputs.test, inputs.seed, classes=None if train is None else train.classes)
    encoder = load_checked_encoder(inputs.weights, run).to(process.device).eval()
    if train is None:
        shared = shared_frames(test)
        vectors = pooled_features(encoder, run, test, process, "windows")
        search = search_clips(vectors, np.flatnonzero(shared < 1))
        details = {"clips_with_one_window": int((shared == 1).sum()), "shared_frames": float(shared[shared < 1].mean())}
    else:
        check_labels(test, train)
        vectors = pooled_features(encoder, run, test, process, "queries")
        gallery = pooled_features(encoder, run, train, process, "candidates")
        search = search_classes(
            average_vectors(vectors),
            average_vectors(gallery),
            test.index.labels(),
            train.index.labels(),
            task.train_split == task.test_split,
        )
        details = {
            "unlabelled_clips": len(test) - len(search.clips),
            "without_candidate": sum(not len(right) for right in search.right),
        }
    if not process.first:
        return
    ranks = rank_search(search)
    receipt = make_evaluation_receipt(task, run, inputs, test, train)
    columns = {"key": [test.index[number].key for number in search.clips.tolist()], "rank": ranks}
    write_table(inputs.output / "ranks.parquet", pa.table(columns, schema=RANKS_SCHEMA).sort_by("key"), receipt)
    write_metrics(task, inputs, {**neighbour_metrics(search, ranks), **details}, receipt)


def shared_frames(test: ClipDataset) -> NDArray[np.float64]:
    """The share of the first window's frames that the second one contains too, per clip: float64 [clips].

    Clips that are too short have the same window twice, a share of 1.

    Raises:
        ValueError: all clips are too short.
    """
    g = test.geometry
    shares = []
    for number in range(len(test)):
        first, second = view_windows(2, g.frames, g.stride, test.index[number].frames, g.sampling)
        shares.append(float(np.isin(first, second).mean()))
    if min(shares) == 1:
        raise ValueError(
            f"no clip of the test split is long enough for two different windows of {g.frames} frames at stride "
            f"{g.stride}: use `hit: class`, a smaller stride, or store more frames (config: frames.every)"
        )
    if short := shares.count(1):
        _log.warning(f"{short} of {len(shares)} clips are too short for two different windows and are no queries")
    return np.array(shares)


def search_clips(vectors: NDArray[np.float32], clips: NDArray[np.int64]) -> Search:
    """Searches for the second window of a clip with its first one.

    Args:
        vectors: [all clips, 2 x crops, D]; the views of the first window precede those of the second.
        clips: [Q], the clips to search with; the second windows of all clips are candidates.
    """
    crops = vectors.shape[1] // 2
    first, second = average_vectors(vectors[:, :crops]), average_vectors(vectors[:, crops:])
    return Search(clips, first[clips], second, list(clips[:, None]))


def search_classes(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    labels: Sequence[str | None],
    candidate_labels: Sequence[str | None],
    same_split: bool = False,
) -> Search:
    """Searches for clips with the query's label; unlabelled clips (None) are neither queries nor candidates.

    Args:
        queries: [Q, D], unit vectors of all test clips.
        candidates: [C, D], unit vectors of all clips of the candidates' split.
        labels: the label of each test clip.
        candidate_labels: the label of each candidate.
        same_split: whether both are the same clips, in which case a clip is no candidate for itself.
    """
    clips, known = (np.flatnonzero([label is not None for label in split]) for split in (labels, candidate_labels))
    asked = [labels[clip] for clip in clips.tolist()]
    members: defaultdict[str | None, list[int]] = defaultdict(list)
    for place, candidate in enumerate(known.tolist()):
        members[candidate_labels[candidate]].append(place)
    right = [np.array(members[label], dtype=np.int64) for label in asked]
    left_out = None
    if same_split:
        left_out = np.arange(len(clips))
        right = [places[places != own] for own, places in enumerate(right)]
    return Search(clips, queries[clips], candidates[known], right, left_out)


def rank_search(search: Search) -> NDArray[np.float64]:
    """The rank, from 1, of each query's best correct candidate (see `rank_right`), float64 [Q]; infinite without one."""
    ranks = np.full(len(search.queries), np.inf)
    asked = np.array([bool(len(right)) for right in search.right])
    if asked.any():
        right = [places for places in search.right if len(places)]
        left_out = None if search.left_out is None else search.left_out[asked]
        ranks[asked] = rank_right(search.queries[asked], search.candidates, right, left_out)
    return ranks


def neighbour_metrics(search: Search, ranks: NDArray[np.float64]) -> dict[str, Any]:
    """`r1`, `r5`, `r10`, their `confidence95` (Wilson, one trial per query) and `chance`, `queries` and `candidates`."""
    candidates = len(search.candidates) - (search.left_out is not None)
    return {
        **{f"r{depth}": float((ranks <= depth).mean()) for depth in DEPTHS},
        "confidence95": recall_intervals(ranks, len(ranks)),
        "chance": {
            f"r{depth}": float(np.mean([chance_recall(len(right), candidates, depth) for right in search.right]))
            for depth in DEPTHS
        },
        "queries": len(ranks),
        "candidates": candidates,
    }


def chance_recall(right: int, candidates: int, depth: int) -> float:
    """The probability that a random order has one of `right` correct candidates among the first `depth`.

    This is 1 - C(n - m, K) / C(n, K) for m of n candidates (hypergeometric).
    """
    depth = min(depth, candidates)
    return 1 - math.comb(candidates - right, depth) / math.comb(candidates, depth)
