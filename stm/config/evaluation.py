"""Evaluation settings: linear probe, fine-tuning, zero-shot classification, retrieval, mask quality."""

from typing import ClassVar, Literal

from pydantic import model_validator

from stm.config.base import Fraction, Name, Section, Templates, field
from stm.config.training import Augmentation, CaptionChoice, Crop, Optimisation, Run, Sampling

Parallel = Literal["ddp", "fsdp"]


class TaskSettings(Section):
    """Settings of all evaluations: runs, clips and views.

    The section of a task declares what the rest of the config and the workflow must know about it; what only evaluations
    and reports must know is in its declaration (`stm.evaluation.tasks`).
    """

    cache_neutral = frozenset({"runs", "dataset"})
    # The component that the task requires of a run: TGM's contrastive branch or a text side; None: no requirement.
    needs: ClassVar[Literal["contrast", "language"] | None] = None
    # Whether the results contain per-class accuracies.
    per_class: ClassVar[bool] = False
    # Whether the task encodes additional texts with the dataset's text encoder.
    encodes_text: ClassVar[bool] = False
    # Whether the task compares with the true boxes of the clips' objects, which only moving-shapes has.
    reads_boxes: ClassVar[bool] = False
    # The task's name in the benchmark protocols (`stm.datasets.video_text.protocol`); None: no protocol covers it.
    benchmark_task: ClassVar[str | None] = None
    runs: tuple[Name, ...] | None = field(None, "pretraining runs to evaluate; by default all suitable ones")
    dataset: Name | None = field(None, "which of `datasets` to use; by default the run's own")
    test_split: Name = "test"
    sampling: Sampling | None = field(None, "how frames are sampled from a clip; by default as in pretraining")
    stride: int | None = field(
        None, "`dense`: step between frames; by default as in pretraining", "stored frames", ge=1, le=64
    )
    views: int = field(1, "temporal views per test clip, averaged after softmax", "views", ge=1, le=32)
    crops: Literal[1, 3] = field(1, "square crops per temporal view: the centre, or three along the long side")
    processes: int = field(
        1,
        "processes per node, one per GPU, that share the clips and the batches; the numbers are those of one process up to "
        "rounding (docs/cluster.md)",
        "processes",
        ge=1,
        le=64,
    )
    nodes: int = field(1, "number of machines; more than one only in a Slurm job", "nodes", ge=1, le=1024)

    @property
    def world_size(self) -> int:
        """Total number of processes across all nodes."""
        return self.processes * self.nodes

    @property
    def splits(self) -> dict[str, str]:
        """The names of the splits that the task reads, by use: `train`, `validation` and `test`, if applicable."""
        uses = ("train", "validation", "test") if self.trains else ("test",)
        splits = {use: getattr(self, f"{use}_split", None) for use in uses}
        return {use: split for use, split in splits.items() if split is not None}

    def splits_for(self, own_answers: bool) -> dict[str, str]:
        """`splits` on a benchmark with or without a list of answers of its own."""
        return self.splits

    @property
    def packed_vectors(self) -> CaptionChoice | None:
        """The captions whose packed text vectors the task reads; None: the task reads no text vectors."""
        return None

    @property
    def fine_tunes(self) -> bool:
        """Whether the task tests fine-tuned weights: it trains them, or the run's `release` is fine-tuned (0 epochs)."""
        return getattr(self, "optimisation", None) is not None

    @property
    def trains(self) -> bool:
        """Whether the task itself trains, on its training split."""
        optimisation = getattr(self, "optimisation", None)
        return optimisation is not None and optimisation.epochs > 0

    @property
    def user_files(self) -> tuple[str, ...]:
        """The user's files that the task reads."""
        return ()

    def suits(self, run: Run) -> bool:
        """Whether a run meets the task's requirements."""
        return {None: True, "contrast": run.has_contrast, "language": run.has_text}[self.needs]

    def protocol_settings(self, run: Run) -> dict[str, object]:
        """Return the effective values, for a run, of the keys that are fixed by a benchmark's protocol."""
        return {}


class LinearProbe(TaskSettings):
    """A linear classifier on the frozen backbone's mean-pooled tokens (MAE's recipe: affine-free batch norm)."""

    per_class = True
    task: Literal["linear"]
    train_split: Name = "train"
    epochs: int = field(90, "passes over the cached features", "epochs", ge=1)
    batch_size: int = field(256, "cached features per step", "clips", ge=1)
    learning_rates: tuple[float, ...] = field(
        # MAE's linear probe uses LARS with 0.1 per 256 clips; the TGM paper does not report its values. We use AdamW
        # with the best learning rate of a small grid, selected on a fifth of the training split and never on the test
        # split.
        (1e-3, 3e-3, 1e-2),
        "learning rates to try; the best on held-out training clips is used",
        min_length=1,
    )

    @property
    def trains(self) -> bool:
        return True


class FineTuneOptimisation(Optimisation):
    """AdamW with warm-up and cosine decay; defaults of VideoMAE's fine-tuning."""

    epochs: int = field(
        50,
        "passes over the training split; 0: nothing is trained, the run's `release` is fine-tuned and tested as it is",
        "epochs",
        ge=0,
    )
    learning_rate: float = field(1e-3, "peak for 256 clips; scaled by batch_size / 256", "per 256 clips", gt=0, le=10)
    warmup_epochs: float = field(5.0, "length of the linear warm-up", "epochs", ge=0)
    min_learning_rate: float = field(1e-6, "final value of the cosine decay; scaled likewise", "per 256 clips", ge=0)
    betas: tuple[Fraction, Fraction] = field((0.9, 0.999), "AdamW's betas")


def check_shares(optimisation: Optimisation, processes: int, repeats: int = 1) -> int:
    """Return the clips of a process in a forward pass.

    Raises:
        ValueError: the batch cannot be divided like that.
    """
    parts = optimisation.accumulate * processes * repeats
    if optimisation.batch_size % parts:
        raise ValueError(
            f"batch_size {optimisation.batch_size} is not a multiple of accumulate x processes x repeats = "
            f"{optimisation.accumulate} x {processes} x {repeats}"
        )
    return optimisation.batch_size // parts


class FineTuneAugmentation(Augmentation):
    """Augmentation for fine-tuning; defaults of VideoMAE."""

    crop: Crop = field(
        "random_resized", "how training crops are sampled; `whole`: the whole frame, squashed to a square"
    )
    scale: tuple[Fraction, Fraction] = field(
        (0.08, 1.0), "`random_resized`: range of the crop's share of the frame area"
    )
    auto_augment: str | None = field("rand-m7-n4-mstd0.5-inc1", "timm's RandAugment; sampled once per clip")
    erasing: Fraction = field(0.25, "probability of random erasing: one box in all frames, filled with noise")
    mixup: float = field(0.8, "mixup's alpha; 0: off", ge=0)
    cutmix: float = field(1.0, "cutmix's alpha; 0: off", ge=0)
    mix_probability: Fraction = field(1.0, "probability that a batch is mixed")
    mix_switch: Fraction = field(0.5, "probability of cutmix rather than mixup if both are on")

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed in pairs."""
        return max(self.mixup, self.cutmix) > 0 and self.mix_probability > 0


class FineTune(TaskSettings):
    """End-to-end training on the action labels."""

    cache_neutral = frozenset({"runs", "dataset", "gradient_checkpointing"})
    per_class = True
    task: Literal["finetune"]
    train_split: Name = "train"
    optimisation: FineTuneOptimisation = FineTuneOptimisation()
    classes: str | None = field(
        None,
        "with 0 epochs: a text file with the names of the classifier's classes, one per line, in the order of its logits; by "
        "default the names in the weights, or else the test split's classes in alphabetical order",
    )
    augmentation: FineTuneAugmentation = FineTuneAugmentation()
    layer_decay: float = field(
        0.75, "the learning rate of block i is scaled by layer_decay^(depth + 1 - i)", gt=0, le=1
    )
    drop_path: Fraction = field(0.1, "stochastic depth: drop rate of the last block, rising linearly from 0")
    initial_head: Literal["fresh", "release"] = field(
        "fresh",
        "`fresh`: norm and classifier start from scratch; `release`: from those of the run's `release`, a classifier of more "
        "classes. Its rows are found by the class names in it, or else are the first ones: as in UMT on Kinetics-400, whose "
        "classes are the first of Kinetics-710",
    )
    head_dropout: Fraction = field(0.0, "dropout before the classifier; VideoMAE uses 0.5 for ViT-H and for UCF101")
    label_smoothing: Fraction = field(0.1, "label smoothing")
    repeats: int = field(1, "augmented samples per clip and epoch (repeated augmentation)", "samples", ge=1, le=8)
    precision: Literal["float32", "bf16"] = "float32"
    parallel: Parallel = field("ddp", "how several `processes` train; as in pretraining")
    gradient_checkpointing: Literal["none", "video"] = field(
        "none",
        "`video`: the activations of the student's blocks are computed again in the backward pass, to save memory; the results "
        "are the same",
    )

    @property
    def user_files(self) -> tuple[str, ...]:
        return () if self.classes is None else (self.classes,)

    @model_validator(mode="after")
    def _check_classes(self) -> "FineTune":
        if self.classes is not None and self.trains:
            raise ValueError("`classes` names the classes of a released classifier, which needs optimisation.epochs: 0")
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> "FineTune":
        if not self.trains:
            return self
        clips = check_shares(self.optimisation, self.world_size, self.repeats)
        if self.world_size > 1 and self.augmentation.mixes and clips % 2:
            raise ValueError(
                f"batch_size {self.optimisation.batch_size} gives each process {clips} clips per pass, which must be even: mixup "
                "and cutmix mix pairs of clips, and a pair is in one process"
            )
        return self


class ZeroShot(TaskSettings):
    """Classification by the similarity of clips and label sentences, without training (runs with `contrast`)."""

    needs = "contrast"
    per_class = True
    encodes_text = True
    task: Literal["zero_shot"]
    templates: Templates = field(
        ("a video of {}.",), "sentences with `{}` in place of the label; their vectors are averaged", min_length=1
    )


class Retrieval(TaskSettings):
    """Zero-shot text-to-video and video-to-text retrieval by the contrastive head (runs with `contrast`)."""

    needs = "contrast"
    task: Literal["retrieval"]
    source: Name | None = field(None, "packed caption source of the queries; by default the first")
    count: int = field(1, "query captions per clip, evenly spaced (1: the middle one)", "captions", ge=1)

    @property
    def packed_vectors(self) -> CaptionChoice:
        return CaptionChoice(sources=None if self.source is None else (self.source,), count=self.count)


class VideoRetrieval(TaskSettings):
    """Zero-shot video-to-video retrieval: nearest neighbours by the cosine of the frozen encoder's mean-pooled tokens.

    It needs neither training nor text. TGM (Table 3) reports recalls of a zero-shot retrieval without naming candidates
    or hits; `hit` offers both readings.
    """

    task: Literal["video_retrieval"]
    hit: Literal["class", "clip"] = field(
        "class",
        "what counts as found. `class`: a training clip with the label of the test clip; `clip`: another window of the "
        "same test clip, among one window of every test clip (with `views: 2`: the first is the query, the second the "
        "candidate)",
    )
    train_split: Name = field(
        "train",
        "`class`: split of the candidates, each with one centre view; if it is the test split, a clip does not find itself",
    )

    @property
    def splits(self) -> dict[str, str]:
        return (
            {"train": self.train_split, "test": self.test_split} if self.hit == "class" else {"test": self.test_split}
        )

    @model_validator(mode="after")
    def _check_windows(self) -> "VideoRetrieval":
        if self.hit == "clip" and self.views != 2:
            raise ValueError(f"hit `clip` compares two windows of a clip: set views to 2 instead of {self.views}")
        return self


class MaskPersistence(TaskSettings):
    """How long a run's masks keep the captioned object of generated clips (ClusterSTM, Figure 2); nothing is trained.

    Masks are drawn as in training, for whole frames.
    """

    reads_boxes = True
    task: Literal["mask_persistence"]
    ratio: float | None = field(None, "mask ratio; by default the run's own", gt=0, lt=1)
    frames: int | None = field(None, "frames per clip; by default as in pretraining", "stored frames", ge=2, le=256)

    @model_validator(mode="after")
    def _check_views(self) -> "MaskPersistence":
        if (self.views, self.crops) != (1, 1):
            raise ValueError("`views` and `crops` are not used by mask_persistence, which draws masks of whole frames")
        return self


# The tasks that do not require a run with `language`; all others are `LanguageTask`s. Add a new section to either.
VideoTask = LinearProbe | FineTune | ZeroShot | Retrieval | VideoRetrieval | MaskPersistence


class CropComparison(Section):
    """The comparison of text-guided masks from cached maps with masks from maps that are recomputed on the crop.

    By default it takes the values of `mask_quality` or, without that section, of the dataset's first run with a mask that needs
    similarity; it is not done if there is neither.
    """

    shards: ClassVar[int] = 4  # of the split whose crops are compared, at most
    split: Name = field("train", "split of the compared clips, of at most four of its shards")
    ratio: float = field(0.6, "mask ratio (TGM, Table 6)", gt=0, lt=1)
    crops: int = field(200, "random crops, each of one frame; 0: no comparison", "crops", ge=0)
    crop: Crop = field("multi_scale", "how the crops are sampled")
    scale: tuple[Fraction, Fraction] = field(
        (0.5, 1.0), "`random_resized`: range of the crop's share of the frame area"
    )
    image_size: int = field(224, "side of the crops after resizing", "pixels", ge=32, le=1024)
    patch_size: int = field(16, "side of a token", "pixels", ge=4, le=64)


class MaskQuality(Section):
    """The share of the captioned object's true box that each mask hides; requires a dataset with boxes."""

    split: Name = "test"
    text_ratio: float = field(0.6, "mask ratio of the text-guided mask (TGM, Figure 3a)", gt=0, lt=1)
    motion_ratio: float = field(0.75, "mask ratio of the motion-guided mask (MGM)", gt=0, lt=1)
    crops: int = field(200, "random crops on which cached maps are compared with recomputed ones", "crops", ge=1)
    image_size: int = field(224, "side of these crops after resizing", "pixels", ge=32, le=1024)
    patch_size: int = field(16, "side of a token", "pixels", ge=4, le=64)
