"""How a coded picture is turned before it is shown: a video's display matrix, which PyAV hands over and does not apply, or
a picture file's EXIF mark.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_EXIF_ORIENTATION = 0x0112


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

    @classmethod
    def of_picture(cls, path: Path) -> "Orientation":
        """From a picture file's EXIF orientation, 1 to 8. PyAV cannot say it: its list of side data does not know EXIF,
        and an angle alone does not tell what is mirrored.
        """
        try:
            with Image.open(path) as picture:  # reads the header, decodes nothing
                mark = picture.getexif().get(_EXIF_ORIENTATION, 1)
        except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
            mark = 1  # the decoder says what is wrong with the file
        return cls(mark in (5, 6, 7, 8), mark in (2, 3, 6, 7), mark in (3, 4, 7, 8))

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
        if not (self.flip_x or self.flip_y):
            return field
        return field * np.array([-1 if self.flip_x else 1, -1 if self.flip_y else 1], field.dtype)
