"""Pretraining runs: model, mask, objectives, optimisation. Those with text are in language.py."""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from stm.config.base import Fraction, Name, Section, field
from stm.config.strategies import find_strategy, user_file


class Mask(Section):
    """Which tokens the student does not see."""

    strategy: str = field(
        "tube",
        "a strategy of stm/masking or of an installed package, or `path/to/file.py:name` for one of your own file",
    )
    ratio: float = field(0.9, "mask ratio: int(ratio x tokens of a time slot) are hidden in each slot", gt=0, lt=1)

    @field_validator("strategy")
    @classmethod
    def _exists(cls, strategy: str) -> str:
        find_strategy(strategy)
        return strategy


class Optimisation(Section):
    """AdamW with warm-up and cosine decay. Defaults: VideoMAE's pretraining."""

    scale_by_batch: bool = field(
        True, "learning rates are for 256 clips and scaled by batch_size / 256; false: taken as they are (UMT stage 2)"
    )

    epochs: int = field(200, "passes over the training split; 0 saves the initial weights", "epochs", ge=0)
    batch_size: int = field(512, "clips x repeats in an optimiser step, of all processes and passes", "samples", ge=1)
    accumulate: int = field(1, "forward passes an optimiser step", "passes", ge=1)
    learning_rate: float = field(1.5e-4, "for 256 clips; scaled by batch_size / 256", "per 256 clips", gt=0, le=10)
    warmup_epochs: float = field(40.0, "linear warm-up", "epochs", ge=0)
    warmup_learning_rate: float = field(1e-6, "start of the warm-up, scaled alike", "per 256 clips", ge=0)
    min_learning_rate: float = field(1e-5, "end of the cosine, scaled alike", "per 256 clips", ge=0)
    weight_decay: float = field(0.05, "AdamW's; not applied to biases and norms", ge=0, le=1)
    betas: tuple[Fraction, Fraction] = field((0.9, 0.95), "AdamW's")
    clip_grad: float | None = field(None, "largest norm of the gradient", gt=0)

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "Optimisation":
        if 0 < self.epochs < self.warmup_epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs}; lower it too")
        return self


class Augmentation(Section):
    """What is done to a training clip: crop and flip, to the pixels and the guides alike; the rest to pixels only."""

    crop: Literal["multi_scale", "random_resized", "center"] = field("multi_scale", "how a training crop is drawn")
    scale: tuple[Fraction, Fraction] = field((0.5, 1.0), "`random_resized`: share of the frame's area")
    flip: bool = field(True, "horizontal flip of half the clips; not for labels that know left from right")
    auto_augment: str | None = field(None, "timm's RandAugment, such as rand-m7-n4-mstd0.5-inc1; sampled once per clip")
    erasing: Fraction = field(0.0, "probability of random erasing, of the same box in all frames, with noise")

    @property
    def after_resizing(self) -> tuple[str, ...]:
        """Keys that are on and change pixels once they are resized."""
        on = {"auto_augment": self.auto_augment is not None, "erasing": self.erasing > 0}
        return tuple(key for key, there in on.items() if there)


Sampling = Literal["dense", "tsn"]
ModelSize = Literal["tiny", "small", "base", "large", "huge"]


class Reconstruction(Section):
    """The masked autoencoder's objective."""

    weight: float = field(1.0, "its weight in the loss; 0: contrast only, no decoder runs", ge=0)
    target: Literal["normalised", "pixels"] = field(
        "normalised", "each tubelet's pixels less their mean, by their deviation (VideoMAE), or pixels as they are"
    )


class Contrast(Section):
    """Masked video-text contrast (TGM, section 3.4): InfoNCE between pooled visible tokens and a caption's vector.

    Negatives and batch norm are those of one pass of all processes: with `optimisation.accumulate` the contrast's batch is
    that much smaller than the optimiser's.
    """

    weight: float = field(1.0, "its weight in the loss; 0: logged only, and the encoder learns nothing from it", ge=0)
    # The value in TGM's text is lost; 0.07 is InfoNCE's usual start (MoCo, CLIP).
    temperature: float = field(0.07, "temperature, or its first value", gt=0, le=10)
    learnable: bool = field(False, "learn the temperature, as CLIP does, kept at 0.01 or above")
    hidden: int = field(2048, "width of the prediction head's hidden layers; MoCo v3's is 4096", "features", ge=8)
    layers: int = field(2, "linear layers of the prediction head, batch norm over all processes between", ge=1, le=4)


class CaptionChoice(Section):
    """Which of a clip's captions each visit samples from."""

    sources: tuple[Name, ...] | None = field(None, "packed caption sources; all when not given")
    count: int | None = field(
        None, "captions of each source, evenly spread among those there are (1: the middle one); all", ge=1, le=1000
    )


class Teacher(Section):
    """A frozen image model whose attention guides the mask (UMT)."""

    model: str = field(..., "open_clip model with a ViT image tower, written as in similarity.model")
    image_size: int | None = field(
        None, "side its frames are resized to; by default what gives it as many patches as a slot has tokens", ge=16
    )
    # UMT's release feeds its CLIP the student's pixels, and these have ImageNet's statistics.
    normalisation: Literal["imagenet", "own"] = field(
        "imagenet", "mean and deviation taken off its pixels: ImageNet's, as UMT does, or those it was trained with"
    )


class MediumSettings(NamedTuple):
    """What a run draws samples from, and how it trains on them."""

    name: str  # "clips" or "images"
    sources: tuple[tuple[str | None, str], ...]  # (dataset, split); None: the config's only dataset
    frames: int  # of a sample
    batch_size: int  # samples in an optimiser step, of all processes and passes
    key: str  # of the batch size in a config, for messages
    mask: Mask


class Run(Section):
    """What all pretraining runs say: data, student, mask, optimisation.

    The properties are what the other stages ask of a run, whatever its method: they need not know which section it is.
    """

    cache_neutral = frozenset({"workers", "kept_gigabytes", "checkpoint_every", "checkpoints_kept", "dataset", "seeds"})
    dataset: Name | None = field(None, "which of `datasets` it trains on; needed when there are several")
    split: Name = field("train", "split it trains on")
    init: str | None = field(
        None,
        "weights to start from: a run's safetensors, an official .pth of VideoMAE or UMT, a transformers folder or hub id, or "
        "`clip:` and an open_clip model, written as in similarity.model, whose blocks the student takes",
    )
    model: ModelSize = field("base", "ViT size of the student")
    image_size: int = field(224, "side of the square crop", "pixels", ge=32, le=1024)
    patch_size: int = field(16, "side of a tubelet", "pixels", ge=4, le=64)
    tubelet: int = field(2, "frames in a tubelet", "frames", ge=1, le=8)
    frames: int = field(16, "frames of a training clip", "stored frames", ge=2, le=256)
    stride: int = field(1, "step between a clip's frames on the stored grid", "stored frames", ge=1, le=64)
    sampling: Sampling = field("dense", "`dense`: frames `stride` apart from a random start; `tsn`: one a segment")
    decoder_depth: int | None = field(None, "decoder blocks; by model size when not given", "blocks", ge=1, le=32)
    positions: Literal["joint", "separable"] = field(
        "joint", "sine-cosine table over a clip's token numbers (VideoMAE), or over time, row and column each by itself"
    )
    position_period: float = field(
        10000.0, "longest period of the table; with few tokens, a smaller one tells neighbours apart", "tokens", gt=1
    )
    mask: Mask = Mask()
    captions: CaptionChoice = CaptionChoice()
    optimisation: Optimisation = Optimisation()
    augmentation: Augmentation = Augmentation()
    precision: Literal["float32", "bf16"] = field("float32", "arithmetic of a pass; weights stay float32")
    compile: bool = field(False, "torch.compile; worth it on CUDA, not on CPU")
    repeats: int = field(1, "augmented views of each clip per visit (repeated augmentation)", "views", ge=1, le=8)
    workers: int = field(2, "data loading processes", "processes", ge=0, le=256)
    kept_gigabytes: float = field(
        0.0, "memory for decoded frames in each loading process, where the data fits into it", "gigabytes", ge=0
    )
    resize_on: Literal["loader", "device"] = field(
        "loader",
        "where pretraining's crops are resized and mirrored: in the loading processes, or on the device. `device` is faster "
        "where a GPU waits for loading processes that have all cores busy, and only there: larger images are moved. Pixels "
        "differ by a grey level at most; not with augmentation.auto_augment or augmentation.erasing",
    )
    seed: int | None = field(
        None, "this run's own seed; the config's, or each of its seeds, when not given", ge=0, lt=2**31
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = field((), "repeat the run with each of these seeds")
    checkpoint_every: int = field(200, "a checkpoint for resuming is written every so many steps", "steps", ge=1)
    checkpoints_kept: int = field(2, "newest checkpoints kept", "checkpoints", ge=1, le=100)
    processes: int = field(1, "processes of this run on each of its nodes; one a GPU", "processes", ge=1, le=64)
    nodes: int = field(1, "machines of this run; more than one in a Slurm job only", "nodes", ge=1, le=1024)
    parallel: Literal["ddp", "fsdp"] = field(
        "ddp",
        "of several processes, each holds the whole model (ddp), or a part of weights, gradients and optimiser state "
        "(fsdp): slower, for models that do not fit into one GPU",
    )

    @property
    def world_size(self) -> int:
        """Processes of the run on all nodes."""
        return self.processes * self.nodes

    @property
    def has_contrast(self) -> bool:
        """Whether it has TGM's contrastive branch."""
        return False

    @property
    def has_text(self) -> bool:
        """Whether it has a text side, which tasks with text need."""
        return False

    @property
    def text_tokens(self) -> int | None:
        """Tokens of the longest caption that it reads; None: it has no text side."""
        return None

    @property
    def reconstructs(self) -> bool:
        """Whether it learns to predict pixels."""
        return False

    @property
    def has_frame_teacher(self) -> bool:
        """Whether a frozen teacher sees every frame, and the mask may be made from its output."""
        return False

    @property
    def text_vectors_for(self) -> str | None:
        """What it needs the captions' packed vectors for, in the words of an error message; None: it reads none."""
        return None

    @property
    def computed_guides(self) -> frozenset[str]:
        """Guides of masks that its method makes in the training step; all others must be packed."""
        return frozenset()

    @property
    def mask_settings(self) -> Section | None:
        """What decides its mask beside strategy, ratio and teacher."""
        return None

    @property
    def position_table_frames(self) -> int | None:
        """Frames that the position table is made for, and stretched from; None: those of a clip."""
        return None

    @property
    def models(self) -> tuple[str, ...]:
        """The pretrained models that it loads beside `init`."""
        return ()

    @property
    def further_datasets(self) -> Mapping[str, tuple[str, ...]]:
        """The datasets that it names beside `dataset`, by the key that names them."""
        return {}

    @property
    def media(self) -> tuple[MediumSettings, ...]:
        """What it trains on: clips, and for some runs images, which take turns."""
        batch_size = self.optimisation.batch_size
        return (
            MediumSettings("clips", self.video_sources, self.frames, batch_size, "optimisation.batch_size", self.mask),
        )

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The mask of each medium."""
        return tuple(medium.mask for medium in self.media)

    @property
    def mask_files(self) -> tuple[str, ...]:
        """The user's own files that its masking strategies are in."""
        files = (user_file(mask.strategy) for mask in self.masks)
        return tuple(dict.fromkeys(file for file in files if file is not None))

    @property
    def video_sources(self) -> tuple[tuple[str | None, str], ...]:
        """(dataset, split) of the clips that it trains on; None: the config's only dataset."""
        return ((self.dataset, self.split),)

    @property
    def image_sources(self) -> tuple[tuple[str | None, str], ...]:
        """Likewise of the images."""
        return ()

    @model_validator(mode="after")
    def _seeds_once(self) -> "Run":
        if self.seed is not None and self.seeds:
            raise ValueError("give either `seed` or `seeds`")
        return self

    @model_validator(mode="after")
    def _resizes_last(self) -> "Run":
        if self.resize_on == "device" and (late := self.augmentation.after_resizing):
            keys = " and ".join(f"augmentation.{key}" for key in late)
            raise ValueError(f"{keys} change resized pixels in the loader: leave out, or set resize_on to loader")
        return self

    @model_validator(mode="after")
    def _divides(self) -> "Run":
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
    """One run of masked autoencoding, with a contrast if wanted: VideoMAE, MGM, MGMAE, TGM."""

    method: Literal["mae"] = field("mae", "how a training step is made; a file of stm/methods")
    teacher: Teacher | None = None
    reconstruction: Reconstruction = Reconstruction()
    contrast: Contrast | None = None
    decode_ratio: float = field(1.0, "share of the masked tokens that is decoded; 1 is VideoMAE", gt=0, le=1)

    @property
    def has_contrast(self) -> bool:
        return self.contrast is not None

    @property
    def reconstructs(self) -> bool:
        return self.reconstruction.weight > 0

    @property
    def text_vectors_for(self) -> str | None:
        return "has `contrast`" if self.contrast is not None else None

    @property
    def computed_guides(self) -> frozenset[str]:
        return frozenset({"attention"} if self.teacher else ())

    @property
    def models(self) -> tuple[str, ...]:
        return (self.teacher.model,) if self.teacher else ()

    @model_validator(mode="after")
    def _learns(self) -> "PretrainRun":
        if self.reconstruction.weight == 0 and (self.contrast is None or self.contrast.weight == 0):
            raise ValueError("both objectives have no weight; give reconstruction.weight or contrast.weight")
        return self
