"""Evaluations of pretrained weights."""

from typing import ClassVar, Literal

from pydantic import model_validator

from stm.config.base import Fraction, Name, Section, Templates, field
from stm.config.training import Augmentation, CaptionChoice, Optimisation, Run, Sampling


class TaskSettings(Section):
    """What all evaluations say: for which runs, on which clips, in which views.

    What the rest of a config and the workflow must know of a task is said here, by its section; what only evaluations and
    reports must know, by its declaration (`stm.evaluation.tasks`).
    """

    cache_neutral = frozenset({"runs", "dataset"})
    # What a run must have to be evaluated so: TGM's contrastive branch, or a text side. None: every run can be.
    needs: ClassVar[Literal["contrast", "language"] | None] = None
    # Whether its results hold an accuracy per class.
    per_class: ClassVar[bool] = False
    # Whether it encodes texts of its own with the dataset's text encoder.
    encodes_text: ClassVar[bool] = False
    # What the protocols of benchmarks call it (`stm.datasets.video_text.protocol`); None: none prescribes it.
    benchmark_task: ClassVar[str | None] = None
    runs: tuple[Name, ...] | None = field(None, "pretraining runs that are evaluated so; all when not given")
    dataset: Name | None = field(None, "which of `datasets` it uses; the run's own when not given")
    test_split: Name = "test"
    sampling: Sampling | None = field(None, "how a clip's frames are taken; as in pretraining when not given")
    stride: int | None = field(
        None, "step between frames, `dense`; as in pretraining when not given", "stored frames", ge=1, le=64
    )
    views: int = field(1, "temporal views of a test clip, averaged after softmax", "views", ge=1, le=32)
    crops: Literal[1, 3] = field(1, "square crops of each temporal view: the centre, or three along the long side")

    @property
    def splits(self) -> dict[str, str]:
        """The names of the splits that it reads, by their use: those of `train`, `validation` and `test` that it names."""
        named = {use: getattr(self, f"{use}_split", None) for use in ("train", "validation", "test")}
        return {use: split for use, split in named.items() if split is not None}

    @property
    def packed_vectors(self) -> CaptionChoice | None:
        """The captions whose packed text vectors it reads; None: it reads none."""
        return None

    @property
    def fine_tunes(self) -> bool:
        """Whether the run's weights are trained further."""
        return getattr(self, "optimisation", None) is not None

    def suits(self, run: Run) -> bool:
        """Whether a run has what the task needs."""
        return {None: True, "contrast": run.has_contrast, "language": run.has_text}[self.needs]

    def prescribed(self, run: Run) -> dict[str, object]:
        """The values, for a run, of the keys that a benchmark's protocol prescribes."""
        return {}


class LinearProbe(TaskSettings):
    """Linear classifier on the frozen backbone's mean-pooled tokens (MAE's recipe: affine-free batch norm)."""

    per_class = True
    task: Literal["linear"]
    train_split: Name = "train"
    epochs: int = field(90, "passes over the cached features", "epochs", ge=1)
    batch_size: int = field(256, "features a step", "clips", ge=1)
    learning_rates: tuple[float, ...] = field(
        # MAE's linear probe uses LARS with 0.1 per 256; the paper of TGM does not say. Ours: AdamW, best of a small
        # grid chosen on a fifth of the training split, never on the test split.
        (1e-3, 3e-3, 1e-2),
        "tried; the best on held-out training clips is used",
        min_length=1,
    )


class FineTuneOptimisation(Optimisation):
    """AdamW with warm-up and cosine decay. Defaults: VideoMAE's fine-tuning."""

    epochs: int = field(50, "passes over the training split", "epochs", ge=0)
    learning_rate: float = field(1e-3, "for 256 clips; scaled by batch_size / 256", "per 256 clips", gt=0, le=10)
    warmup_epochs: float = field(5.0, "linear warm-up", "epochs", ge=0)
    min_learning_rate: float = field(1e-6, "end of the cosine, scaled alike", "per 256 clips", ge=0)
    betas: tuple[Fraction, Fraction] = field((0.9, 0.999), "AdamW's")


class FineTuneAugmentation(Augmentation):
    """Augmentation of fine-tuning. Defaults: VideoMAE's."""

    crop: Literal["multi_scale", "random_resized", "center"] = field("random_resized", "how a training crop is drawn")
    scale: tuple[Fraction, Fraction] = field((0.08, 1.0), "`random_resized`: share of the frame's area")
    auto_augment: str | None = field("rand-m7-n4-mstd0.5-inc1", "timm's RandAugment; one draw a clip")
    erasing: Fraction = field(0.25, "probability of random erasing, of the same box in all frames, with noise")
    mixup: float = field(0.8, "mixup's alpha; 0: none", ge=0)
    cutmix: float = field(1.0, "cutmix's alpha; 0: none", ge=0)
    mix_probability: Fraction = field(1.0, "probability that a batch is mixed")
    mix_switch: Fraction = field(0.5, "probability of cutmix where both are on")


class FineTune(TaskSettings):
    """End-to-end training on the action labels."""

    per_class = True
    task: Literal["finetune"]
    train_split: Name = "train"
    optimisation: FineTuneOptimisation = FineTuneOptimisation()
    augmentation: FineTuneAugmentation = FineTuneAugmentation()
    layer_decay: float = field(0.75, "learning rate of block i is scaled by layer_decay^(depth + 1 - i)", gt=0, le=1)
    drop_path: Fraction = field(0.1, "stochastic depth")
    head_dropout: Fraction = field(0.0, "dropout before the classifier; VideoMAE: 0.5 for H and for UCF101")
    label_smoothing: Fraction = field(0.1, "label smoothing")
    repeats: int = field(1, "augmented samples of each clip a visit (repeated augmentation)", "samples", ge=1, le=8)
    precision: Literal["float32", "bf16"] = "float32"

    @model_validator(mode="after")
    def _pairs(self) -> "FineTune":
        if self.optimisation.batch_size % self.repeats:
            raise ValueError(f"batch_size {self.optimisation.batch_size} is not a multiple of repeats {self.repeats}")
        return self


class ZeroShot(TaskSettings):
    """Classification by the likeness of a clip and its label's sentence, without training (runs with `contrast`)."""

    needs = "contrast"
    per_class = True
    encodes_text = True
    task: Literal["zero_shot"]
    templates: Templates = field(
        ("a video of {}.",), "sentences with the label for {}; their vectors are averaged", min_length=1
    )


class Retrieval(TaskSettings):
    """Zero-shot text-to-video and video-to-text retrieval by the contrastive head (runs with `contrast`)."""

    needs = "contrast"
    task: Literal["retrieval"]
    source: Name | None = field(None, "packed caption source of the queries; the first when not given")
    count: int = field(1, "captions of each clip that ask, evenly spread (1: the middle one)", "captions", ge=1)

    @property
    def packed_vectors(self) -> CaptionChoice:
        return CaptionChoice(sources=None if self.source is None else (self.source,), count=self.count)


class MaskQuality(Section):
    """Share of the named object's true box that each mask hides; needs a dataset with boxes."""

    split: Name = "test"
    text_ratio: float = field(0.6, "ratio of the text-guided mask (TGM, Table 6)", gt=0, lt=1)
    motion_ratio: float = field(0.75, "ratio of the motion-guided mask (MGM)", gt=0, lt=1)
    crops: int = field(200, "random crops on which cached maps are held against maps computed anew", "crops", ge=1)
    image_size: int = field(224, "side of those crops after resizing", "pixels", ge=32, le=1024)
    patch_size: int = field(16, "side of a token", "pixels", ge=4, le=64)
