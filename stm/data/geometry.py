"""The shape of a training clip, in pixels and in tokens."""

from dataclasses import dataclass

from stm.config import EvaluationTask, Run, Sampling


@dataclass(frozen=True)
class Geometry:
    """How a clip is divided: frames of `image_size`^2 pixels into tubelets of `tubelet` x `patch_size`^2."""

    image_size: int  # pixels
    patch_size: int  # pixels
    tubelet: int  # frames
    frames: int  # sampled frames per clip
    stride: int = 1  # stored frames from one sampled frame to the next, with dense sampling
    sampling: Sampling = "dense"

    @classmethod
    def of(cls, run: Run, task: EvaluationTask | None = None) -> "Geometry":
        """The geometry of a run's clips, or of an evaluation's, whose stride, sampling and, with text, length may differ."""
        stride = run.stride if task is None or task.stride is None else task.stride
        sampling = run.sampling if task is None or task.sampling is None else task.sampling
        frames = getattr(task, "frames", None) or run.frames
        return cls(run.image_size, run.patch_size, run.tubelet, frames, stride, sampling)

    @property
    def slots(self) -> int:
        """Time slots per clip."""
        return self.frames // self.tubelet

    @property
    def side(self) -> int:
        """Tokens per side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens per slot, N."""
        return self.side**2

    def step(self, stored: int) -> int:
        """Stored frames from one sampled frame to the next in a clip of `stored` frames; the mean unless `dense`."""
        return self.stride if self.sampling == "dense" else max(1, stored // self.frames)
