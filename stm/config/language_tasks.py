"""Evaluation settings for runs with text: retrieval with re-ranking, question answering, multiple choice, captioning."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stm.config.base import Fraction, Name, field
from stm.config.evaluation import FineTuneOptimisation, Parallel, TaskSettings, VideoTask, check_shares
from stm.config.language import PairSettings
from stm.config.training import (
    CHECKPOINTING_TEXT,
    Augmentation,
    Checkpointing,
    Crop,
    Interpolation,
    Run,
    Schedule,
)


class LanguageOptimisation(FineTuneOptimisation):
    """AdamW with warm-up and cosine decay; defaults of UMT's fine-tuning on MSR-VTT retrieval.

    UMT does not scale the learning rates with the batch size there.
    """

    scale_by_batch: bool = field(
        False, "learning rates are for 256 clips and scaled by batch_size / 256; false: used as given"
    )
    epochs: int = field(
        10,
        "passes over the training split; 0: nothing is trained, the run's `release` is fine-tuned and tested as it is",
        "epochs",
        ge=0,
    )
    batch_size: int = field(256, "clips per optimiser step", "clips", ge=1)
    learning_rate: float = field(2e-5, "peak", gt=0, le=10)
    warmup_epochs: float = field(0.0, "length of the linear warm-up", "epochs", ge=0)
    warmup_learning_rate: float = field(0.0, "initial value of the warm-up", ge=0)
    min_learning_rate: float = field(None, "minimum; by default a hundredth of the run's own peak, as in UMT", ge=0)
    schedule: Schedule = field(
        "clamped",
        "`interpolated`: the cosine runs from the peak to the minimum (VideoMAE); `clamped`: from the peak to 0, and neither it "
        "nor the warm-up falls below the minimum (UMT)",
    )
    weight_decay: float = field(0.02, "AdamW's weight decay; not applied to biases and norms", ge=0, le=1)

    @field_validator("min_learning_rate", mode="before")
    @classmethod
    def _follow_peak(cls, value: object, info: ValidationInfo) -> object:
        # Formatted, so that records show 2e-07 and not 2.0000000000000002e-07.
        return float(f"{info.data.get('learning_rate', 0.0) / 100:.12g}") if value is None else value


class LanguageAugmentation(Augmentation):
    """Augmentation for fine-tuning; defaults of UMT's second stage."""

    crop: Crop = field(
        "random_resized", "how training crops are sampled; `whole`: the whole frame, squashed to a square"
    )
    interpolation: Interpolation = field(
        "bicubic",
        "how training and test frames are resized: `bicubic` without antialiasing, as in UMT, or `area`: averaged by area when "
        "shrinking, linear when enlarging",
    )


class _LanguageTask(TaskSettings):
    """Common settings. The checkpoint is selected on the validation split, never on the test split."""

    cache_neutral = frozenset({"runs", "dataset", "gradient_checkpointing"})
    needs = "language"
    # Keys that only scoring reads: they do not change the weights, but which of them the validation split selects.
    scoring_keys: ClassVar[frozenset[str]] = frozenset()
    train_split: Name = "train"
    validation_split: Name | None = field(
        None,
        "the model is evaluated on it after each epoch and the best is used; none: the last one, and the table says so",
    )
    frames: int | None = field(
        None, "frames per clip in training and test; by default as in pretraining", "stored frames", ge=1, le=256
    )
    augmentation: LanguageAugmentation = LanguageAugmentation()
    test_crop: Literal["whole", "center"] = field(
        "whole",
        "part of the frame that the model sees in validation and test: `whole`: all of it, squashed to a square, as in UMT; "
        "`center`: the largest centred square",
    )
    drop_path: Fraction = field(0.1, "stochastic depth of the student: drop rate of its last block")
    max_tokens: int | None = field(
        None, "maximum length of a caption or question; by default as in pretraining", "tokens", ge=4, le=512
    )
    precision: Literal["float32", "bf16"] = "float32"
    parallel: Parallel = field("ddp", "how several `processes` train; as in pretraining")
    gradient_checkpointing: Checkpointing = field("none", CHECKPOINTING_TEXT)

    @model_validator(mode="after")
    def _check_views(self) -> "_LanguageTask":
        if (self.views, self.crops) != (1, 1):
            raise ValueError("`views` and `crops` are not used by tasks with text, which test one view of each clip")
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> "_LanguageTask":
        optimisation = getattr(self, "optimisation", None)
        if optimisation is None or not self.trains:
            return self
        pairs = check_shares(optimisation, self.world_size)
        if self.world_size > 1 and isinstance(self, PairSettings) and pairs % (self.negatives_among or pairs + 1):
            raise ValueError(
                f"negatives_among {self.negatives_among} does not divide the {pairs} pairs of each of the {self.world_size} "
                f"processes in a pass: hard negatives are sampled within a process; set it to {pairs} or a divisor, or use one "
                "process"
            )
        return self

    def protocol_settings(self, run: Run) -> dict[str, object]:
        return {
            "frames": self.frames or run.frames,
            "max_tokens": self.max_tokens or run.text_tokens,
            "test_split": self.test_split,
            "validation_split": self.validation_split,
        }


class VideoTextRetrieval(_LanguageTask, PairSettings):
    """Text-to-video and video-to-text retrieval by the dual encoder, re-ranked by the matching head (UMT's protocol)."""

    benchmark_task = "retrieval"
    scoring_keys = frozenset({"depth"})
    task: Literal["video_text_retrieval"]
    source: Name | None = field(None, "packed caption source of the queries; by default the first")
    optimisation: LanguageOptimisation | None = field(None, "fine-tuning on the training split; none: zero-shot")
    depth: int = field(128, "candidates per query that the matching head re-ranks", "candidates", ge=1)


class QuestionAnswering(_LanguageTask):
    """Open-ended questions: a decoder on top of the fusion layers ranks the answers of a list (UMT).

    The list is the benchmark's own (`answers` of its file in config/datasets); elsewhere, all answers of the training split.
    """

    benchmark_task = "question_answering"
    scoring_keys = frozenset({"depth", "ranking"})
    task: Literal["question_answering"]
    optimisation: LanguageOptimisation = LanguageOptimisation()
    max_tokens: int | None = field(25, "maximum length of a question", "tokens", ge=4, le=512)
    max_answer_tokens: int = field(5, "maximum length of an answer", "tokens", ge=3, le=128)
    depth: int = field(
        128, "answers that are ranked as a whole: those with the most probable first token", "answers", ge=1
    )
    ranking: Literal["sum", "albef"] = field(
        "sum", "`sum`: log-probability of the whole answer; `albef` counts its first token twice, as ALBEF and UMT do"
    )
    answers: int | None = field(
        None, "without a list of the benchmark's own: only the most frequent answers in training; by default all", ge=1
    )

    def splits_for(self, own_answers: bool) -> dict[str, str]:
        # Without a list of the benchmark's own, the training split defines the candidate answers.
        return self.splits if own_answers else {"train": self.train_split, **self.splits}

    def protocol_settings(self, run: Run) -> dict[str, object]:
        return {**super().protocol_settings(run), "max_answer_tokens": self.max_answer_tokens}


class MultipleChoice(_LanguageTask, PairSettings):
    """Multiple-choice questions, scored by the probabilities of matching head and contrast (UMT: weights 0.7 and 0.3)."""

    benchmark_task = "multiple_choice"
    scoring_keys = frozenset({"matching_weight"})
    task: Literal["multiple_choice"]
    source: Name | None = field(None, "packed caption source for training; by default the first")
    optimisation: LanguageOptimisation | None = field(
        None, "fine-tuning on the training split's captions; none: zero-shot"
    )
    matching_weight: Fraction = field(
        0.7,
        "weight of the matching head's probability; the contrast's softmax over the options, of cosine / temperature, has "
        "the remaining weight",
    )


class Captioning(_LanguageTask):
    """Captioning by a decoder on top of the fusion layers with beam search, and the standard metrics."""

    benchmark_task = "captioning"
    scoring_keys = frozenset({"beams", "length_penalty"})
    task: Literal["captioning"]
    source: Name | None = field(None, "packed caption source of the references; by default the first")
    optimisation: LanguageOptimisation = LanguageOptimisation()
    max_caption_tokens: int = field(32, "maximum length of a caption", "tokens", ge=4, le=512)
    beams: int = field(5, "beam search width; 1 is greedy", "beams", ge=1, le=64)
    length_penalty: float = field(1.0, "log-probabilities are divided by the caption's length to this power")

    @model_validator(mode="after")
    def _check_trains(self) -> "Captioning":
        if not self.trains:
            raise ValueError(
                "optimisation.epochs is 0: no release has a caption decoder, so captioning must be trained"
            )
        return self


LanguageTask = VideoTextRetrieval | QuestionAnswering | MultipleChoice | Captioning

EvaluationTask = Annotated[VideoTask | LanguageTask, Field(discriminator="task")]
