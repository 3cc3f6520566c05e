"""Settings of the offline stages, from videos to shards."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from stm.config.base import Name, Section, Templates, field
from stm.config.data import BadInput
from stm.config.evaluation import CropComparison, MaskQuality
from stm.shards.schema import ARRAYS, PackedArray


class Frames(Section):
    """The frames stage: stores every k-th decoded frame, or a number of frames spread over the clip, as JPEGs."""

    cache_neutral = frozenset({"timeout_seconds", "keep", "from_dataset"})
    every: int | None = field(
        4,
        "store every k-th decoded frame; training strides count stored frames. None with `count`",
        "frames",
        ge=1,
        le=64,
    )
    count: int | None = field(
        None,
        "instead of `every`: store this many frames, each in the middle of one of as many equal segments of the clip, and all "
        "frames of a shorter clip. For runs that sample one frame per segment (`sampling: tsn`, `sparse`): their random "
        "frame is one of the stored ones, so use a multiple of their `frames`. Neither motion nor flow can be packed",
        "stored frames",
        ge=1,
        le=1024,
    )
    short_side: int = field(256, "short side of the stored frames", "pixels", ge=32, le=2160)
    quality: int = field(90, "JPEG quality", "percent", ge=1, le=100)
    min_frames: int = field(2, "clips with fewer stored frames get the status `too_short`", "stored frames", ge=1)
    max_frames: int = field(4096, "maximum stored frames per clip, counted from its start", "stored frames", ge=1)
    min_side: int = field(32, "videos whose short side is smaller get the status `too_small`", "pixels", ge=1)
    max_side: int = field(16384, "videos whose long side is larger get the status `open_failed`", "pixels", ge=64)
    keep: bool = field(
        True,
        "keep the frames beside the shards that are packed with them; otherwise a shard's frames are removed once it is "
        "packed, and decoded again if a changed setting needs them",
    )
    from_dataset: Name | None = field(
        None,
        "take the frames of clips that this dataset of the config has, too, from it, instead of decoding their videos again; "
        "it must have the same folder of videos and the same settings of frames",
    )
    timeout_seconds: float = field(
        600.0, "decoding is killed after this time, and the clip gets the status `timeout`", "seconds", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _choose_frames(cls, values: Any) -> Any:
        """`count` replaces the default of `every`."""
        if isinstance(values, Mapping) and values.get("count") is not None and "every" not in values:
            return {**values, "every": None}
        return values

    @model_validator(mode="after")
    def _check_frames(self) -> "Frames":
        if (self.every is None) == (self.count is None):
            raise ValueError("give either `every` or `count`; to replace an inherited one, set it to null")
        if self.count is not None and not self.min_frames <= self.count <= self.max_frames:
            raise ValueError(
                f"count is {self.count}, but must be at least min_frames, which is {self.min_frames}, and at most "
                f"max_frames, which is {self.max_frames}"
            )
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Return the values that results depend on: of `every` and `count` only the one that is set."""
        values = super().fingerprint()
        return {key: value for key, value in values.items() if value is not None}

    def decoded_frames(self, frames: float) -> float:
        """Return how many frames of a clip of `frames` are decoded: none follows the last stored one."""
        return frames if self.every is None else min(frames, self.max_frames * self.every)

    def stored_frames(self, frames: float) -> float:
        """Return how many frames of a clip of `frames` are stored; a fraction if `frames` is a mean over clips."""
        if self.every is None:
            assert self.count is not None
            return min(frames, self.count)
        return max(1.0, self.decoded_frames(frames) / self.every)


class Blip2Captions(Section):
    """Captions by BLIP-2, one per key frame, with uniformly spaced key frames (TGM, section 3.2)."""

    kind: Literal["blip2"]
    model: str = field(..., "hub id or local folder of a Blip2ForConditionalGeneration")
    key_frames: int = field(
        3, "key frames per clip, at the centres of equal segments; TGM uses 3 or 1", "frames", ge=1, le=64
    )
    batch_size: int = field(32, "key frames per forward pass, filled across clips", "frames", ge=1)
    max_new_tokens: int = field(30, "maximum length of a caption", "tokens", ge=1, le=512)
    beams: int = field(1, "beam search width; 1 is greedy", "beams", ge=1, le=64)
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "precision of the model")


class HumanCaptions(Section):
    """Captions from the manifest."""

    kind: Literal["human"]


class LabelCaptions(Section):
    """Templates filled with the action label: the oracle of TGM's Figure 5b."""

    kind: Literal["label"]
    templates: Templates = field(("a video of {}.",), "captions, with `{}` in place of the label", min_length=1)


class LanguageModelCaptions(Section):
    """Descriptions of the action label by a causal language model (TGM, Figure 5b)."""

    kind: Literal["llm"]
    model: str = field(..., "hub id or local folder of a transformers causal language model")
    prompts: tuple[str, ...] = field(
        # The three prompts in TGM's Figure 5b.
        ("Describe the action {}.", "What does a person {} look like?", "What does the act of {} look like?"),
        "prompts, with `{}` in place of the label",
        min_length=1,
    )
    batch_size: int = field(16, "prompts per forward pass", "prompts", ge=1)
    max_new_tokens: int = field(60, "maximum length of an answer", "tokens", ge=1, le=2048)
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "precision of the model")


class VisionLanguageCaptions(Section):
    """Answers of a vision-language model that is shown frames of the clip, with its chat template (ours; TGM uses BLIP-2)."""

    kind: Literal["vlm"]
    model: str = field(
        ...,
        "hub id or local folder of an image-text-to-text model of transformers whose processor has a chat template, for example "
        "Qwen/Qwen2.5-VL-7B-Instruct. Code of the model's repository is never run",
    )
    revision: str | None = field(
        None, "commit, tag or branch of a hub model; by default the newest. The receipt states the commit that was used"
    )
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = field(
        ("Describe this video in one sentence.",),
        "what the model is asked about the frames; one caption per prompt",
        min_length=1,
    )
    input: Literal["video", "images", "key_frames"] = field(
        "video",
        "`video`: the frames as one video, with their times, for models that take videos; `images`: the frames as that many "
        "images of one question; `key_frames`: each frame is asked about alone, as BLIP-2's key frames are",
    )
    frames: int = field(8, "frames shown per clip, at the centres of equal segments", "stored frames", ge=1, le=256)
    batch_size: int = field(16, "answers per forward pass, filled across clips", "captions", ge=1)
    max_new_tokens: int = field(
        60, "maximum length of an answer, including the reasoning of models that reason", "tokens", ge=1, le=8192
    )
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "precision of the model")
    template: dict[str, bool | int | float | str] = field(
        {}, "variables of the chat template, for example `{enable_thinking: false}`"
    )
    processor: dict[str, JsonValue] = field(
        {},
        "settings of the image processor (`input: video`: of the video processor) that replace those of the model's files, for "
        "example `{size: {shortest_edge: 3136, longest_edge: 100352}}` or `{do_image_splitting: false}`",
    )

    @property
    def images_per_prompt(self) -> int:
        """How many captions a prompt has: one per frame, or one for all of them."""
        return self.frames if self.input == "key_frames" else 1

    @model_validator(mode="after")
    def _check_processor(self) -> "VisionLanguageCaptions":
        ours = sorted(
            {"do_sample_frames", "num_frames", "fps", "video_metadata", "return_tensors"} & set(self.processor)
        )
        if ours:
            raise ValueError(f"processor.{ours[0]} is set by this stage, which chooses the frames: use `frames`")
        return self


CaptionSource = Annotated[
    Blip2Captions | HumanCaptions | LabelCaptions | LanguageModelCaptions | VisionLanguageCaptions,
    Field(discriminator="kind"),
]


class Similarity(Section):
    """Patch-text similarity (TGM, section 3.3): each patch resized to CLIP's full input, or a cheaper deviation."""

    cache_neutral = frozenset({"keep_embeddings"})
    implied: ClassVar[dict[str, Any]] = {"method": "patches", "window": 1}  # defaults that fingerprints omit
    method: Literal["patches", "dense"] = field(
        "patches",
        "`patches`: each patch resized to CLIP's full input, as in TGM. `dense`, a deviation from the paper: one forward pass "
        "per frame, with each token's value in the last block (MaskCLIP), for 50 to 200 times less work; only for a ViT of "
        "open_clip's own. Measure its agreement with `patches` (`crop_agreement`) before using it: docs/masking.md",
    )
    model: str = field(
        "ViT-B-32-quickgelu@openai",
        "`architecture@pretrained tag or checkpoint file`, `hf-hub:owner/name`, `local-dir:folder`, or "
        "`package:name` of a model that comes with stm (open_clip)",
    )
    batch_size: int = field(
        1024,
        "patches per forward pass, filled across frames and clips; `dense`: whole frames of at most this many, at least one",
        "patches",
        ge=1,
    )
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "precision of the image tower")
    compile: bool = field(False, "compile the image tower with torch.compile; worthwhile on CUDA, not on CPU")
    window: int = field(
        1,
        "side of a patch; patches of several cells overlap, and tokens of a crop interpolate between them: `grid: 56` with "
        "`window: 3` follows crops of a 14 x 14 token grid much better than `grid: 14`, for 15 times the work",
        "cells",
        ge=1,
        le=16,
    )
    keep_embeddings: bool = field(
        False, "also store each patch's embedding (fp16), so that further captions need only a dot product"
    )

    def fingerprint(self) -> dict[str, Any]:
        """Return the values that results depend on; without two defaults, so that maps from before these keys stay valid."""
        values = super().fingerprint()
        return {key: value for key, value in values.items() if self.implied.get(key) != value}

    @model_validator(mode="after")
    def _check_window(self) -> "Similarity":
        if self.method == "dense" and self.window > 1:
            raise ValueError(
                f"window is {self.window}, but the patches of method `dense` are single cells; remove `window`, and make `grid` "
                "finer for finer maps"
            )
        return self


class Motion(Section):
    """The motion stage: motion magnitude and mean motion vector per patch and stored frame."""

    cache_neutral = frozenset({"timeout_seconds"})
    backend: Literal["codec", "transcode", "mestimate"] = field(
        "transcode",
        "`codec`: motion vectors of the stream itself; `transcode`: the same after transcoding to H.264 without B-frames; "
        "`mestimate`: ffmpeg's block matching, for any codec",
    )
    subtract_camera: bool = field(False, "subtract each frame's median vector, an estimate of the camera motion")
    timeout_seconds: float = field(
        600.0, "a clip is killed after this time and gets the status `timeout`", "seconds", gt=0
    )


class Text(Section):
    """The text stage: one vector per caption by a frozen text encoder, so that training needs no text encoder."""

    model: str = field(
        "ViT-B-32-quickgelu@openai",
        "an open_clip text tower, in the syntax of similarity.model, or `transformers:` followed by the hub id or local "
        "folder of a text encoder",
    )
    batch_size: int = field(256, "captions per forward pass, filled across clips", "captions", ge=1)
    precision: Literal["float32", "bfloat16", "float16"] = field("float32", "precision of the text encoder")
    pooling: Literal["projected", "cls", "mean"] = field(
        "projected",
        "`projected`: CLIP's projected [EOS] token; other transformers encoders: first token or mean of all",
    )


class Flow(Section):
    """The flow stage: optical flow from each stored frame to the next and to the previous one (MGMAE)."""

    cache_neutral = frozenset({"timeout_seconds"})
    backend: Literal["dis", "raft"] = field("dis", "OpenCV's DIS, or torchvision's RAFT (MGMAE uses RAFT-small)")
    preset: Literal["ultrafast", "fast", "medium"] = field("medium", "`dis`: trade-off between speed and accuracy")
    weights: str | None = field(None, "`raft`: file of torchvision's RAFT-small weights (.pth or .safetensors)")
    iterations: int = field(6, "`raft`: number of refinements; MGMAE uses 6", ge=1, le=64)
    cells: int = field(
        2, "flow cells per side of a map cell; more of them separate small objects from the background", ge=1, le=16
    )
    timeout_seconds: float = field(
        600.0, "a clip is killed after this time and gets the status `timeout`", "seconds", gt=0
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "Flow":
        if self.backend == "raft" and self.weights is None:
            raise ValueError("backend `raft` requires `weights`, the file of torchvision's RAFT-small")
        return self


class Pack(Section):
    """The packing stage: the contents of the training shards."""

    # Which shards have guides is recorded in each shard, by the other keys: they are all off in one without guides.
    cache_neutral = frozenset({"more_splits"})
    captions: Name | tuple[Name, ...] | None = field(
        None, "caption source, or sources, to pack; none by default. Each run can select some of them"
    )
    similarity: bool = field(True, "pack the similarity maps of those sources")
    motion: bool = field(True, "pack the motion maps")
    flow: bool = field(False, "pack the optical flow, for MGMAE's masks")
    text: bool = field(False, "pack the text vectors of those sources, for contrast and retrieval")
    more_splits: tuple[Name, ...] = field(
        (),
        "splits that are packed with captions and maps although nothing in the config reads them. Without this, shards of a "
        "split that no run trains on and of which no evaluation reads captions hold frames and labels alone, but for the "
        "first 512 clips, of which the page can show some",
    )

    @field_validator("captions")
    @classmethod
    def _check_distinct(cls, captions: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(captions, tuple) and len(set(captions)) < len(captions):
            raise ValueError("a source is listed twice")
        return captions

    @property
    def sources(self) -> tuple[str, ...]:
        """The packed caption sources, in the order in which their captions are stored in a shard."""
        if self.captions is None:
            return ()
        return (self.captions,) if isinstance(self.captions, str) else self.captions

    def without_guides(self) -> "Pack":
        """Return the same with neither captions nor arrays."""
        return self.model_copy(update={"captions": None, **dict.fromkeys(ARRAYS, False)})

    @property
    def arrays(self) -> tuple[PackedArray, ...]:
        """The packed arrays, in tar order; caption arrays are packed only if there is a caption source."""
        # Each array has a key with the same name in this section.
        enabled = [array for array in ARRAYS.values() if getattr(self, array.name)]
        return tuple(array for array in enabled if self.sources or not array.per_source)


class Stages(Section):
    """Settings of the offline stages for one dataset."""

    shard_size: int = field(1000, "clips per shard, on average; a job processes one shard", "clips", ge=1, le=100_000)
    grid: int = field(14, "cells along the short side of the similarity and motion maps", "cells", ge=2, le=64)
    bad_input: BadInput = BadInput()
    frames: Frames = Frames()
    captions: dict[Name, CaptionSource] = field({}, "caption sources by name")
    similarity: Similarity = Similarity()
    text: Text = Text()
    motion: Motion = Motion()
    flow: Flow = Flow()
    pack: Pack = Pack()
    mask_quality: MaskQuality | None = None
    crop_agreement: CropComparison | None = None

    @model_validator(mode="after")
    def _check_pack(self) -> "Stages":
        if getattr(self, "datasets", None):
            return self  # shared defaults may be incomplete; each dataset is checked after its keys are merged in
        if self.similarity.window > self.grid:
            raise ValueError(
                f"similarity.window is {self.similarity.window} cells, but a map may have only {self.grid} (`grid`)"
            )
        self._check_spread_frames()
        unknown = [source for source in self.pack.sources if source not in self.captions]
        if unknown:
            known = ", ".join(self.captions) or "none"
            raise ValueError(f"pack.captions names {unknown[0]!r}; captions has: {known}")
        if self.pack.text and not self.pack.sources:
            raise ValueError("pack.text packs vectors of captions, but pack.captions names no source")
        return self

    def _check_spread_frames(self) -> None:
        """Reject measures of motion on frames that lie seconds apart, at another distance in each clip."""
        measured = [name for name in ("motion", "flow") if getattr(self.pack, name)]
        if self.frames.count is None or not (measured or self.mask_quality is not None):
            return
        what = f"pack.{measured[0]}" if measured else "mask_quality"
        remedy = f"set {what} to false" if measured else "remove mask_quality"
        raise ValueError(
            f"frames.count spreads the stored frames over the clip, and {what} measures motion from one stored frame to the "
            f"next, which is then seconds away, and further in longer clips: {remedy}, or use frames.every"
        )

    @property
    def packed_guides(self) -> set[str]:
        """The mask guides that the shards contain."""
        return {guide for array in self.pack.arrays for guide in array.guides}
