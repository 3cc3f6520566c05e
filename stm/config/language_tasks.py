"""Evaluations of runs with text: retrieval with re-ranking, question answering, multiple choice, captioning."""

from typing import Annotated, Literal

from pydantic import Field

from stm.config.base import Fraction, Name, field
from stm.config.evaluation import FineTune, FineTuneOptimisation, LinearProbe, Retrieval, TaskSettings, ZeroShot
from stm.config.training import Augmentation, Run


class LanguageOptimisation(FineTuneOptimisation):
    """AdamW with warm-up and cosine decay. Defaults: UMT's fine-tuning on MSR-VTT retrieval, whose rates are not scaled."""

    scale_by_batch: bool = field(
        False, "learning rates are for 256 clips and scaled by batch_size / 256; false: taken as they are"
    )
    epochs: int = field(10, "passes over the training split", "epochs", ge=1)
    batch_size: int = field(256, "clips in an optimiser step", "clips", ge=1)
    learning_rate: float = field(2e-5, "the peak", gt=0, le=10)
    warmup_epochs: float = field(0.0, "linear warm-up", "epochs", ge=0)
    warmup_learning_rate: float = field(0.0, "start of the warm-up", ge=0)
    min_learning_rate: float = field(2e-7, "end of the cosine; UMT: a hundredth of the peak", ge=0)
    weight_decay: float = field(0.02, "AdamW's; not applied to biases and norms", ge=0, le=1)


class LanguageAugmentation(Augmentation):
    """Defaults: UMT's second stage."""

    crop: Literal["multi_scale", "random_resized", "center"] = field("random_resized", "how a training crop is drawn")


class _LanguageTask(TaskSettings):
    """What these evaluations have in common. The checkpoint is chosen on the validation split, never on the test split."""

    needs = "language"
    train_split: Name = "train"
    validation_split: Name | None = field(
        None,
        "after each epoch the model is tested on it, and the best is kept; none: the last one, and the table says so",
    )
    frames: int | None = field(
        None, "frames of a clip, in training and test; as in pretraining when not given", "stored frames", ge=1, le=256
    )
    augmentation: LanguageAugmentation = LanguageAugmentation()
    drop_path: Fraction = field(0.1, "stochastic depth of the student")
    max_tokens: int | None = field(
        None, "longest caption or question; as in pretraining when not given", "tokens", ge=4, le=512
    )
    precision: Literal["float32", "bf16"] = "float32"

    def prescribed(self, run: Run) -> dict[str, object]:
        return {
            "frames": self.frames or run.frames,
            "max_tokens": self.max_tokens or run.text_tokens,
            "test_split": self.test_split,
            "validation_split": self.validation_split,
        }


class VideoTextRetrieval(_LanguageTask):
    """Text-to-video and video-to-text retrieval: by the dual encoder, and re-ranked by the matching head (UMT's protocol)."""

    benchmark_task = "retrieval"
    task: Literal["video_text_retrieval"]
    source: Name | None = field(None, "packed caption source of the queries; the first when not given")
    optimisation: LanguageOptimisation | None = field(None, "fine-tuning on the training split; none: zero-shot")
    depth: int = field(128, "candidates of each query that the matching head ranks", "candidates", ge=1)


class QuestionAnswering(_LanguageTask):
    """Open-ended questions: every answer of the training split is ranked by a decoder on top of the fusion layers (UMT)."""

    benchmark_task = "question_answering"
    task: Literal["question_answering"]
    optimisation: LanguageOptimisation = LanguageOptimisation()
    max_tokens: int | None = field(25, "longest question", "tokens", ge=4, le=512)
    max_answer_tokens: int = field(5, "longest answer", "tokens", ge=3, le=128)
    depth: int = field(128, "answers, best by their first word, that are ranked as a whole", "answers", ge=1)
    ranking: Literal["sum", "albef"] = field(
        "sum", "log-probability of the whole answer; `albef` counts its first word twice, as released code does"
    )
    answers: int | None = field(None, "most frequent training answers to choose from; all when not given", ge=1)

    def prescribed(self, run: Run) -> dict[str, object]:
        return {**super().prescribed(run), "max_answer_tokens": self.max_answer_tokens}


class MultipleChoice(_LanguageTask):
    """Which of a question's choices fits the clip, by matching and contrast (UMT: 0.7 and 0.3)."""

    benchmark_task = "multiple_choice"
    task: Literal["multiple_choice"]
    source: Name | None = field(None, "packed caption source that is trained on; the first when not given")
    optimisation: LanguageOptimisation | None = field(
        None, "fine-tuning on the training split's captions; none: zero-shot"
    )
    matching_weight: Fraction = field(0.7, "weight of the matching head's probability; the contrast has the rest")


class Captioning(_LanguageTask):
    """Captions by a decoder on top of the fusion layers, beam search, and the standard scores."""

    benchmark_task = "captioning"
    task: Literal["captioning"]
    source: Name | None = field(None, "packed caption source of the references; the first when not given")
    optimisation: LanguageOptimisation = LanguageOptimisation()
    max_caption_tokens: int = field(32, "longest caption", "tokens", ge=4, le=512)
    beams: int = field(5, "beam search width; 1 is greedy", "beams", ge=1, le=64)
    length_penalty: float = field(1.0, "exponent of the length that a caption's log-probability is divided by")


LanguageTask = VideoTextRetrieval | QuestionAnswering | MultipleChoice | Captioning

EvaluationTask = Annotated[
    LinearProbe
    | FineTune
    | ZeroShot
    | Retrieval
    | VideoTextRetrieval
    | QuestionAnswering
    | MultipleChoice
    | Captioning,
    Field(discriminator="task"),
]
