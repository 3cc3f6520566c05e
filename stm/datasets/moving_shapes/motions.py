"""How the objects and the camera of `moving-shapes` move.

The label of a clip is *how* its named object moves, and a single frame must not reveal it. Position (x, y),
size and orientation are therefore four channels that follow one rule: a moving channel takes the values
`centre + amplitude * u` with u uniform on [-1, 1]; a channel at rest has a constant random value from the
same range. Each channel therefore has the same distribution over frames in every class:

- for drift, grow and spin, u changes linearly from -1 to 1 or back;
- for bounce and sway, u is a triangle wave of random phase, which is also uniform;
- a circle of random radius sqrt(1 - z^2), z uniform, is a random circle of latitude on the unit sphere, and
  by Archimedes' theorem each coordinate of a uniform point on the sphere is uniform on [-1, 1]. Radii below
  0.6 would produce hardly any motion and are excluded, which distorts the distribution slightly.

The distractors' motions are sampled independently of the label.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# motion class -> verb phrase in the captions
MOTIONS: dict[str, str] = {
    "drift_left": "drifts to the left",
    "drift_right": "drifts to the right",
    "drift_up": "drifts up",
    "drift_down": "drifts down",
    "circle_clockwise": "circles clockwise",
    "circle_counterclockwise": "circles counterclockwise",
    "grow": "grows",
    "shrink": "shrinks",
    "spin_clockwise": "spins clockwise",
    "spin_counterclockwise": "spins counterclockwise",
    "bounce": "bounces up and down",
    "sway": "sways from side to side",
}

# The channel that each class moves, and its direction. Channels: 0 x, 1 y, 2 log size, 3 angle.
_RAMPS: dict[str, tuple[int, float]] = {
    "drift_left": (0, -1.0),
    "drift_right": (0, 1.0),
    "drift_up": (1, -1.0),
    "drift_down": (1, 1.0),
    "grow": (2, 1.0),
    "shrink": (2, -1.0),
    "spin_counterclockwise": (3, -1.0),
    "spin_clockwise": (3, 1.0),
}
_WAVES: dict[str, int] = {"sway": 0, "bounce": 1}
_WAVE_CYCLES = 1.5  # per clip

TRAVEL = (0.20, 0.24)  # amplitude of x and y, as a share of the frame's short side
SIDE = 0.34  # median side of an object, as a share of the short side
ZOOM = 0.29  # amplitude of the log size: sides from 0.25 to 0.45
TURN = 1.9  # amplitude of the angle in radians: a spin turns by 218 degrees
MIN_RADIUS = 0.6  # smallest radius of a circle, as a share of the travel
SPREAD = 0.08  # maximum distance of a path's centre from the frame's centre, as a share of the short side

# With 32 frames of 128 pixels, a camera of the default amplitude moves by 1 to 5 pixels per frame along each axis, a drifting
# object by 2.
SWAY_CYCLES = (1.0, 2.0)  # per clip


@dataclass(frozen=True)
class PathSpec:
    """The path of an object over time, in radians and in pixels of a fixed camera's frame."""

    motion: str
    x: float
    y: float
    side: float
    angle: float
    travel: float  # pixels; the radius of a circle
    phase: float  # turns; only for circles and waves


@dataclass(frozen=True)
class CameraSpec:
    """A camera that sways smoothly along both axes; all values are zero for a fixed camera."""

    amplitude: tuple[float, float] = (0.0, 0.0)  # pixels
    cycles: tuple[float, float] = (0.0, 0.0)  # per clip
    phase: tuple[float, float] = (0.0, 0.0)  # turns

    @property
    def moving(self) -> bool:
        return self.amplitude != (0.0, 0.0)


def draw_path(rng: np.random.Generator, motion: str, width: int, height: int) -> PathSpec:
    """Samples a path of a motion class; the module docstring explains why channels at rest vary between clips."""
    short = min(width, height)
    travel = rng.uniform(*TRAVEL) * short
    spread = np.array([(width - short) / 2 + SPREAD * short, (height - short) / 2 + SPREAD * short])
    centre = np.array([width, height]) / 2 + rng.uniform(-1, 1, 2) * spread
    # Sampled for every motion, even if unused, so that all later random numbers are independent of the label.
    rest, size_rest = rng.uniform(-1, 1, 2) * travel, rng.uniform(-1, 1)
    phase, latitude = float(rng.random()), rng.random()
    moved = _moved_channels(motion)
    centre += np.where([channel in moved for channel in (0, 1)], 0.0, rest)
    side = SIDE * short * (1.0 if 2 in moved else float(np.exp(ZOOM * size_rest)))
    if motion.startswith("circle"):
        travel *= float(np.sqrt(1 - (latitude * np.sqrt(1 - MIN_RADIUS**2)) ** 2))
    angle = float(rng.uniform(0, 2 * np.pi))
    return PathSpec(motion, *_pair(centre), side, angle, float(travel), phase)


def _moved_channels(motion: str) -> set[int]:
    if motion in _RAMPS:
        return {_RAMPS[motion][0]}
    return {_WAVES[motion]} if motion in _WAVES else {0, 1}


def track(path: PathSpec, frames: int) -> Array:
    """The position, size and orientation over time.

    Returns:
        [F, 4]: x and y of the centre and side in pixels, angle in radians (clockwise on the screen).
    """
    offsets = np.zeros((frames, 4))
    turns = np.arange(frames) / frames
    if path.motion in _RAMPS:
        channel, direction = _RAMPS[path.motion]
        offsets[:, channel] = direction * np.linspace(-1, 1, frames)
    elif path.motion in _WAVES:
        offsets[:, _WAVES[path.motion]] = _triangle(turns * _WAVE_CYCLES + path.phase)
    else:
        # The y axis points down, so increasing angles are clockwise on the screen.
        sign = 1 if path.motion == "circle_clockwise" else -1
        around = 2 * np.pi * (sign * turns + path.phase)
        offsets[:, 0], offsets[:, 1] = np.cos(around), np.sin(around)
    place = np.array([path.x, path.y]) + path.travel * offsets[:, :2]
    side, angle = path.side * np.exp(ZOOM * offsets[:, 2]), path.angle + TURN * offsets[:, 3]
    return np.column_stack([place, side, angle])


def _triangle(turns: Array) -> Array:
    """A triangle wave of period 1 between -1 and 1."""
    return 4 * np.abs(turns - np.floor(turns + 0.5)) - 1


def draw_camera(
    rng: np.random.Generator, width: int, height: int, amplitude_range: tuple[float, float], scale: float = 1.0
) -> CameraSpec:
    """Samples a moving camera; `amplitude_range` is in shares of the short side, and `scale` reduces the amplitude."""
    amplitude = rng.uniform(*amplitude_range, 2) * min(width, height) * scale
    cycles, phase = rng.uniform(*SWAY_CYCLES, 2), rng.random(2)
    return CameraSpec(_pair(amplitude), _pair(cycles), _pair(phase))


def _pair(values: Array) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def camera_track(camera: CameraSpec, frames: int) -> Array:
    """[F, 2]: the displacement of the camera in pixels; the content of the frame moves in the opposite direction."""
    turns = np.arange(frames)[:, None] / frames
    return np.array(camera.amplitude) * np.sin(2 * np.pi * (turns * camera.cycles + np.array(camera.phase)))
