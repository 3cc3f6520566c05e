"""Multiple choice: selects the text that belongs to the clip, by matching and contrast (UMT, MSRVTT-MC)."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stm.config import LanguageRun, MultipleChoice
from stm.data.dataset import ClipDataset
from stm.distributed.process import Process
from stm.distributed.shares import join_rows
from stm.evaluation.checkpoint_selection import tune, untrained
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.language_clips import CaptionPairs, encode_clips, load_model, open_clips
from stm.evaluation.metrics import top_accuracy, top_shares, wilson_interval
from stm.evaluation.results import make_evaluation_receipt, write_metrics
from stm.evaluation.tuning import PairTuning, encode_pairs, make_tuning, text_length, with_texts
from stm.models.video_language import VideoLanguageModel
from stm.storage.tables import write_table

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("choice", pa.string(), nullable=False),
        pa.field("right", pa.string(), nullable=False),
        pa.field("correct", pa.float64(), nullable=False),  # 1, 0, or a probability if choices tie; see `top_shares`
    ]
)


def choose(task: MultipleChoice, run: LanguageRun, inputs: EvaluationInputs, process: Process) -> None:
    """Fine-tunes on captions if the task has `optimisation`, then answers questions; see `stm.evaluation.evaluate`."""
    torch.manual_seed(inputs.seed)
    model = load_model(inputs.weights, run, task, task.drop_path).to(process.device)
    which, discard = untrained(task), None
    scorer = _Scorer(model, task, run, process)
    if task.trains:
        train = open_clips(task, run, inputs.train, inputs.seed, True, task.source, CaptionPairs)
        plan, batches = make_tuning("multiple choice", task, run, inputs, train, process)
        batches = with_texts(batches, encode_pairs(model.language.tokenizer, text_length(task, run)))
        measure = None
        if inputs.validation:
            validation = open_clips(task, run, inputs.validation, inputs.seed, False)

            def measure(_: nn.Module) -> float:
                scores, right, _rows = scorer.score(validation)
                return float(multiple_choice_metrics(scores, right)["accuracy"])

        which, discard = tune(
            PairTuning(model, task, inputs.shared_texts, process), batches, plan, inputs.output, process, measure
        )
    test = open_clips(task, run, inputs.test, inputs.seed, False)
    scores, right, rows = scorer.score(test)
    if not process.first:
        return
    receipt = make_evaluation_receipt(task, run, inputs, test)
    metrics = {
        **multiple_choice_metrics(scores, right),
        "checkpoint": which,
    }
    chosen = scores.argmax(dim=1).tolist()
    shares = top_shares(scores.cpu().numpy(), right, 1).tolist()
    table = [
        {"key": key, "choice": choices[number], "right": choices[answer], "correct": share}
        for (key, choices), number, answer, share in zip(rows, chosen, right.tolist(), shares, strict=True)
    ]
    write_table(inputs.output / "predictions.parquet", pa.Table.from_pylist(table, schema=PREDICTIONS_SCHEMA), receipt)
    write_metrics(task, inputs, metrics, receipt)
    if discard is not None:
        discard()


class _Scorer:
    """Scores the choices of every question of a split."""

    def __init__(self, model: VideoLanguageModel, task: MultipleChoice, run: LanguageRun, process: Process) -> None:
        self.model = model
        self.task = task
        self.run = run
        self.process = process

    @torch.inference_mode()
    def score(self, dataset: ClipDataset) -> tuple[Tensor, np.ndarray, list[tuple[str, tuple[str, ...]]]]:
        """Scores float32 [Q, A], the indices of the correct choices [Q], and each question's clip key and choices.

        The processes share the questions by clip.

        Raises:
            ValueError: no question has choices, or the numbers of choices differ.
        """
        model = self.model.eval()
        questions = [
            (number, question)
            for number in range(len(dataset))
            for question in dataset.index[number].questions
            if question.choices
        ]
        sizes = sorted({len(question.choices) for _, question in questions})
        if len(sizes) != 1:
            what = f"questions with {sizes} choices" if sizes else "no question with choices"
            raise ValueError(
                f"{dataset.index.tars[0].parent} has {what}; all must have the same number (annotations: `choices`)"
            )
        length, weight = text_length(self.task, self.run), self.task.matching_weight
        device = self.process.device
        encoded = encode_clips(model, dataset, self.process, self.run.workers, self.task.precision)
        own = set(encoded.clips.tolist())
        asked = [place for place, (number, _) in enumerate(questions) if number in own]
        parts = []
        for number, question in map(questions.__getitem__, asked):
            tokens = model.language.tokenizer.encode(list(question.choices), length).to(device)
            states = model.encode_text(tokens)
            clip = encoded.of(torch.tensor([number])).to(device).float()
            similarity = model.embed_text(states) @ model.embed_frames(clip, dataset.geometry.frames).T
            logits = model.match(states, tokens, clip)
            parts.append(choice_scores(similarity.T, logits[None], model.temperature, weight, 1 - weight).cpu())
        right = np.array([question.choices.index(question.answer) for _, question in questions])
        rows = torch.cat(parts) if parts else None
        scores = join_rows(self.process, torch.tensor(asked, dtype=torch.int64), rows, len(questions))
        return scores, right, [(dataset.index[number].key, tuple(q.choices)) for number, q in questions]


MATCH_WEIGHT, SIMILARITY_WEIGHT = 0.7, 0.3  # as in UMT's release


def choice_scores(
    similarity: Tensor,
    match: Tensor,
    temperature: float | Tensor,
    match_weight: float = MATCH_WEIGHT,
    similarity_weight: float = SIMILARITY_WEIGHT,
) -> Tensor:
    """Scores of the texts of each clip: `match_weight` x probability of a match + `similarity_weight` x softmax over the
    texts of cosine / temperature.

    Args:
        similarity: float [B, A], cosine of each clip with its A texts, not divided by a temperature.
        match: float [B, A, 2], the matching head's logits of the same pairs; index 1 is a match.
        temperature: the model's learned temperature.
        match_weight, similarity_weight: the defaults are UMT's.

    Returns:
        Float32 [B, A].

    Raises:
        ValueError: the shapes do not match.
    """
    if match.shape != (*similarity.shape, 2) or similarity.dim() != 2:
        raise ValueError(f"similarity {tuple(similarity.shape)} must be [B, A], match {tuple(match.shape)} [B, A, 2]")
    probability = match.float().softmax(dim=-1)[..., 1]
    contrast = (similarity.float() / temperature).softmax(dim=1)
    return match_weight * probability + similarity_weight * contrast


def multiple_choice_metrics(scores: Tensor, right: NDArray) -> dict[str, Any]:
    """Accuracy of choosing the text with the highest score.

    Args:
        scores: float [B, A], finite.
        right: int [B], the index of the correct text of each clip.

    Returns:
        `accuracy` (a tie counts as the probability that the correct text comes first in a random order),
        `confidence95` (Wilson interval), `questions`, and `chance`.

    Raises:
        ValueError: a score is not finite, or an index is out of range.
    """
    if not bool(scores.isfinite().all()):
        raise ValueError("the scores are not all finite: were the weights trained to the end?")
    if right.shape != scores.shape[:1] or ((right < 0) | (right >= scores.shape[1])).any():
        raise ValueError(f"the correct texts must be {len(scores)} numbers from 0 to {scores.shape[1] - 1}")
    accuracy = top_accuracy(scores.cpu().numpy(), right, 1)
    return {
        "accuracy": accuracy,
        "confidence95": list(wilson_interval(accuracy * len(right), len(right))),
        "questions": len(right),
        "chance": 1 / scores.shape[1],
    }
