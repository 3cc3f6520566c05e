"""Pretraining runs with a frozen teacher and text: UMT, STM, ClusterSTM."""

from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from stm.config.base import Fraction, Name, Section, field
from stm.config.training import Mask, MediumSettings, Run, Sampling, Teacher

# A method's mask where none is given. Ratios: STM's release, and a note on ClusterSTM.
_OWN_MASKS = {
    "stm": {"strategy": "spatiotemporal", "ratio": 0.7},
    "clusterstm": {"strategy": "cluster", "ratio": 0.85},
}
_OWN_SECTIONS = {"spatio_temporal": "stm", "cluster": "clusterstm"}


class FrameTeacher(Teacher):
    """A frozen image model whose features of every frame are learned from: CLIP or SigLIP."""

    model: str = field(
        ...,
        "an open_clip model, written as in similarity.model, or `transformers:` and the hub id or local folder of a CLIP "
        "or SigLIP",
    )
    layers: int = field(6, "its last layers, which the student's last layers are aligned with", "layers", ge=1, le=48)
    temporal_fusion: str | None = field(
        None, "ActionCLIP's temporal transformer on top of its features (STM): a .pth or .safetensors with its weights"
    )


class Language(Section):
    """The text side: a BERT whose first layers read the text and whose last layers look at the video."""

    model: str = field("bert-base-uncased", "hub id or local folder of a transformers BERT with its tokenizer")
    fusion_layer: int = field(9, "layers that read the text alone; those after them cross-attend to the video", ge=1)
    max_tokens: int = field(32, "longest caption; longer ones are cut", "tokens", ge=4, le=512)
    embedding: int = field(512, "width of the space in which clips and captions are compared", "features", ge=8)
    temperature: float = field(0.07, "of the contrast, learned from here on, held in [0.001, 0.5]", gt=0, le=0.5)
    gradient_checkpointing: bool = field(False, "compute the BERT's activations again in the backward pass")


class Objectives(Section):
    """Weights of a run's losses; 0 leaves one out. The papers' are all 1."""

    alignment: float = field(1.0, "student's features to the teacher's (UMT, STM)", ge=0)
    relevance: float = field(1.0, "masked relevance of tokens to the text (ClusterSTM)", ge=0)
    contrastive: float = field(1.0, "video-text contrast, negatives of all processes", ge=0)
    matching: float = field(1.0, "video-text matching with hard negatives", ge=0)
    masked_language: float = field(1.0, "masked language modelling with the video at hand", ge=0)
    mask_probability: Fraction = field(0.5, "share of the caption's tokens that masked language modelling hides")

    @property
    def text(self) -> bool:
        """Whether the run needs the text side."""
        return self.contrastive > 0 or self.matching > 0 or self.masked_language > 0


class Images(Section):
    """Batches of single images between those of clips; a step sees one kind."""

    datasets: tuple[Name, ...] = field(
        ..., "image datasets, whose clips have one frame; their images are joined", min_length=1
    )
    split: Name = "train"
    batch_size: int = field(1024, "images in an optimiser step, of all processes and passes", "images", ge=1)
    mask: Mask = Mask(strategy="attention", ratio=0.5)  # UMT and STM


class SpatioTemporal(Section):
    """STM's learnable mask over adjacent frames, and its decoder."""

    sampling: Literal["as_released", "log_probability"] = field(
        "log_probability",
        "`log_probability` draws hidden tokens in proportion to their score; `as_released` adds the noise to the score "
        "itself, as STM's code does, which drowns it: that mask is all but uniform",
    )
    temperature: float = field(0.05, "of the straight-through gradient; it does not change what is drawn", gt=0)
    mix: Fraction = field(0.5, "first value of the learned share of the temporal score; the rest is attention")
    # The released optimiser gives the mix 5e-2 where all else has 1e-4.
    mix_learning_rate: float = field(500.0, "learning rate of the mix, in units of the others'", gt=0)
    width: int = field(512, "channels that a frame's tokens are mapped to before pairs are compared", "channels", ge=8)
    features: int = field(256, "channels of what is known of a pair of frames; a multiple of 8", "channels", ge=8)
    points_spread: float = field(0.2, "distance of the nine jittered points, in half frames", ge=0, le=1)
    text: Literal["invisible", "visible", "all"] = field(
        "invisible",
        "tokens that the text objectives see: the hidden ones, as released; the visible ones; all (its figure)",
    )

    @model_validator(mode="after")
    def _divides(self) -> "SpatioTemporal":
        if self.features % 8:
            raise ValueError(f"features {self.features} must be a multiple of 8: they are halved, and in two groups")
        return self


class Cluster(Section):
    """ClusterSTM's clusters and relevance targets. The paper's text was not available: what is open is an option."""

    density: Literal["kernel", "knn"] = field(
        "kernel", "local density: exp(-distance / cutoff) of all, or of neighbours"
    )
    cutoff: float = field(0.5, "cutoff of the cosine distance, in the local and the temporal density", gt=0, le=2)
    neighbours: int = field(5, "`knn`: neighbours", "tokens", ge=1, le=1000)
    window: int = field(3, "side of the neighbourhood that the teacher pools; odd", "tokens", ge=1, le=15)
    pooling: Literal["head", "mean"] = field("head", "the teacher's own pooling head, or the mean of the neighbours")
    texts: Literal["paired", "batch"] = field("paired", "relevance to a clip's own caption, or to all of the batch")
    decoder_depth: int = field(2, "decoder blocks; the paper's number is unknown", "blocks", ge=1, le=32)

    @model_validator(mode="after")
    def _is_odd(self) -> "Cluster":
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window} must be odd: a token stands in its middle")
        return self


class LanguageRun(Run):
    """One run of UMT, STM or ClusterSTM. Defaults: UMT's second stage."""

    method: Literal["umt", "stm", "clusterstm"] = field(..., "how a training step is made; a file of stm/methods")
    more: tuple[Name, ...] = field((), "further video datasets, joined with `dataset`; no two may have clips of one id")
    images: Images | None = None
    tubelet: int = field(1, "frames in a tubelet; teachers see single frames", "frames", ge=1, le=1)
    frames: int = field(4, "frames of a training clip", "stored frames", ge=1, le=256)
    position_frames: int | None = field(
        None,
        "frames that the positions were made for, those of `init`'s pretraining; they are stretched to `frames`, and to those "
        "of an evaluation, as in UMT; none: `frames`",
        "frames",
        ge=1,
        le=256,
    )
    sampling: Sampling = field("tsn", "`dense`: frames `stride` apart from a random start; `tsn`: one a segment")
    mask: Mask = Mask(strategy="attention", ratio=0.8)
    teacher: FrameTeacher = field(..., "what is learned from")
    language: Language | None = field(None, "the text side; none: video only (UMT stage 1)")
    objectives: Objectives = Objectives()
    spatio_temporal: SpatioTemporal | None = field(None, "STM's mask; its defaults when not given")
    cluster: Cluster | None = field(None, "ClusterSTM's clusters; defaults when not given")

    @property
    def text_tokens(self) -> int | None:
        return None if self.language is None else self.language.max_tokens

    @property
    def video_sources(self) -> tuple[tuple[str | None, str], ...]:
        return tuple((name, self.split) for name in (self.dataset, *self.more))

    @property
    def image_sources(self) -> tuple[tuple[str | None, str], ...]:
        return tuple((name, self.images.split) for name in self.images.datasets) if self.images else ()

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
        named = (self.teacher.model.removeprefix("transformers:"), self.teacher.temporal_fusion)
        return tuple(name for name in (*named, self.language.model if self.language else None) if name is not None)

    @model_validator(mode="before")
    @classmethod
    def _own_mask(cls, values: object) -> object:
        """STM and ClusterSTM have masks of their own."""
        if isinstance(values, dict) and "mask" not in values and values.get("method") in _OWN_MASKS:
            return {**values, "mask": _OWN_MASKS[values["method"]]}
        return values

    @model_validator(mode="after")
    def _fits(self) -> "LanguageRun":
        if self.language is None and self.objectives.text:
            raise ValueError(
                "contrastive, matching and masked_language need `language`; give it, or set their weights to 0"
            )
        if self.method == "clusterstm" and self.language is None:
            raise ValueError("clusterstm compares tokens with the text: give `language`")
        for section, method in _OWN_SECTIONS.items():
            if getattr(self, section) is not None and self.method != method:
                raise ValueError(f"`{section}` belongs to the method {method}, this is {self.method}")
        if self.mask.strategy == "spatiotemporal" and self.method != "stm":
            raise ValueError("the mask `spatiotemporal` is learned by the method stm alone")
        if self.images and self.images.mask.strategy == "spatiotemporal":
            raise ValueError("images.mask: `spatiotemporal` compares frames, an image has one; use attention")
        if self.method == "stm" and self.frames < 2 and self.mask.strategy == "spatiotemporal":
            raise ValueError("stm compares adjacent frames: `frames` must be 2 or more")
        if self.images and self.images.batch_size % (self.optimisation.accumulate * self.world_size * self.repeats):
            raise ValueError(
                f"images.batch_size {self.images.batch_size} is not a multiple of accumulate x processes x repeats"
            )
        return self
