"""The shape of a training clip, in pixels and in tokens."""

from dataclasses import dataclass

from stm.config import PretrainRun


@dataclass(frozen=True)
class Geometry:
    """How a clip is cut: frames of `image_size`^2 pixels into tubelets of `tubelet` x `patch_size`^2."""

    image_size: int  # pixels
    patch_size: int  # pixels
    tubelet: int  # frames
    frames: int  # stored frames
    stride: int = 1  # stored frames from one frame of the clip to the next

    @classmethod
    def of(cls, run: PretrainRun) -> "Geometry":
        return cls(run.image_size, run.patch_size, run.tubelet, run.frames, run.stride)

    @property
    def slots(self) -> int:
        """Time slots of a clip."""
        return self.frames // self.tubelet

    @property
    def side(self) -> int:
        """Tokens on a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of a slot, N."""
        return self.side**2
