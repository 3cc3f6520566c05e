"""Frame orientation from a video's display matrix (which PyAV does not apply) or an image file's EXIF tag."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stm.storage.machine_errors import is_machine_error

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Orientation:
    """The transform from the coded to the displayed frame: transposed first, then mirrored along x and y."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """Read the frame's display matrix, rounded to right angles; the result equals ffmpeg's rotation."""
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls()
        # x' = a x + c y, y' = b x + d y, with x to the right and y down
        a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, a < 0, d < 0)
        return cls(True, c < 0, b < 0)

    @classmethod
    def of_image_file(cls, path: Path) -> "Orientation":
        """Read the EXIF orientation of an image file, 1 to 8."""
        # Read with PIL, because PyAV does not export EXIF, and a rotation angle alone does not include mirroring.
        try:
            with Image.open(path) as image:  # reads the header only
                tag = image.getexif().get(_EXIF_ORIENTATION, 1)
        except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
            if is_machine_error(error):
                raise
            tag = 1  # the decoder will report the problem with the file
        return cls(tag in (5, 6, 7, 8), tag in (2, 3, 6, 7), tag in (3, 4, 7, 8))

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height after the transform, which is its own inverse for sizes."""
        return (height, width) if self.transpose else (width, height)

    def turn(self, image: NDArray[Any]) -> NDArray[Any]:
        """Transform an array [rows, columns, ...] from the coded to the displayed orientation."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def turn_vectors(self, field: NDArray[Any]) -> NDArray[Any]:
        """Transform a field of (x, y) vectors, [rows, columns, 2]: both their positions and their directions."""
        field = self.turn(field)
        if self.transpose:
            field = field[..., ::-1]
        if not (self.flip_x or self.flip_y):
            return field
        return field * np.array([-1 if self.flip_x else 1, -1 if self.flip_y else 1], field.dtype)
