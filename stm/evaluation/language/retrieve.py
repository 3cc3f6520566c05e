"""Text-to-video and video-to-text retrieval: by the dual encoder alone, and re-ranked by the matching head (UMT)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stm.config import LanguageRun, VideoTextRetrieval
from stm.data.dataset import ClipDataset
from stm.evaluation.language import Splits
from stm.evaluation.language.clips import Spoken, encode_clips, load_model, open_clips, over_rows
from stm.evaluation.language.selection import tune
from stm.evaluation.language.tuning import PairTuning, make_tuning, text_length, with_texts
from stm.evaluation.rerank import match_score, rank_scores, rerank, retrieval_figures
from stm.evaluation.results import make_evaluation_receipt
from stm.files import write_json, write_table
from stm.models.video_language import VideoLanguageModel
from stm.training.distributed import Process, choose_device

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("rank", pa.float64(), nullable=False),  # of the clip, when the caption asks, by the dual encoder
        pa.field("reranked", pa.float64(), nullable=False),  # after re-ranking
    ]
)


def retrieve_texts(
    task: VideoTextRetrieval,
    run: LanguageRun,
    weights: Path,
    splits: Splits,
    output: Path,
    seed: int,
    device: str | None = None,
) -> None:
    """Fine-tunes if wanted, then ranks clips for captions and captions for clips; see `evaluate_language`.

    Every caption of a clip asks, and any of them is right for it; clips without a caption take no part.
    """
    process = Process(0, 1, choose_device(device))
    torch.manual_seed(seed)
    model = load_model(weights, run, task, task.drop_path).to(process.device)
    which, discard = {"chosen": "pretrained"}, None
    if task.optimisation is not None:
        which, discard = _tune(task, run, model, weights, splits, output, seed, process)
    test = open_clips(task, run, splits.test, seed, False, task.source)
    pairs = _Pairs(model.eval(), test, task, run, process.device)
    reranked = rerank(pairs.similarity, match_score(model, pairs.states, pairs.tokens, pairs.seen), task.depth)
    receipt = make_evaluation_receipt(task, run, weights, seed, test)
    clips = len(pairs.clips)
    metrics = {
        "task": task.task,
        "dual_encoder": retrieval_figures(pairs.similarity, pairs.right),
        "reranked": retrieval_figures(pairs.similarity, pairs.right, reranked),
        "chance": {f"r{depth}": min(1.0, depth / clips) for depth in (1, 5, 10)},
        "checkpoint": which,
        "clips_without_caption": len(test) - clips,
        "settings": task.deciding(),
        "receipt": receipt,
    }
    columns = {
        "key": [test.index[int(pairs.clips[owner])].key for owner in pairs.owners],
        "caption": pairs.captions,
        "rank": rank_scores(pairs.similarity, pairs.right),
        "reranked": rank_scores(pairs.similarity, pairs.right, reranked.text_to_video),
    }
    write_table(output / "predictions.parquet", pa.table(columns, schema=PREDICTIONS_SCHEMA).sort_by("key"), receipt)
    write_json(output / "metrics.json", metrics)
    if discard is not None:
        discard()


class _Pairs:
    """A split's clips and captions, encoded, and how alike they are.

    Attributes:
        clips: int64 [V], numbers of the clips that have captions; owners: int64 [Q], for each caption the place of its
        clip among them; similarity: float32 [Q, V]; right: for each caption the one clip that is right.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        dataset: ClipDataset,
        task: VideoTextRetrieval,
        run: LanguageRun,
        device: torch.device,
    ) -> None:
        numbers = [dataset.caption_numbers(clip) for clip in range(len(dataset))]
        self.clips: NDArray[np.int64] = np.array([c for c, own in enumerate(numbers) if own], dtype=np.int64)
        if not len(self.clips):
            raise ValueError(
                f"no clip of {dataset.index.tars[0].parent} has a caption: retrieval has nothing to ask with"
            )
        self.captions = [dataset.index[c].captions[n] for c in self.clips.tolist() for n in numbers[c]]
        self.owners = np.repeat(np.arange(len(self.clips)), [len(numbers[c]) for c in self.clips.tolist()])
        self.right = [np.array([owner]) for owner in self.owners]
        self.tokens = model.language.tokenizer.encode(self.captions, text_length(task, run))
        self.states = over_rows(model.encode_text, self.tokens, device=device)
        self.seen = encode_clips(model, dataset, device, run.workers, task.precision)[torch.from_numpy(self.clips)]
        frames = dataset.geometry.frames

        def embed(seen: Tensor) -> Tensor:
            return model.embed_frames(seen.to(self.states.dtype), frames)

        texts = over_rows(model.embed_text, self.states, device=device)
        self.similarity = (texts @ over_rows(embed, self.seen, device=device).T).numpy()


def _tune(
    task: VideoTextRetrieval,
    run: LanguageRun,
    model: VideoLanguageModel,
    weights: Path,
    splits: Splits,
    output: Path,
    seed: int,
    process: Process,
) -> tuple[dict[str, Any], Callable[[], None]]:
    train = open_clips(task, run, splits.train, seed, True, task.source, Spoken)
    length, language = text_length(task, run), model.language
    plan, batches = make_tuning(
        f"retrieval {output.parent.name}", task, run, weights, train, splits.train, seed, process
    )
    told = with_texts(batches, lambda batch: {"tokens": language.tokenizer.encode(batch["caption"], length)})
    measure = None
    if splits.validation:
        held = open_clips(task, run, splits.validation, seed, False, task.source)

        def measure(module: nn.Module) -> float:
            """Mean of R@1, R@5 and R@10, both directions, by the dual encoder: re-ranking each epoch costs too much."""
            pairs = _Pairs(model, held, task, run, process.device)
            figures = retrieval_figures(pairs.similarity, pairs.right)
            return float(
                np.mean([figures[way][f"r{n}"] for way in ("text_to_video", "video_to_text") for n in (1, 5, 10)])
            )

    return tune(PairTuning(model), told, plan, output, process, measure)
