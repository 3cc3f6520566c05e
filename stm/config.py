"""What a run may say: every key of `config/*.yaml`, with its type, unit, bounds and default.

The JSON schema that the workflow validates against (`config/schema.json`) is generated from these classes by
`stm schema`. A key that is not here is an error, never ignored.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stm.config_errors import explain_problem
from stm.manifest import Policy, Status
from stm.strategies import declared_strategies


class ConfigError(ValueError):
    """A config that cannot be used; the message has one line per mistake: key, value, what is allowed."""


def _field(default: Any, doc: str, unit: str | None = None, **bounds: Any) -> Any:
    """A field with its meaning and unit; both go into the JSON schema and into error messages."""
    return Field(default, description=doc, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Section(BaseModel):
    """Base of all sections: immutable, and strict about keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True)
    # Keys that change how fast or how safely a stage runs, but no byte of what it makes.
    indifferent: ClassVar[frozenset[str]] = frozenset()

    def deciding(self) -> dict[str, Any]:
        """As plain values, without the keys that change no byte: what a result depends on."""
        return self.model_dump(mode="json", exclude=set(self.indifferent))


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# ---------------------------------------------------------------------------------------------------------- data


class FolderDataset(Section):
    """Any videos, with an optional CSV, JSON or Parquet table of what is known about them."""

    indifferent = frozenset({"probe_timeout_seconds"})
    source: Literal["folder"]
    root: str = _field(..., "folder of the videos; all paths in the annotations are relative to it")
    annotations: str | None = _field(
        None,
        "CSV, JSON or Parquet with a column `path` and, where known, `video_id`, `split`, `label`, `caption` or "
        "`captions`, `start`, `end` (seconds), `questions`; a folder's videos that it does not name are left out",
    )
    extensions: tuple[str, ...] = _field(
        (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".h264"),
        "file name endings taken as videos when there are no annotations",
    )
    split: Name = _field("train", "split of clips whose annotation names none")
    probe_timeout_seconds: float = _field(60.0, "a file that takes longer to open is marked `timeout`", "seconds", gt=0)


class MovingShapesDataset(Section):
    """The generated dataset: textured shapes that move over textured backgrounds, as real H.264 files."""

    indifferent = frozenset({"probe_timeout_seconds"})
    source: Literal["moving-shapes"]
    clips: dict[Name, Annotated[int, Field(ge=1)]] = _field({"train": 256, "test": 128}, "clips in each split", "clips")
    frames: int = _field(32, "frames in a clip", "frames", ge=8, le=1024)
    fps: int = _field(16, "frame rate", "frames per second", ge=1, le=120)
    height: int = _field(128, "height of the pictures; even", "pixels", ge=64, le=2160, multiple_of=2)
    width: int = _field(160, "width of the pictures; even", "pixels", ge=64, le=4096, multiple_of=2)
    distractors: int = _field(2, "most other objects in a clip", "objects", ge=0, le=8)
    moving_camera: Fraction = _field(0.5, "share of clips whose camera moves")
    probe_timeout_seconds: float = _field(60.0, "a file that takes longer to open is marked `timeout`", "seconds", gt=0)


Dataset = Annotated[FolderDataset | MovingShapesDataset, Field(discriminator="source")]


class BadInput(Section):
    """What to do with clips that are damaged, missing or unusual."""

    indifferent = frozenset({"max_failure_rate"})
    policy: dict[Status, Policy] = _field(
        {},
        "overrides of the policy per status; `keep`: use what there is, `drop`: leave the clip out and list it in the "
        "quarantine table, `fail`: stop. The defaults stand in stm/manifest.py",
    )
    max_failure_rate: Fraction = _field(
        0.5,
        "a stage fails when more than this share of its shard's clips is dropped (shards of fewer than 8 never do)",
    )

    def action(self, status: Status) -> Policy:
        return self.policy.get(status, status.default_policy)


# ------------------------------------------------------------------------------------------------- offline stages


class Frames(Section):
    """The frames stage: every k-th decoded frame as a JPEG."""

    indifferent = frozenset({"timeout_seconds"})
    every: int = _field(4, "keep every k-th decoded frame; training strides count these", "frames", ge=1, le=64)
    short_side: int = _field(256, "short side of the stored frames", "pixels", ge=32, le=2160)
    quality: int = _field(90, "JPEG quality", "percent", ge=1, le=100)
    min_frames: int = _field(2, "clips with fewer stored frames are marked `too_short`", "stored frames", ge=1)
    max_frames: int = _field(4096, "stored frames kept of one clip, from its start", "stored frames", ge=1)
    min_side: int = _field(32, "videos with a shorter side below this are marked `too_small`", "pixels", ge=1)
    max_side: int = _field(16384, "videos with a longer side are marked `open_failed`", "pixels", ge=64)
    timeout_seconds: float = _field(600.0, "a clip that decodes longer is killed and marked `timeout`", "seconds", gt=0)


class Blip2Captions(Section):
    """Captions by BLIP-2, one for each of a few uniformly spaced key frames (TGM, section 3.2)."""

    kind: Literal["blip2"]
    model: str = _field(..., "hub id or local folder of a Blip2ForConditionalGeneration")
    key_frames: int = _field(3, "of a clip, at the centres of equal segments; TGM uses 3 or 1", "frames", ge=1, le=64)
    batch_size: int = _field(32, "key frames a forward pass, filled across clips", "frames", ge=1)
    max_new_tokens: int = _field(30, "longest caption", "tokens", ge=1, le=512)
    beams: int = _field(1, "beam search width; 1 is greedy", "beams", ge=1, le=64)
    precision: Literal["float32", "bfloat16", "float16"] = _field("float32", "arithmetic of the model")


class HumanCaptions(Section):
    """The manifest's own captions."""

    kind: Literal["human"]


class LabelCaptions(Section):
    """Templates filled with the action label: the oracle of TGM's Figure 5b."""

    kind: Literal["label"]
    templates: tuple[str, ...] = _field(("a video of {}.",), "captions; `{}` stands for the label", min_length=1)

    @model_validator(mode="after")
    def _has_place(self) -> "LabelCaptions":
        bad = [t for t in self.templates if t.count("{}") != 1]
        if bad:
            raise ValueError(f"each template needs exactly one {{}} for the label; wrong: {bad}")
        return self


class LanguageModelCaptions(Section):
    """Descriptions of the action label by a causal language model (TGM, Figure 5b)."""

    kind: Literal["llm"]
    model: str = _field(..., "hub id or local folder of a transformers causal language model")
    prompts: tuple[str, ...] = _field(
        # TGM, Figure 5b: the three prompts of the paper.
        ("Describe the action {}.", "What does a person {} look like?", "What does the act of {} look like?"),
        "prompts; `{}` stands for the label",
        min_length=1,
    )
    batch_size: int = _field(16, "prompts a forward pass", "prompts", ge=1)
    max_new_tokens: int = _field(60, "longest answer", "tokens", ge=1, le=2048)
    precision: Literal["float32", "bfloat16", "float16"] = _field("float32", "arithmetic of the model")


CaptionSource = Annotated[
    Blip2Captions | HumanCaptions | LabelCaptions | LanguageModelCaptions, Field(discriminator="kind")
]


class Similarity(Section):
    """Patch-text similarity (TGM, section 3.3): each patch resized to CLIP's full input."""

    indifferent = frozenset({"keep_embeddings"})
    model: str = _field(
        "ViT-B-32-quickgelu@openai",
        "`architecture@pretrained tag or checkpoint file`, `hf-hub:owner/name`, or `local-dir:folder` (open_clip)",
    )
    batch_size: int = _field(1024, "patches a forward pass, filled across frames and clips", "patches", ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = _field("float32", "arithmetic of the image tower")
    keep_embeddings: bool = _field(False, "keep every patch's embedding (fp16): more captions cost a dot product")


class Motion(Section):
    """The motion stage: magnitude and mean vector per patch and stored frame."""

    indifferent = frozenset({"timeout_seconds"})
    backend: Literal["codec", "transcode", "mestimate"] = _field(
        "transcode",
        "`codec`: the stream's own vectors; `transcode`: H.264 without B-frames first, then `codec`; `mestimate`: "
        "ffmpeg's block matching, any codec",
    )
    subtract_camera: bool = _field(False, "subtract each frame's median vector, an estimate of the camera's motion")
    timeout_seconds: float = _field(600.0, "a clip that takes longer is killed and marked `timeout`", "seconds", gt=0)


class Pack(Section):
    """What goes into the training shards."""

    captions: Name | None = _field(None, "caption source whose captions are packed; none by default")
    similarity: bool = _field(True, "pack that source's similarity maps")
    motion: bool = _field(True, "pack the motion maps")


# ----------------------------------------------------------------------------------------------------- training


class Mask(Section):
    """Which tokens the student does not see."""

    strategy: Name = _field("tube", "a strategy of stm/masking")
    ratio: float = _field(0.9, "mask ratio: int(ratio x tokens of a time slot) are hidden in each slot", gt=0, lt=1)

    @field_validator("strategy")
    @classmethod
    def _exists(cls, strategy: str) -> str:
        names = sorted(declared_strategies())
        if strategy not in names:
            raise ValueError(f"no such masking strategy; there are: {', '.join(names)}")
        return strategy


class Optimisation(Section):
    """AdamW with warm-up and cosine decay. Defaults: VideoMAE's pretraining."""

    epochs: int = _field(200, "passes over the training split; 0 saves the initial weights", "epochs", ge=0)
    batch_size: int = _field(512, "clips x repeats in an optimiser step, of all processes and passes", "samples", ge=1)
    accumulate: int = _field(1, "forward passes an optimiser step", "passes", ge=1)
    learning_rate: float = _field(1.5e-4, "for 256 clips; scaled by batch_size / 256", "per 256 clips", gt=0, le=10)
    warmup_epochs: float = _field(40.0, "linear warm-up", "epochs", ge=0)
    warmup_learning_rate: float = _field(1e-6, "start of the warm-up, scaled alike", "per 256 clips", ge=0)
    min_learning_rate: float = _field(1e-5, "end of the cosine, scaled alike", "per 256 clips", ge=0)
    weight_decay: float = _field(0.05, "AdamW's; not applied to biases and norms", ge=0, le=1)
    betas: tuple[Fraction, Fraction] = _field((0.9, 0.95), "AdamW's")
    clip_grad: float | None = _field(None, "largest norm of the gradient", gt=0)

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> "Optimisation":
        if 0 < self.epochs < self.warmup_epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs}; lower it too")
        return self


class Augmentation(Section):
    """Crop and flip, applied to the pixels and the guides alike."""

    crop: Literal["multi_scale", "random_resized", "center"] = _field("multi_scale", "how a training crop is drawn")
    scale: tuple[Fraction, Fraction] = _field((0.5, 1.0), "`random_resized`: share of the frame's area")
    flip: bool = _field(True, "horizontal flip of half the clips; not for labels that know left from right")


ModelSize = Literal["tiny", "small", "base", "large", "huge"]


class PretrainRun(Section):
    """One pretraining run."""

    indifferent = frozenset({"workers", "checkpoint_every", "checkpoints_kept"})
    method: Literal["mae"] = _field("mae", "how a training step is made; a file of stm/methods")
    model: ModelSize = _field("base", "ViT size of the student")
    image_size: int = _field(224, "side of the square crop", "pixels", ge=32, le=1024)
    patch_size: int = _field(16, "side of a tubelet", "pixels", ge=4, le=64)
    tubelet: int = _field(2, "frames in a tubelet", "frames", ge=1, le=8)
    frames: int = _field(16, "frames of a training clip", "stored frames", ge=2, le=256)
    stride: int = _field(1, "step between a clip's frames on the stored grid", "stored frames", ge=1, le=64)
    decoder_depth: int | None = _field(None, "decoder blocks; by model size when not given", "blocks", ge=1, le=32)
    mask: Mask = Mask()
    optimisation: Optimisation = Optimisation()
    augmentation: Augmentation = Augmentation()
    precision: Literal["float32", "bf16"] = _field("float32", "arithmetic of a pass; weights stay float32")
    compile: bool = _field(False, "torch.compile; worth it on CUDA, not on CPU")
    decode_ratio: float = _field(1.0, "share of the masked tokens that is decoded; 1 is VideoMAE", gt=0, le=1)
    repeats: int = _field(1, "augmented views of each clip a visit (repeated augmentation)", "views", ge=1, le=8)
    workers: int = _field(2, "data loading processes", "processes", ge=0, le=256)
    seed: int | None = _field(None, "this run's own seed; the config's when not given", ge=0, lt=2**31)
    checkpoint_every: int = _field(200, "a checkpoint for resuming is written every so many steps", "steps", ge=1)
    checkpoints_kept: int = _field(2, "newest checkpoints kept", "checkpoints", ge=1, le=100)
    processes: int = _field(1, "processes of this run on one machine (DDP when more than 1)", "processes", ge=1, le=64)

    @model_validator(mode="after")
    def _divides(self) -> "PretrainRun":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.frames % self.tubelet:
            raise ValueError(f"frames {self.frames} is not a multiple of tubelet {self.tubelet}")
        o = self.optimisation
        if o.batch_size % (o.accumulate * self.processes * self.repeats):
            parts = f"{o.accumulate} x {self.processes} x {self.repeats}"
            raise ValueError(
                f"batch_size {o.batch_size} is not a multiple of accumulate x processes x repeats = {parts}"
            )
        return self


class LinearProbe(Section):
    """Linear classifier on the frozen backbone's mean-pooled tokens (MAE's recipe: affine-free batch norm)."""

    task: Literal["linear"]
    train_split: Name = "train"
    test_split: Name = "test"
    epochs: int = _field(90, "passes over the cached features", "epochs", ge=1)
    batch_size: int = _field(256, "features a step", "clips", ge=1)
    learning_rates: tuple[float, ...] = _field(
        # MAE's linear probe uses LARS with 0.1 per 256; the paper of TGM does not say. Ours: AdamW, best of a small
        # grid chosen on a fifth of the training split, never on the test split.
        (1e-3, 3e-3, 1e-2),
        "tried; the best on held-out training clips is used",
        min_length=1,
    )
    views: int = _field(1, "temporal views of a test clip, averaged after softmax", "views", ge=1, le=32)


class FineTuneOptimisation(Optimisation):
    """AdamW with warm-up and cosine decay. Defaults: VideoMAE's fine-tuning."""

    epochs: int = _field(50, "passes over the training split", "epochs", ge=0)
    learning_rate: float = _field(1e-3, "for 256 clips; scaled by batch_size / 256", "per 256 clips", gt=0, le=10)
    warmup_epochs: float = _field(5.0, "linear warm-up", "epochs", ge=0)
    min_learning_rate: float = _field(1e-6, "end of the cosine, scaled alike", "per 256 clips", ge=0)
    betas: tuple[Fraction, Fraction] = _field((0.9, 0.999), "AdamW's")


class FineTuneAugmentation(Augmentation):
    """Crop and flip of fine-tuning."""

    crop: Literal["multi_scale", "random_resized", "center"] = _field("random_resized", "how a training crop is drawn")


class FineTune(Section):
    """End-to-end training on the action labels."""

    task: Literal["finetune"]
    train_split: Name = "train"
    test_split: Name = "test"
    optimisation: FineTuneOptimisation = FineTuneOptimisation()
    augmentation: FineTuneAugmentation = FineTuneAugmentation()
    layer_decay: float = _field(0.75, "learning rate of block i is scaled by layer_decay^(depth + 1 - i)", gt=0, le=1)
    drop_path: Fraction = _field(0.1, "stochastic depth")
    label_smoothing: Fraction = _field(0.1, "label smoothing")
    views: int = _field(1, "temporal views of a test clip, averaged after softmax", "views", ge=1, le=32)
    precision: Literal["float32", "bf16"] = "float32"


EvaluationTask = Annotated[LinearProbe | FineTune, Field(discriminator="task")]


class MaskQuality(Section):
    """Share of the named object's true box that each mask hides; needs a dataset with boxes."""

    split: Name = "test"
    text_ratio: float = _field(0.6, "ratio of the text-guided mask (TGM, Table 6)", gt=0, lt=1)
    motion_ratio: float = _field(0.75, "ratio of the motion-guided mask (MGM)", gt=0, lt=1)
    crops: int = _field(200, "random crops on which cached maps are held against maps computed anew", "crops", ge=1)
    image_size: int = _field(224, "side of those crops after resizing", "pixels", ge=32, le=1024)
    patch_size: int = _field(16, "side of a token", "pixels", ge=4, le=64)


class Report(Section):
    """The page."""

    title: str = _field("stm: masked video pretraining", "title of the page")
    clips: int = _field(4, "clips shown with frames, maps, masks and reconstructions", "clips", ge=0, le=64)
    split: Name = _field("test", "split the shown clips are taken from; the first split with clips when it has none")


class Prices(Section):
    """What machine time costs, for the plan."""

    cpu_core_hour: float = _field(0.0, "price of a core for an hour", "currency", ge=0)
    gpu_hour: float = _field(0.0, "price of a GPU for an hour", "currency", ge=0)


class Config(Section):
    """One file of `config/`."""

    name: Name = _field(..., "results go to {results}/{name}")
    results: str = _field("results", "folder of all outputs")
    seed: int = _field(0, "seed of everything that is random", ge=0, lt=2**31)
    dataset: Dataset
    shard_size: int = _field(256, "clips a shard, on average; a job does a shard", "clips", ge=1, le=100_000)
    grid: int = _field(14, "cells on the short side of the similarity and motion maps", "cells", ge=2, le=64)
    bad_input: BadInput = BadInput()
    frames: Frames = Frames()
    captions: dict[Name, CaptionSource] = _field({}, "caption sources by name")
    similarity: Similarity = Similarity()
    motion: Motion = Motion()
    pack: Pack = Pack()
    pretrain: dict[Name, PretrainRun] = _field({}, "pretraining runs by name")
    evaluate: dict[Name, EvaluationTask] = _field({}, "evaluations by name; each is done for each run")
    mask_quality: MaskQuality | None = None
    report: Report = Report()
    prices: Prices = Prices()

    @model_validator(mode="after")
    def _agrees(self) -> "Config":
        if self.pack.captions is not None and self.pack.captions not in self.captions:
            raise ValueError(
                f"pack.captions names {self.pack.captions!r}; captions has: {', '.join(self.captions) or 'none'}"
            )
        if self.mask_quality is not None and self.dataset.source != "moving-shapes":
            raise ValueError("mask_quality needs a dataset with true boxes: moving-shapes")
        packed = {
            "similarity": self.pack.captions is not None and self.pack.similarity,
            "motion": self.pack.motion,
        }
        for name, run in self.pretrain.items():
            missing = [guide for guide in declared_strategies()[run.mask.strategy] if not packed.get(guide)]
            if missing:
                raise ValueError(f"pretrain.{name} masks by {missing[0]}, but pack does not pack the {missing[0]} maps")
        return self


# ------------------------------------------------------------------------------------------------------ reading


def parse_config(values: Any, origin: str = "config") -> Config:
    """Checks a mapping (a parsed YAML file) and returns the config.

    Raises:
        ConfigError: one line per mistake, with the key, the value and what is allowed.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        schema = Config.model_json_schema()
        lines = [explain_problem(problem, schema) for problem in error.errors()]
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def load_config(path: str | Path) -> Config:
    """Reads a YAML config.

    Raises:
        ConfigError: the file is missing, no YAML, or not a valid config.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return parse_config(values, str(path))


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
