"""Pretraining runs with a frozen teacher and text: UMT, STM, ClusterSTM."""

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from stm.config.base import Fraction, Name, Section, field
from stm.config.training import SAMPLING_TEXT, Mask, MediumSettings, Run, Sampling, Teacher

# Default masks per method. The ratios are from STM's release and from a note on ClusterSTM.
_DEFAULT_MASKS = {
    "stm": {"strategy": "spatiotemporal", "ratio": 0.7},
    "clusterstm": {"strategy": "cluster", "ratio": 0.85},
}
_METHOD_OF_SECTION = {"spatio_temporal": "stm", "cluster": "clusterstm"}


class FrameTeacher(Teacher):
    """A frozen image model, CLIP or SigLIP, whose features of every frame are the training targets."""

    model: str = field(
        ...,
        "an open_clip model, in the syntax of similarity.model; `transformers:` followed by the hub id or local folder of a "
        "CLIP or SigLIP; or `actionclip:` followed by the file of an ActionCLIP checkpoint (.pt, .pth, .safetensors), for its "
        "image tower, as in STM",
    )
    layers: int = field(
        6, "number of last layers with which the student's last layers are aligned", "layers", ge=1, le=48
    )
    temporal_fusion: str | None = field(
        None,
        "STM: an ActionCLIP checkpoint (.pt, .pth, .safetensors), or a folder with a model.safetensors, such as "
        "`package:demo-fusion`, whose temporal transformer is applied to the features; in STM it is the file that `model` names",
    )


class Language(Section):
    """The text side: a BERT whose first layers encode the text and whose last layers cross-attend to the video."""

    model: str = field("bert-base-uncased", "hub id or local folder of a transformers BERT with its tokenizer")
    fusion_layer: int = field(9, "number of text-only layers; those after them cross-attend to the video", ge=1)
    max_tokens: int = field(32, "maximum length of a caption; longer ones are truncated", "tokens", ge=4, le=512)
    tokenization: Literal["bert", "umt"] = field(
        "bert",
        "`bert`: every text ends with [SEP]; `umt`: as in the releases of UMT and STM, captions and questions have no [SEP], "
        "and answers are not cleaned and lose theirs if they are too long",
    )
    embedding: int = field(512, "width of the joint embedding of clips and captions", "features", ge=8)
    temperature: float = field(
        0.07, "initial temperature of the contrast; learned, clamped to [0.001, 0.5]", gt=0, le=0.5
    )


class PairSettings(Section):
    """How contrast and matching compare clips and captions. The defaults are those of one joined batch."""

    contrastive_divisor: float = field(
        1.0,
        "the gradient that the contrast gives to embeddings is divided by it (the temperature's is not). 1: the gradient of "
        "the joined batch. UMT's released code loses the other processes' parts, which divides it by their number: on 16 "
        "GPUs, 16 reproduces it, whatever the number of processes here",
        ge=1,
    )
    negatives_among: int | None = field(
        None,
        "matching samples hard negatives within groups of this many pairs, such as those of one GPU of the release; by "
        "default among all pairs of a process",
        "pairs",
        ge=2,
    )
    hard_negatives: bool = field(
        True,
        "matching samples negatives that the contrast finds similar more often (UMT's `vtm_hard_neg`); false: all equally often, "
        "which a short training from scratch learns from sooner",
    )


class Objectives(PairSettings):
    """Weights of a run's losses; 0 disables one. The papers use 1 for all."""

    alignment: float = field(
        1.0,
        "alignment of the student's features with the teacher's (UMT, STM); ClusterSTM: of the visible tokens, as in UMT, by "
        "default 0",
        ge=0,
    )
    relevance: float = field(1.0, "masked relevance of tokens to the text (ClusterSTM)", ge=0)
    contrastive: float = field(1.0, "video-text contrast with negatives from all processes", ge=0)
    matching: float = field(1.0, "video-text matching, by default with hard negatives", ge=0)
    masked_language: float = field(1.0, "masked language modelling conditioned on the video", ge=0)
    mask_probability: Fraction = field(0.5, "masked language modelling: share of the caption's tokens that are masked")
    word_average: Literal["batch", "group"] = field(
        "batch",
        "masked language modelling: average over all masked words of a batch, or, as in the release of UMT, over those of each "
        "group of `negatives_among` captions (by default a process's), and then over the groups",
    )
    shared_texts: bool = field(
        False,
        "clips with equal captions are positives of each other, in contrast and matching, and never negatives; false: only "
        "samples of the same clip, as in UMT's pretraining. Required on benchmarks whose protocol shares texts (SSv2)",
    )

    @property
    def text(self) -> bool:
        """Whether any objective needs the text side."""
        return self.contrastive > 0 or self.matching > 0 or self.masked_language > 0


class Images(Section):
    """Image batches that alternate with clip batches; each step uses one kind."""

    datasets: tuple[Name, ...] = field(
        ..., "image datasets, whose clips have one frame; their images are pooled", min_length=1
    )
    split: Name = "train"
    batch_size: int = field(1024, "images per optimiser step, over all processes and passes", "images", ge=1)
    mask: Mask = Mask(strategy="attention", ratio=0.5)  # as in UMT and STM


class SpatioTemporal(Section):
    """STM's learnable mask over adjacent frames, and its decoder."""

    sampling: Literal["as_released", "log_probability"] = field(
        "log_probability",
        "`log_probability` samples hidden tokens in proportion to their score; `as_released` adds the noise to the score "
        "itself and ranks by a softmax that underflows, as STM's code does: the scores hardly matter, and the top of a frame is "
        "hidden more often than its bottom",
    )
    temperature: float = field(
        0.05,
        "temperature of the straight-through gradient; it does not change which tokens are sampled, except for "
        "`sampling: as_released`, which ranks at this temperature",
        gt=0,
    )
    mix: Fraction = field(
        0.5, "initial value of the learned weight of the temporal score; the remaining weight is the attention's"
    )
    # The released optimiser uses a learning rate of 5e-2 for the mix and of 1e-4 for all other parameters.
    mix_learning_rate: float = field(500.0, "learning rate of the mix, relative to that of all other parameters", gt=0)
    width: int = field(
        512, "channels to which a frame's tokens are projected before frames are compared", "channels", ge=8
    )
    features: int = field(256, "channels of the features of a pair of frames; a multiple of 8", "channels", ge=8)
    points_spread: float = field(0.2, "spread of the nine jittered points, in half frame sides", ge=0, le=1)
    text: Literal["invisible", "visible", "all"] = field(
        "invisible",
        "tokens used by the text objectives: the hidden ones, as in the released code; the visible ones; or all, as in the "
        "paper's figure",
    )

    mask_gradient: Literal["by_token", "as_released"] = field(
        "by_token",
        "how the student's gradient reaches the mask, beside the tokens' own: `by_token` pools the tokens that a pass encodes "
        "along the token index; `as_released` pools as STM's code does, which confuses tokens with channels",
    )
    decoder: Literal["linear_start", "as_released"] = field(
        "linear_start",
        "`linear_start`: the decoder starts as a linear head, as STM's code intends; `as_released`: that code overwrites the "
        "start, and adds a term of value 0 whose gradient reaches visible tokens at the wrong places",
    )

    compares: Literal["learned_mask", "always"] = field(
        "learned_mask",
        "when the decoder of clips compares adjacent frames and reads the text: with the learned mask alone, as in STM's code, "
        "or `always`, so that masks can be compared with one decoder",
    )

    @model_validator(mode="after")
    def _check_features(self) -> "SpatioTemporal":
        if self.features % 8:
            raise ValueError(
                f"features {self.features} must be a multiple of 8: they are halved and split into two groups"
            )
        return self


class Cluster(Section):
    """ClusterSTM's clusters and relevance targets. The paper's text was not available, so undetermined details are options."""

    density: Literal["kernel", "knn"] = field(
        "kernel", "local density: exp(-distance / cutoff), summed over all tokens or over the nearest neighbours"
    )
    cutoff: float = field(0.5, "cutoff of the cosine distance in the local and the temporal density", gt=0, le=2)
    neighbours: int = field(5, "`knn`: number of nearest neighbours", "tokens", ge=1, le=1000)
    window: int = field(3, "side of the neighbourhood over which the teacher pools; odd", "tokens", ge=1, le=15)
    pooling: Literal["head", "mean"] = field(
        "head", "the teacher's own pooling head, or the mean over the neighbourhood"
    )
    texts: Literal["paired", "batch"] = field(
        "paired", "relevance to a clip's own caption, or to all captions of the batch"
    )
    scaling: Literal["cosine", "logit_scale", "frame", "texts"] = field(
        "frame",
        "scale of the relevance: the cosine itself; the cosine times the teacher's logit scale, which multiplies the loss by its "
        "square; or the cosine at mean 0 and deviation 1 over the hidden tokens of a frame, or over the texts of the batch",
    )
    decoder_depth: int = field(2, "decoder blocks; the paper's number is unknown", "blocks", ge=1, le=32)

    @model_validator(mode="after")
    def _check_window(self) -> "Cluster":
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window} must be odd, to have a token at its centre")
        return self


class LanguageRun(Run):
    """A run of UMT, STM or ClusterSTM; defaults of UMT's second stage."""

    method: Literal["umt", "stm", "clusterstm"] = field(..., "the training method; a file of stm/methods")
    more: tuple[Name, ...] = field(
        (), "further video datasets, pooled with `dataset`; clip ids must be unique across all of them"
    )
    images: Images | None = None
    tubelet: int = field(1, "frames per tubelet; always 1, because teachers encode single frames", "frames", ge=1, le=1)
    frames: int = field(4, "frames per training clip", "stored frames", ge=1, le=256)
    position_frames: int | None = field(
        None,
        "compute the position table for clips of this length and interpolate it to `frames` and to the frames of an "
        "evaluation; by default the table is computed for each of these lengths, as in UMT's released configs",
        "frames",
        ge=1,
        le=256,
    )
    sampling: Sampling = field("tsn", SAMPLING_TEXT)
    mask: Mask = Mask(strategy="attention", ratio=0.8)
    teacher: FrameTeacher = field(..., "the frozen teacher")
    language: Language | None = field(None, "the text side; none: video only (UMT stage 1)")
    objectives: Objectives = Objectives()
    spatio_temporal: SpatioTemporal | None = field(None, "STM's mask; by default with its defaults")
    cluster: Cluster | None = field(None, "ClusterSTM's clusters; by default with their defaults")

    @property
    def text_tokens(self) -> int | None:
        return None if self.language is None else self.language.max_tokens

    @property
    def video_sources(self) -> tuple[tuple[str | None, str], ...]:
        return () if self.release is not None else tuple((name, self.split) for name in (self.dataset, *self.more))

    @property
    def image_sources(self) -> tuple[tuple[str | None, str], ...]:
        if self.images is None or self.release is not None:
            return ()
        return tuple((name, self.images.split) for name in self.images.datasets)

    @property
    def further_datasets(self) -> Mapping[str, tuple[str, ...]]:
        return {"more": self.more, "images.datasets": self.images.datasets if self.images else ()}

    @property
    def media(self) -> tuple[MediumSettings, ...]:
        if self.images is None:
            return super().media
        images = self.images
        return (
            *super().media,
            MediumSettings("images", self.image_sources, 1, images.batch_size, "images.batch_size", images.mask),
        )

    @property
    def has_text(self) -> bool:
        return self.language is not None

    @property
    def has_frame_teacher(self) -> bool:
        return True

    @property
    def text_vectors_for(self) -> str | None:
        return "compares tokens with the teacher's text vectors" if self.method == "clusterstm" else None

    @property
    def computed_guides(self) -> frozenset[str]:
        return frozenset({"attention", "features", "spatiotemporal"})

    @property
    def mask_settings(self) -> Section | None:
        return self.cluster

    @property
    def position_table_frames(self) -> int | None:
        return self.position_frames

    @property
    def models(self) -> tuple[str, ...]:
        teacher = (self.teacher.model.removeprefix("transformers:"), self.teacher.temporal_fusion)
        names = (
            *(teacher if self.release is None else ()),
            self.language.model if self.language else None,
        )
        return tuple(name for name in names if name is not None)

    @model_validator(mode="before")
    @classmethod
    def _set_method_defaults(cls, values: object) -> object:
        """Set the defaults that depend on the method: mask, the method's own section, and objectives."""
        if not isinstance(values, dict):
            return values
        method, objectives = values.get("method"), values.get("objectives", {})
        if "mask" not in values and method in _DEFAULT_MASKS:
            values = {**values, "mask": _DEFAULT_MASKS[method]}
        # Filled in, so that the fingerprint contains the values of its keys.
        values = {**{section: {} for section, owner in _METHOD_OF_SECTION.items() if owner == method}, **values}
        if method == "clusterstm" and isinstance(objectives, dict):
            # The note on the paper mentions no loss on features beside the relevance.
            values = {**values, "objectives": {"alignment": 0.0, **objectives}}
        return values

    @model_validator(mode="after")
    def _check_method(self) -> "LanguageRun":
        if self.language is None and self.objectives.text:
            raise ValueError(
                "contrastive, matching and masked_language need `language`; add it, or set their weights to 0"
            )
        if self.method == "clusterstm" and self.language is None:
            raise ValueError("clusterstm compares tokens with the text: add `language`")
        for section, method in _METHOD_OF_SECTION.items():
            if getattr(self, section) is not None and self.method != method:
                raise ValueError(
                    f"`{section}` belongs to the method {method}, but this run has the method {self.method}"
                )
        if self.mask.strategy == "spatiotemporal" and self.method != "stm":
            raise ValueError("the mask `spatiotemporal` is learned by the method stm alone")
        if self.images and self.images.mask.strategy == "spatiotemporal":
            raise ValueError("images.mask: `spatiotemporal` compares frames, and an image has only one; use attention")
        if self.method == "stm" and self.frames < 2 and self.mask.strategy == "spatiotemporal":
            raise ValueError("stm compares adjacent frames: `frames` must be at least 2")
        if self.images and self.images.batch_size % (self.optimisation.accumulate * self.world_size * self.repeats):
            raise ValueError(
                f"images.batch_size {self.images.batch_size} is not a multiple of accumulate x processes x repeats"
            )
        return self
