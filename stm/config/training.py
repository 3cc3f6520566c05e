"""Pretraining runs: model, mask, objectives, optimisation. Runs with text are in language.py."""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from stm.config.base import Fraction, Name, Section, field
from stm.config.strategies import find_strategy, user_file


class Mask(Section):
    """The tokens that are hidden from the student."""

    strategy: str = field(
        "tube",
        "a strategy of stm/masking or of an installed package, or `path/to/file.py:name` for one in a file of your own",
    )
    ratio: float = field(0.9, "mask ratio: int(ratio x tokens per slot) tokens are hidden in each slot", gt=0, lt=1)

    @field_validator("strategy")
    @classmethod
    def _check_strategy(cls, strategy: str) -> str:
        find_strategy(strategy)  # raises for an unknown strategy now, rather than after a day of preprocessing
        return strategy


Schedule = Literal["interpolated", "clamped"]


class Optimisation(Section):
    """AdamW with warm-up and cosine decay; defaults of VideoMAE's pretraining."""

    scale_by_batch: bool = field(
        True, "learning rates are for 256 clips and scaled by batch_size / 256; false: used as given (UMT stage 2)"
    )
    epochs: int = field(200, "passes over the training split; 0 saves the initial weights", "epochs", ge=0)
    batch_size: int = field(512, "clips x repeats per optimiser step, over all processes and passes", "samples", ge=1)
    accumulate: int = field(1, "forward passes per optimiser step", "passes", ge=1)
    learning_rate: float = field(1.5e-4, "peak for 256 clips; scaled by batch_size / 256", "per 256 clips", gt=0, le=10)
    warmup_epochs: float = field(40.0, "length of the linear warm-up", "epochs", ge=0)
    # VideoMAE's scripts pass 1e-6 as `--warmup_lr`, but its code ignores it and starts at 0.
    warmup_learning_rate: float = field(0.0, "initial value of the warm-up; scaled likewise", "per 256 clips", ge=0)
    min_learning_rate: float = field(1e-5, "final value of the cosine decay; scaled likewise", "per 256 clips", ge=0)
    schedule: Schedule = field(
        "interpolated",
        "`interpolated`: the cosine runs from the peak to the minimum (VideoMAE); `clamped`: from the peak to 0, and neither it "
        "nor the warm-up falls below the minimum (UMT)",
    )
    weight_decay: float = field(0.05, "AdamW's weight decay; not applied to biases and norms", ge=0, le=1)
    betas: tuple[Fraction, Fraction] = field((0.9, 0.95), "AdamW's betas")
    clip_grad: float | None = field(None, "maximum gradient norm; none: no clipping", gt=0)

    @model_validator(mode="after")
    def _check_warmup(self) -> "Optimisation":
        if 0 < self.epochs < self.warmup_epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs}; lower it too")
        return self


Crop = Literal["multi_scale", "random_resized", "center", "whole"]
Interpolation = Literal["area", "bicubic"]


class Augmentation(Section):
    """Augmentation of training clips: crop and flip apply to pixels and guides alike, all else to pixels only."""

    crop: Crop = field("multi_scale", "how training crops are sampled; `whole`: the whole frame, squashed to a square")
    interpolation: Interpolation = field(
        "area",
        "how crops are resized: `area`: averaged by area when shrinking, linear when enlarging; `bicubic`: without "
        "antialiasing, as torchvision does with tensors (UMT). The frames of the task's test clips are resized likewise",
    )
    scale: tuple[Fraction, Fraction] = field(
        (0.5, 1.0), "`random_resized`: range of the crop's share of the frame area"
    )
    flip: bool = field(
        True, "flip half of the clips horizontally; turn it off for labels that distinguish left from right"
    )
    auto_augment: str | None = field(None, "timm's RandAugment, such as rand-m7-n4-mstd0.5-inc1; sampled once per clip")
    erasing: Fraction = field(0.0, "probability of random erasing: one box in all frames, filled with noise")

    @property
    def after_resizing(self) -> tuple[str, ...]:
        """The enabled keys that change pixels after resizing."""
        enabled = {"auto_augment": self.auto_augment is not None, "erasing": self.erasing > 0}
        return tuple(key for key, value in enabled.items() if value)


Sampling = Literal["dense", "tsn", "sparse", "intervals"]
SAMPLING_TEXT = (
    "`dense`: frames `stride` apart from a random start; `tsn`: one per segment, the views of a test beginning with each "
    "segment's first frame; `sparse`: the same with views inside the segments, as UMT's classifiers on Kinetics; `intervals`: "
    "as UMT on videos with texts, which in training never samples the last frame of a segment (for `frames.every: 1`)"
)
ModelSize = Literal["tiny", "small", "base", "large", "huge"]
Checkpointing = Literal["none", "video", "text", "all"]
CHECKPOINTING_TEXT = (
    "which activations are computed again in the backward pass, to save memory, block by block and with the same results: "
    "`video`: those of the student's encoder and decoder; `text`: of the BERT and of a decoder of answers or captions; `all`: "
    "both"
)


class Reconstruction(Section):
    """The reconstruction objective of the masked autoencoder."""

    weight: float = field(1.0, "weight in the loss; 0: contrast only, without a decoder", ge=0)
    target: Literal["normalised", "pixels"] = field(
        "normalised", "`normalised`: pixels standardised per tubelet (VideoMAE); `pixels`: unchanged"
    )


class Contrast(Section):
    """Masked video-text contrastive learning (TGM, section 3.4): InfoNCE between pooled visible tokens and a caption's vector.

    Negatives and batch statistics come from one forward pass over all processes: with `optimisation.accumulate`, the
    contrastive batch is smaller than the optimiser's by that factor.
    """

    weight: float = field(
        1.0,
        "weight in the loss; 0: only logged, by a head that is trained without a gradient to the encoder. With "
        "reconstruction.weight 0 too, the encoder stays random: the control of the logged loss",
        ge=0,
    )
    # TGM does not report the value; 0.07 is the usual initial value for InfoNCE (MoCo, CLIP).
    temperature: float = field(0.07, "temperature, or its initial value if it is learned", gt=0, le=10)
    learnable: bool = field(False, "learn the temperature, as in CLIP, with a minimum of 0.01")
    hidden: int = field(2048, "width of the prediction head's hidden layers; MoCo v3 uses 4096", "features", ge=8)
    layers: int = field(
        2, "linear layers of the prediction head, with batch norm over all processes in between", ge=1, le=4
    )


class CaptionChoice(Section):
    """The captions of a clip from which one is sampled each time the clip is loaded."""

    sources: tuple[Name, ...] | None = field(None, "packed caption sources; by default all")
    count: int | None = field(
        None, "captions per source, evenly spaced (1: the middle one); by default all", ge=1, le=1000
    )


class Teacher(Section):
    """A frozen image model whose attention guides the mask (UMT)."""

    model: str = field(..., "open_clip model with a ViT image tower, in the syntax of similarity.model")
    image_size: int | None = field(
        None, "side of its input frames; by default such that it has as many patches as a slot has tokens", ge=16
    )
    # UMT's release passes the student's pixels, which are normalised with ImageNet's statistics, to CLIP.
    normalisation: Literal["imagenet", "own"] = field(
        "imagenet", "normalisation of its pixels: ImageNet's, as in UMT, or the one that it was trained with"
    )


class MediumSettings(NamedTuple):
    """A kind of sample (clips or images) that a run trains on, with its sources, batch size and mask."""

    name: str  # "clips" or "images"
    sources: tuple[tuple[str | None, str], ...]  # (dataset, split); None: the config's only dataset
    frames: int  # per sample
    batch_size: int  # samples per optimiser step, summed over all processes and accumulation steps
    key: str  # config key of the batch size, for error messages
    mask: Mask


class Run(Section):
    """Settings of all pretraining runs: data, student, mask, optimisation.

    The properties answer questions about a run, so that other stages need not know its method.
    """

    cache_neutral = frozenset(
        {
            "workers",
            "kept_gigabytes",
            "checkpoint_every",
            "checkpoints_kept",
            "dataset",
            "seeds",
            "gradient_checkpointing",
        }
    )
    dataset: Name | None = field(None, "which of `datasets` to train on; required if there are several")
    split: Name = field("train", "split to train on")
    init: str | None = field(
        None,
        "initial weights: a run's safetensors, an official .pth of VideoMAE or UMT, a transformers folder or hub id, or "
        "`clip:` followed by an open_clip model in the syntax of similarity.model, whose blocks initialise the student",
    )
    release: str | None = field(
        None,
        "published weights of this run: a .pth of UMT, STM or VideoMAE, or a classifier.safetensors, taken whole. Nothing is "
        "trained, and no training data is read; evaluations test these weights",
    )
    model: ModelSize = field("base", "ViT size of the student")
    drop_path: Fraction = field(
        0.0,
        "stochastic depth of the student: drop rate of its last block, rising linearly from 0; UMT: 0.1 (B), 0.2 (L)",
    )
    image_size: int = field(224, "side of the square crop", "pixels", ge=32, le=1024)
    patch_size: int = field(16, "side of a tubelet", "pixels", ge=4, le=64)
    tubelet: int = field(2, "frames per tubelet", "frames", ge=1, le=8)
    frames: int = field(16, "frames per training clip", "stored frames", ge=2, le=256)
    stride: int = field(1, "step between a clip's frames, counted in stored frames", "stored frames", ge=1, le=64)
    sampling: Sampling = field("dense", SAMPLING_TEXT)
    decoder_depth: int | None = field(
        None, "decoder blocks; by default depends on the model size", "blocks", ge=1, le=32
    )
    positions: Literal["joint", "separable"] = field(
        "joint", "sine-cosine table over token numbers (VideoMAE), or separately over time, row and column"
    )
    position_period: float = field(
        10000.0,
        "longest period of the table; with few tokens, a smaller one makes neighbours more distinct",
        "tokens",
        gt=1,
    )
    mask: Mask = Mask()
    captions: CaptionChoice = CaptionChoice()
    optimisation: Optimisation = Optimisation()
    augmentation: Augmentation = Augmentation()
    precision: Literal["float32", "bf16"] = field(
        "float32", "precision of forward and backward passes; weights stay float32"
    )
    gradient_checkpointing: Checkpointing = field("none", CHECKPOINTING_TEXT)
    compile: bool = field(False, "use torch.compile; worthwhile on CUDA, not on CPU")
    repeats: int = field(1, "augmented views per clip and epoch (repeated augmentation)", "views", ge=1, le=8)
    workers: int = field(2, "data loading processes", "processes", ge=0, le=256)
    kept_gigabytes: float = field(
        0.0, "cache for decoded frames per data loading process, used if the data fit into it", "gigabytes", ge=0
    )
    resize_on: Literal["loader", "device"] = field(
        "loader",
        "where training crops are resized and flipped: in the data loading processes, or on the device. `device` is faster "
        "only if a GPU waits for loading processes that keep all cores busy, because it transfers larger frames. Pixels "
        "differ by at most one grey level; not with augmentation.auto_augment or augmentation.erasing",
    )
    decode_on: Literal["loader", "device"] = field(
        "loader",
        "where the JPEGs of training clips are decoded: in the data loading processes, or on the device (nvJPEG on CUDA), "
        "which also crops and then needs resize_on: device. One core then feeds more than ten times as many clips. nvJPEG's "
        "rounding differs from the loader's; not with kept_gigabytes",
    )
    seed: int | None = field(
        None, "this run's own seed; by default the config's seed, or each of its seeds", ge=0, lt=2**31
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = field((), "repeat the run with each of these seeds")
    checkpoint_every: int = field(200, "interval between checkpoints for resuming", "steps", ge=1)
    checkpoints_kept: int = field(2, "number of newest checkpoints to keep", "checkpoints", ge=1, le=100)
    processes: int = field(1, "processes per node; one per GPU", "processes", ge=1, le=64)
    nodes: int = field(1, "number of machines; more than one only in a Slurm job", "nodes", ge=1, le=1024)
    parallel: Literal["ddp", "fsdp"] = field(
        "ddp",
        "`ddp`: each process holds the whole model; `fsdp`: each process holds a shard of weights, gradients and optimiser "
        "state, which is slower, for models that do not fit on one GPU",
    )

    @property
    def world_size(self) -> int:
        """Total number of processes across all nodes."""
        return self.processes * self.nodes

    @property
    def has_contrast(self) -> bool:
        """Whether the run has TGM's contrastive branch."""
        return False

    @property
    def has_text(self) -> bool:
        """Whether the run has a text side, as required by tasks with text."""
        return False

    @property
    def text_tokens(self) -> int | None:
        """Maximum number of tokens per caption; None: the run has no text side."""
        return None

    @property
    def reconstructs(self) -> bool:
        """Whether the run predicts pixels."""
        return False

    @property
    def has_frame_teacher(self) -> bool:
        """Whether a frozen teacher encodes every frame, so that masks can be computed from its output."""
        return False

    @property
    def text_vectors_for(self) -> str | None:
        """The reason, for an error message, why the run needs packed text vectors; None: it does not need any."""
        return None

    @property
    def computed_guides(self) -> frozenset[str]:
        """Mask guides that the method computes in the training step; all others must be packed."""
        return frozenset()

    @property
    def mask_settings(self) -> Section | None:
        """Settings other than strategy, ratio and teacher that affect the mask."""
        return None

    @property
    def position_table_frames(self) -> int | None:
        """Number of frames of the position table before interpolation; None: it is not interpolated."""
        return None

    @property
    def trains_encoder(self) -> bool:
        """Whether the run changes its encoder: not with 0 epochs, nor if only a contrastive head is trained."""
        return self.optimisation.epochs > 0

    @property
    def models(self) -> tuple[str, ...]:
        """The pretrained models that the run loads in addition to `init`."""
        return ()

    @property
    def further_datasets(self) -> Mapping[str, tuple[str, ...]]:
        """The datasets that the run uses in addition to `dataset`, by config key."""
        return {}

    @property
    def media(self) -> tuple[MediumSettings, ...]:
        """The kinds of samples that the run trains on: clips and, in some runs, images in alternating steps."""
        batch_size = self.optimisation.batch_size
        return (
            MediumSettings("clips", self.video_sources, self.frames, batch_size, "optimisation.batch_size", self.mask),
        )

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks, in the order of `media`."""
        return tuple(medium.mask for medium in self.media)

    @property
    def mask_files(self) -> tuple[str, ...]:
        """The user's files that define masking strategies."""
        files = (user_file(mask.strategy) for mask in self.masks)
        return tuple(dict.fromkeys(file for file in files if file is not None))

    @property
    def video_sources(self) -> tuple[tuple[str | None, str], ...]:
        """(dataset, split) of the training clips; None: the config's only dataset. Empty for a `release`."""
        return () if self.release is not None else ((self.dataset, self.split),)

    @property
    def image_sources(self) -> tuple[tuple[str | None, str], ...]:
        """(dataset, split) of the training images."""
        return ()

    @model_validator(mode="after")
    def _check_seeds(self) -> "Run":
        if self.seed is not None and self.seeds:
            raise ValueError("give either `seed` or `seeds`")
        return self

    @model_validator(mode="after")
    def _check_release(self) -> "Run":
        if self.release is not None and self.init is not None:
            raise ValueError(
                "give either `init`, to train from these weights, or `release`, to evaluate them as they are"
            )
        return self

    @model_validator(mode="after")
    def _check_checkpointing(self) -> "Run":
        if self.gradient_checkpointing == "text" and not self.has_text:
            raise ValueError("gradient_checkpointing is `text`, and the run has no text side: set it to video or none")
        return self

    @model_validator(mode="after")
    def _check_resizing(self) -> "Run":
        if self.resize_on == "device" and (conflicts := self.augmentation.after_resizing):
            keys = " and ".join(f"augmentation.{key}" for key in conflicts)
            raise ValueError(f"{keys} change resized pixels in the loader: remove them, or set resize_on to loader")
        return self

    @model_validator(mode="after")
    def _check_decoding(self) -> "Run":
        if self.decode_on == "device" and self.resize_on == "loader":
            raise ValueError("decode_on: device needs resize_on: device, too: what the device decodes stays there")
        if self.decode_on == "device" and self.kept_gigabytes:
            raise ValueError(
                "kept_gigabytes keeps frames that the loader has decoded: set it to 0, or decode_on to loader"
            )
        return self

    @model_validator(mode="after")
    def _check_divisibility(self) -> "Run":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.frames % self.tubelet:
            raise ValueError(f"frames {self.frames} is not a multiple of tubelet {self.tubelet}")
        o = self.optimisation
        if o.batch_size % (o.accumulate * self.world_size * self.repeats):
            parts = f"{o.accumulate} x {self.world_size} x {self.repeats}"
            raise ValueError(
                f"batch_size {o.batch_size} is not a multiple of accumulate x processes x repeats = {parts}"
            )
        return self


class PretrainRun(Run):
    """A run of masked autoencoding, optionally with a contrastive objective: VideoMAE, MGM, MGMAE, TGM."""

    method: Literal["mae"] = field("mae", "the training method; a file of stm/methods")
    teacher: Teacher | None = None
    reconstruction: Reconstruction = Reconstruction()
    contrast: Contrast | None = None
    decode_ratio: float = field(1.0, "share of the masked tokens to decode; 1 as in VideoMAE", gt=0, le=1)

    @property
    def has_contrast(self) -> bool:
        return self.contrast is not None

    @property
    def reconstructs(self) -> bool:
        return self.reconstruction.weight > 0

    @property
    def trains_encoder(self) -> bool:
        objectives = self.reconstructs or (self.contrast is not None and self.contrast.weight > 0)
        return objectives and super().trains_encoder

    @property
    def text_vectors_for(self) -> str | None:
        return "has `contrast`" if self.contrast is not None else None

    @property
    def computed_guides(self) -> frozenset[str]:
        return frozenset({"attention"} if self.teacher else ())

    @property
    def models(self) -> tuple[str, ...]:
        return (self.teacher.model,) if self.teacher and self.release is None else ()

    @model_validator(mode="after")
    def _check_objectives(self) -> "PretrainRun":
        if self.reconstruction.weight == 0 and self.contrast is None:
            raise ValueError("reconstruction.weight is 0 and there is no `contrast`: nothing would be trained")
        return self
