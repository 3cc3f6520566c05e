"""The offline stages: from videos to shards."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stm.config.base import Name, Section, Templates, field
from stm.shards.schema import ARRAYS, PackedArray


class Frames(Section):
    """The frames stage: every k-th decoded frame as a JPEG."""

    cache_neutral = frozenset({"timeout_seconds"})
    every: int = field(4, "keep every k-th decoded frame; training strides count these", "frames", ge=1, le=64)
    short_side: int = field(256, "short side of the stored frames", "pixels", ge=32, le=2160)
    quality: int = field(90, "JPEG quality", "percent", ge=1, le=100)
    min_frames: int = field(2, "clips with fewer stored frames are marked `too_short`", "stored frames", ge=1)
    max_frames: int = field(4096, "stored frames kept of one clip, from its start", "stored frames", ge=1)
    min_side: int = field(32, "videos with a shorter side below this are marked `too_small`", "pixels", ge=1)
    max_side: int = field(16384, "videos with a longer side are marked `open_failed`", "pixels", ge=64)
    timeout_seconds: float = field(600.0, "a clip that decodes longer is killed and marked `timeout`", "seconds", gt=0)


class Blip2Captions(Section):
    """Captions by BLIP-2, one for each of a few uniformly spaced key frames (TGM, section 3.2)."""

    kind: Literal["blip2"]
    model: str = field(..., "hub id or local folder of a Blip2ForConditionalGeneration")
    key_frames: int = field(3, "of a clip, at the centres of equal segments; TGM uses 3 or 1", "frames", ge=1, le=64)
    batch_size: int = field(32, "key frames a forward pass, filled across clips", "frames", ge=1)
    max_new_tokens: int = field(30, "longest caption", "tokens", ge=1, le=512)
    beams: int = field(1, "beam search width; 1 is greedy", "beams", ge=1, le=64)
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "arithmetic of the model")


class HumanCaptions(Section):
    """The manifest's own captions."""

    kind: Literal["human"]


class LabelCaptions(Section):
    """Templates filled with the action label: the oracle of TGM's Figure 5b."""

    kind: Literal["label"]
    templates: Templates = field(("a video of {}.",), "captions; `{}` stands for the label", min_length=1)


class LanguageModelCaptions(Section):
    """Descriptions of the action label by a causal language model (TGM, Figure 5b)."""

    kind: Literal["llm"]
    model: str = field(..., "hub id or local folder of a transformers causal language model")
    prompts: tuple[str, ...] = field(
        # TGM, Figure 5b: the three prompts of the paper.
        ("Describe the action {}.", "What does a person {} look like?", "What does the act of {} look like?"),
        "prompts; `{}` stands for the label",
        min_length=1,
    )
    batch_size: int = field(16, "prompts a forward pass", "prompts", ge=1)
    max_new_tokens: int = field(60, "longest answer", "tokens", ge=1, le=2048)
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "arithmetic of the model")


CaptionSource = Annotated[
    Blip2Captions | HumanCaptions | LabelCaptions | LanguageModelCaptions, Field(discriminator="kind")
]


class Similarity(Section):
    """Patch-text similarity (TGM, section 3.3): each patch resized to CLIP's full input."""

    cache_neutral = frozenset({"keep_embeddings"})
    model: str = field(
        "ViT-B-32-quickgelu@openai",
        "`architecture@pretrained tag or checkpoint file`, `hf-hub:owner/name`, or `local-dir:folder` (open_clip)",
    )
    batch_size: int = field(1024, "patches a forward pass, filled across frames and clips", "patches", ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "arithmetic of the image tower")
    compile: bool = field(False, "torch.compile of the image tower; worth it on CUDA, not on CPU")
    keep_embeddings: bool = field(False, "keep every patch's embedding (fp16): more captions cost a dot product")


class Motion(Section):
    """The motion stage: magnitude and mean vector per patch and stored frame."""

    cache_neutral = frozenset({"timeout_seconds"})
    backend: Literal["codec", "transcode", "mestimate"] = field(
        "transcode",
        "`codec`: the stream's own vectors; `transcode`: H.264 without B-frames first, then `codec`; `mestimate`: "
        "ffmpeg's block matching, any codec",
    )
    subtract_camera: bool = field(False, "subtract each frame's median vector, an estimate of the camera's motion")
    timeout_seconds: float = field(600.0, "a clip that takes longer is killed and marked `timeout`", "seconds", gt=0)


class Text(Section):
    """The text stage: one vector a caption, from a frozen text encoder, so that training runs none."""

    model: str = field(
        "ViT-B-32-quickgelu@openai",
        "an open_clip text tower, written as in similarity.model, or `transformers:` and the hub id or local folder of "
        "a text encoder",
    )
    batch_size: int = field(256, "captions a forward pass, filled across clips", "captions", ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "arithmetic of the text encoder")
    pooling: Literal["projected", "cls", "mean"] = field(
        "projected", "CLIP's projected [EOS]; for other transformers encoders the first token or the mean of all"
    )


class Flow(Section):
    """The flow stage: optical flow from each stored frame to the next and to the one before (MGMAE)."""

    cache_neutral = frozenset({"timeout_seconds"})
    backend: Literal["dis", "raft"] = field("dis", "OpenCV's DIS, or torchvision's RAFT (MGMAE uses RAFT-small)")
    preset: Literal["ultrafast", "fast", "medium"] = field("medium", "`dis`: speed against accuracy")
    weights: str | None = field(None, "`raft`: file with torchvision's RAFT-small weights (.pth or .safetensors)")
    iterations: int = field(6, "`raft`: refinements; MGMAE uses 6", ge=1, le=64)
    cells: int = field(
        2, "flow cells on a side of a map cell; more of them part small objects from their ground", ge=1, le=16
    )
    timeout_seconds: float = field(600.0, "a clip that takes longer is killed and marked `timeout`", "seconds", gt=0)

    @model_validator(mode="after")
    def _has_weights(self) -> "Flow":
        if self.backend == "raft" and self.weights is None:
            raise ValueError("backend `raft` needs `weights`, the file of torchvision's RAFT-small")
        return self


class Pack(Section):
    """What goes into the training shards."""

    captions: Name | tuple[Name, ...] | None = field(
        None, "caption source, or sources, whose captions are packed; none by default. A run may choose among them"
    )
    similarity: bool = field(True, "pack those sources' similarity maps")
    motion: bool = field(True, "pack the motion maps")
    flow: bool = field(False, "pack the optical flow (MGMAE's masks)")
    text: bool = field(False, "pack those sources' text vectors (contrast, retrieval)")

    @field_validator("captions")
    @classmethod
    def _once(cls, captions: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(captions, tuple) and len(set(captions)) < len(captions):
            raise ValueError("a source is named twice")
        return captions

    @property
    def sources(self) -> tuple[str, ...]:
        """The packed caption sources, in the order of their captions."""
        if self.captions is None:
            return ()
        return (self.captions,) if isinstance(self.captions, str) else self.captions

    @property
    def arrays(self) -> tuple[PackedArray, ...]:
        """The packed arrays, in the order of the tar; each has its key here. Those of captions need a caption source."""
        chosen = [array for array in ARRAYS.values() if getattr(self, array.name)]
        return tuple(array for array in chosen if self.sources or not array.per_source)
