"""The display matrix: how a coded picture is turned before it is shown. PyAV hands it over and does not apply it."""

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Orientation:
    """How the coded picture is turned before it is shown: first transposed, then mirrored along x and y."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """From the frame's display matrix, rounded to right angles; the same as ffmpeg's own rotation."""
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls()
        # x' = a x + c y, y' = b x + d y, with x to the right and y down
        a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after turning."""
        return (height, width) if self.transpose else (width, height)

    def turn(self, picture: NDArray[Any]) -> NDArray[Any]:
        """Turns an array whose first two axes are rows and columns."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def turn_vectors(self, field: NDArray[Any]) -> NDArray[Any]:
        """Turns a field of (x, y) vectors, [rows, columns, 2]: the places and the vectors themselves."""
        field = self.turn(field)
        if self.transpose:
            field = field[..., ::-1]
        return field * np.array([-1 if self.flip_x else 1, -1 if self.flip_y else 1], field.dtype)
