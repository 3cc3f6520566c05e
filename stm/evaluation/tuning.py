"""Fine-tuning for evaluations with text: contrast and matching of pairs, and decoders for answers or captions."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

import stm
from stm.config import LanguageOptimisation, LanguageRun, LanguageTask, Objectives, PairSettings
from stm.data.dataset import ClipDataset
from stm.data.loader import Batch
from stm.distributed.gather import count_processes, gather
from stm.distributed.process import Process
from stm.distributed.shares import Share, share_noise
from stm.evaluation.inputs import DIVISION, EvaluationInputs
from stm.methods.video_language import EncodedText, compare_pairs, sample_ids
from stm.models.text.decoder import TextDecoder
from stm.models.text.tokenizer import Tokenizer
from stm.models.video_language import VideoLanguageModel
from stm.objectives.positives import hash_captions
from stm.storage.files import sha256_file
from stm.training.batches import count_steps, feed, hash_shards
from stm.training.loop import TrainingPlan


class Tuning(nn.Module):
    """A model that is fine-tuned.

    With several processes it has the noise and the loss of their joint batch. The exception is the dropout inside a BERT, which
    each process draws for its own rows, independently of the others.
    """

    has_unused_parameters = True  # such as those that predict masked words

    def __init__(self, model: VideoLanguageModel, process: Process | None = None) -> None:
        super().__init__()
        self.share = Share() if process is None else Share(process.rank, process.count)
        share_noise(model, self.share)


class PairTuning(Tuning):
    """Contrast and matching of unmasked clips with captions (UMT's fine-tuning for retrieval)."""

    def __init__(
        self,
        model: VideoLanguageModel,
        settings: PairSettings | None = None,
        shared_texts: bool = False,
        process: Process | None = None,
    ) -> None:
        """
        Args:
            settings: how pairs are compared; None: the defaults.
            shared_texts: if True, clips with equal captions are positives of each other; see `EvaluationInputs`.
            process: one of several; None: the only one.
        """
        super().__init__(model, process)
        self.model = model
        chosen = (settings or PairSettings()).model_dump(include=set(PairSettings.model_fields))
        # UMT fine-tunes without alignment and masked words.
        self.objectives = Objectives(alignment=0, relevance=0, masked_language=0, shared_texts=shared_texts, **chosen)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch with "video" uint8 [B, T, 3, S, S], "tokens" int64 [B, X] and the ids of `sample_ids`."""
        model, video = self.model, batch["video"]
        features = model.encoder(video)
        text = EncodedText(batch["tokens"], model.encode_text(batch["tokens"]))
        clips = model.embed_frames(features, video.shape[1])
        ids = sample_ids(batch, self.objectives.shared_texts)
        losses = compare_pairs(model, clips, features, text, ids, self.objectives, self.share)
        return {"loss": losses["contrastive"] + losses["matching"], **losses}


class AnswerTuning(Tuning):
    """A decoder that answers questions, attending to the question's states fused with the clip (UMT)."""

    def __init__(self, model: VideoLanguageModel, process: Process | None = None) -> None:
        super().__init__(model, process)
        self.model = model
        self.decoder = TextDecoder.of(model.language)

    def encode_questions(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Questions int64 [B, X] and clips [B, L, W] -> the states that the decoder attends to, [B, X, W]."""
        return self.model.fuse(self.model.encode_text(tokens), tokens, features)

    def is_word(self, tokens: Tensor) -> Tensor:
        """Padding mask of questions: int64 [B, X] -> bool [B, X], False for padding."""
        return tokens != self.model.language.pad_id

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch with "video", "tokens" (the questions) and "answers" int64 [B, Y]."""
        tokens = batch["tokens"]
        memory = self.encode_questions(tokens, self.model.encoder(batch["video"]))
        return {"loss": self.decoder(batch["answers"], memory, present=self.is_word(tokens)).mean()}


class CaptionTuning(Tuning):
    """A decoder that generates captions, attending to the clip's tokens.

    UMT does not include captioning. This is our interpretation of ClusterSTM's, whose settings are unknown: the decoder
    is initialised from the fusion layers, which have learned to attend to clips.
    """

    has_unused_parameters = False

    def __init__(self, model: VideoLanguageModel, process: Process | None = None) -> None:
        super().__init__(model, process)
        self.encoder = model.encoder
        self.decoder = TextDecoder.of(model.language)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch with "video" and "tokens" (the captions), averaged over the tokens of all processes."""
        tokens = batch["tokens"]
        losses = self.decoder(tokens, self.encoder(batch["video"]))
        words = gather((tokens[:, 1:] != self.decoder.pad_id).sum()[None]).sum()
        # The mean over processes, which have different numbers of tokens, is that of the joint batch.
        return {"loss": losses.sum() * count_processes() / words.clamp(min=1)}


def make_tuning(
    name: str,
    task: LanguageTask,
    run: LanguageRun,
    inputs: EvaluationInputs,
    train: ClipDataset,
    process: Process,
) -> tuple[TrainingPlan, Callable[[int], Iterator[Batch]]]:
    """The training plan of a fine-tuning run, and its batches.

    Args:
        name: name of the task for the log; the run's name is appended.
        train: the clips of `inputs.train`.
    """
    settings = task.optimisation
    assert isinstance(settings, LanguageOptimisation)
    # What only the test reads does not affect the trained weights. If a validation split selects them, its clips and how they are
    # scored do: after a change the scores of earlier epochs are those of something else, so that training starts again.
    test_only = {"test_split", *DIVISION, *task.cache_neutral, *(() if inputs.validation else task.scoring_keys)}
    origin = {
        "task": task.model_dump(mode="json", exclude=test_only),
        "run": run.model_dump(mode="json", include={"frames", "stride", "sampling", "compile"}),
        "weights": sha256_file(inputs.weights),
        "data": hash_shards(inputs.train),
        "seed": inputs.seed,
        "stm": stm.__version__,
        **_benchmark_facts(inputs),
        # Weights of one's own depend on it; those of a release are the same with another tokenization.
        **({} if run.release is None or run.language is None else {"language": run.language.fingerprint()}),
    }
    plan = TrainingPlan(
        name=f"{name} {inputs.output.parent.name}",
        optimisation=settings,
        steps_per_epoch=count_steps(train, settings),
        seed=inputs.seed,
        origin=origin,
        precision=task.precision,
        compile=run.compile,
        parallel=task.parallel,
        checkpoint_every=run.checkpoint_every,
        checkpoints_kept=run.checkpoints_kept,
        shared_noise=True,
        trackers=inputs.trackers,
    )
    return plan, feed(train, settings, process, inputs.seed, run.workers)


def _benchmark_facts(inputs: EvaluationInputs) -> dict[str, Any]:
    """What the tuned weights, or their choice, depend on beside the config: only what there is."""
    answers = hashlib.sha256("\n".join(inputs.answers).encode()).hexdigest()
    facts = {
        "shared_texts": inputs.shared_texts,
        "answers": answers if inputs.answers else None,
        "validation": hash_shards(inputs.validation),
    }
    return {name: value for name, value in facts.items() if value}


def encode_pairs(tokenizer: Tokenizer, length: int) -> Callable[[Batch], dict[str, Tensor]]:
    """What `with_texts` adds for `PairTuning`: the captions' "tokens", int64 [B, length], and "caption_hash", int64 [B]."""
    return lambda batch: {
        "tokens": tokenizer.encode(batch["caption"], length),
        "caption_hash": hash_captions(batch["caption"]),
    }


def with_texts(
    batches: Callable[[int], Iterator[Batch]], make: Callable[[Batch], dict[str, Tensor]]
) -> Callable[[int], Iterator[Batch]]:
    """Adds to each batch the tensors that `make` returns for it, such as tokens."""

    def stream(step: int) -> Iterator[Batch]:
        for batch in batches(step):
            yield {**batch, **make(batch)}

    return stream


def text_length(task: LanguageTask, run: LanguageRun) -> int:
    """Maximum number of tokens per caption or question."""
    assert run.language is not None
    return task.max_tokens or run.language.max_tokens
