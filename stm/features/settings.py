"""How clips are taken from videos and put through a model: what the commands and functions have in common."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import get_args

from stm.config import Frames, Interpolation, Sampling
from stm.features.cutting import CropPlan
from stm.features.windows import WindowPlan
from stm.preprocess.video.random_access import Backend

EVERY = Frames().every or 4  # frames of a video from one of a window's frames to the next, as packing stores them
SHORT_SIDE = Frames().short_side


class FeatureError(ValueError):
    """Inputs, options or weights that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ClipSettings:
    """Which windows of a video a model sees, and how they are computed; None: as the weights or `SHORT_SIDE` say."""

    frames: int | None = None  # per window; None: the weights'
    every: int | None = (
        None  # frames from one to the next; None: `EVERY` times the run's stride, in shards the run's stride
    )
    windows: int | None = None  # spread evenly over the video
    stride_seconds: float | None = None  # instead: sliding windows
    stride_frames: int | None = None
    sampling: Sampling | None = None
    crops: int | None = None  # 1 or 3
    whole: bool = False  # squash the whole frame instead of cropping
    interpolation: Interpolation = "area"
    short_side: int | None = None  # of decoded frames, in pixels
    backend: Backend = "pyav"
    # These change no value, apart from rounding.
    processes: int = 1
    batch_size: int = 16  # clips
    device: str | None = None
    precision: str = "float32"  # or bf16
    timeout_seconds: float = 600.0  # per window, after which a decoder is killed

    def check(self) -> None:
        """Check the options before any work is done.

        Raises:
            FeatureError: an option is out of range, or two contradict each other.
        """
        for name in ("frames", "every", "windows", "stride_frames", "processes", "batch_size"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= 100_000:
                raise FeatureError(f"{name} must be 1 to 100,000, is {value}")
        strides = [value for value in (self.stride_seconds, self.stride_frames) if value is not None]
        if len(strides) > 1 or (strides and self.windows is not None):
            raise FeatureError(
                "windows are either spread (windows) or slide (stride or stride_frames): give only one of them"
            )
        if self.stride_seconds is not None and not 1e-3 <= self.stride_seconds < float("inf"):
            raise FeatureError(f"stride must be at least 0.001 seconds, is {self.stride_seconds}")
        if strides and self.sampling in ("tsn", "sparse"):
            raise FeatureError(
                f"windows of the sampling {self.sampling} cover the whole video and cannot slide: use windows"
            )
        for name, known in (("backend", get_args(Backend)), ("sampling", (None, *get_args(Sampling)))):
            if getattr(self, name) not in known:
                raise FeatureError(
                    f"{name} must be one of {', '.join(filter(None, known))}, is {getattr(self, name)!r}"
                )
        if self.backend == "decord" and find_spec("decord") is None:  # otherwise an error of each video
            raise FeatureError(
                "the backend decord needs a library that is not installed: pip install 'stm-video[decord]'"
            )
        if not self.timeout_seconds > 0:
            raise FeatureError(f"timeout must be a positive number of seconds, is {self.timeout_seconds}")
        if self.crops not in (None, 1, 3):
            raise FeatureError(f"crops must be 1 or 3, is {self.crops}")
        if self.short_side is not None and not 32 <= self.short_side <= 2160:
            raise FeatureError(f"short_side must be 32 to 2160 pixels, is {self.short_side}")
        if self.precision not in ("float32", "bf16"):
            raise FeatureError(f"precision must be float32 or bf16, is {self.precision}")


@dataclass(frozen=True)
class Protocol:
    """How a run's clips were sampled, as far as a file beside its weights says so."""

    sampling: Sampling = "dense"
    stride: int = 1  # stored frames
    views: int | None = None  # of the test of a fine-tuned classifier
    crops: int | None = None


@dataclass(frozen=True)
class ClipPlan:
    """The settings, complete: all that decides the pixels of a window."""

    windows: WindowPlan  # of videos
    crops: CropPlan
    short_side: int  # pixels
    backend: Backend
    shard_every: int  # stored frames from one of a window's frames to the next, in packed clips

    @classmethod
    def of(cls, settings: ClipSettings, protocol: Protocol, image_size: int, frames: int, windows: int) -> "ClipPlan":
        """Complete the settings.

        Args:
            image_size, frames: of the model.
            windows: default number of windows.
        """
        sampling = settings.sampling or (
            "dense" if settings.stride_seconds or settings.stride_frames else protocol.sampling
        )
        step = protocol.stride if sampling == "dense" else 1
        plan = WindowPlan(
            frames,
            settings.every or EVERY * step,
            settings.windows or protocol.views or windows,
            settings.stride_seconds,
            settings.stride_frames,
            sampling,
        )
        crops = CropPlan(image_size, settings.crops or protocol.crops or 1, settings.whole, settings.interpolation)
        short_side = settings.short_side or max(SHORT_SIDE, image_size)
        return cls(plan, crops, short_side, settings.backend, settings.every or step)

    @property
    def shard_windows(self) -> WindowPlan:
        """The windows of packed clips, whose frames are counted as stored."""
        return replace(self.windows, every=self.shard_every)

    def with_crops(self, crops: int) -> "ClipPlan":
        """The same with another number of crops."""
        return replace(self, crops=replace(self.crops, crops=crops))

    @property
    def clips_per_window(self) -> int:
        """Number of crops."""
        return 1 if self.crops.whole else self.crops.crops
