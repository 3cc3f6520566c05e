"""Captioning: trains a decoder that attends to the clip's tokens, and evaluates its captions with the standard scores."""

from collections.abc import Sequence

import pyarrow as pa
import torch
from torch import Tensor, nn

from stm.config import Captioning, LanguageRun
from stm.data.dataset import ClipDataset
from stm.data.loader import Batch, move
from stm.data.loading_processes import explain_lost_processes
from stm.datasets.video_text.cleaning import clean_text
from stm.distributed.process import Process
from stm.distributed.shares import join_rows
from stm.evaluation.captioning.scores import find_programs, score_captions
from stm.evaluation.checkpoint_selection import tune
from stm.evaluation.inputs import EvaluationInputs
from stm.evaluation.language_clips import CaptionPairs, deal_clips, load_model, make_test_loader, open_clips
from stm.evaluation.results import make_evaluation_receipt, write_metrics
from stm.evaluation.tuning import CaptionTuning, make_tuning, with_texts
from stm.jobs.progress import Progress
from stm.models.text.tokenizer import Tokenizer
from stm.storage.tables import write_table

PREDICTIONS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("references", pa.list_(pa.string()), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("bleu4", "meteor", "rouge_l", "cider")),
    ]
)


def caption(task: Captioning, run: LanguageRun, inputs: EvaluationInputs, process: Process) -> None:
    """Trains encoder and decoder on the training captions, then captions the test split; see `stm.evaluation.evaluate`.

    Raises:
        CaptionScoreError: Java or pycocoevalcap is missing.
    """
    find_programs()  # fail before hours of training rather than after
    torch.manual_seed(inputs.seed)
    model = load_model(inputs.weights, run, task, task.drop_path)
    tokenizer, module = model.language.tokenizer, CaptionTuning(model, process).to(process.device)
    train = open_clips(task, run, inputs.train, inputs.seed, True, task.source, CaptionPairs)
    plan, batches = make_tuning("captions", task, run, inputs, train, process)
    length = task.max_caption_tokens

    def read(batch: Batch) -> dict[str, Tensor]:
        return {"tokens": tokenizer.encode_targets([clean_text(text) for text in batch["caption"]], length)}

    batches = with_texts(batches, read)
    measure = None
    if inputs.validation:
        validation = open_clips(task, run, inputs.validation, inputs.seed, False, task.source)

        def measure(_: nn.Module) -> float:
            """CIDEr, the usual metric for checkpoint selection; computed by the first process, which is the one that chooses."""
            _keys, captions, references = generate_captions(module, tokenizer, validation, task, run, process)
            return score_captions(captions, references).figures["cider"] if process.first else 0.0

    which, discard = tune(module, batches, plan, inputs.output, process, measure)
    test = open_clips(task, run, inputs.test, inputs.seed, False, task.source)
    keys, captions, references = generate_captions(module, tokenizer, test, task, run, process)
    if not process.first:
        return
    scores = score_captions(captions, references)
    receipt = make_evaluation_receipt(task, run, inputs, test, train)
    metrics = {
        **scores.figures,
        "exact": share_exact(captions, references),
        "clips": len(keys),
        "checkpoint": which,
    }
    columns = {"key": keys, "caption": captions, "references": references, **scores.clips}
    write_table(
        inputs.output / "predictions.parquet", pa.table(columns, schema=PREDICTIONS_SCHEMA).sort_by("key"), receipt
    )
    write_metrics(task, inputs, metrics, receipt)
    discard()


def share_exact(generated: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of captions that equal one of their references; references are cleaned as in training (`clean_text`)."""
    correct = [caption in map(clean_text, own) for caption, own in zip(generated, references, strict=True)]
    return sum(correct) / len(correct)


@torch.inference_mode()
def generate_captions(
    module: CaptionTuning,
    tokenizer: Tokenizer,
    dataset: ClipDataset,
    task: Captioning,
    run: LanguageRun,
    process: Process,
) -> tuple[list[str], list[str], list[list[str]]]:
    """Keys, generated captions and references of the clips that have references; the processes share the clips.

    Raises:
        ValueError: no clip has a reference.
    """
    module.eval()
    device, own = process.device, torch.tensor(deal_clips(dataset, process), dtype=torch.int64)
    texts: list[list[int]] = []
    with (
        explain_lost_processes(),
        make_test_loader(dataset, process, run.workers) as loader,
        Progress("captions", len(own), "clips") as progress,
    ):
        for batch in loader.batches():
            with torch.autocast(device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                memory = module.encoder(move(batch, device)["video"])
                texts += module.decoder.generate(memory, task.beams, task.max_caption_tokens, task.length_penalty)
            progress.advance(len(batch["clip"]))
    rows = torch.tensor([[len(text), *text, *[0] * (task.max_caption_tokens - len(text))] for text in texts])
    joined = join_rows(process, own, rows, len(dataset)).tolist()
    generated = [tokenizer.decode(text[:length]) for length, *text in joined]
    chosen = [number for number in range(len(dataset)) if dataset.caption_numbers(number)]
    if not chosen:
        raise ValueError(
            f"no clip of {dataset.index.tars[0].parent} has a caption of the source: there are no references to score against"
        )
    clips = [dataset.index[number] for number in chosen]
    references = [[c.captions[n] for n in dataset.caption_numbers(i)] for i, c in zip(chosen, clips, strict=True)]
    return [clip.key for clip in clips], [generated[number] for number in chosen], references
