"""Small random weights, and features computed by hand from frames that the ffmpeg program decodes."""

from pathlib import Path

import cv2
import numpy as np
import torch
from synthetic_videos import decode_by_program

from stm.models.architecture import Architecture
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo

SIZE = 32
FRAMES = 4
SMALL = Architecture(SIZE, 16, 2, FRAMES, 48, 2, 3, 0, 0, 0)


def save_encoder(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    zoo.save(VideoEncoder(SMALL), path)
    return path


def decode_by_hand(
    path: Path, width: int, height: int, every: int, flags: str = "area+accurate_rnd+bitexact"
) -> np.ndarray:
    """Every `every`-th frame, decoded and resized to [height, width] by the ffmpeg program: uint8 [F, height, width, 3]."""
    select = f"select='not(mod(n,{every}))',scale={width}:{height}:flags={flags}"
    return decode_by_program(path, width, height, "-vf", select)


def crop_by_hand(frames: np.ndarray, left: int = -1) -> np.ndarray:
    """The central square of landscape frames, or that at `left`, resized: uint8 [F, 3, SIZE, SIZE]."""
    height, width = frames.shape[1:3]
    left = (width - height) // 2 if left < 0 else left
    resized = [
        cv2.resize(frame[:, left : left + height], (SIZE, SIZE), interpolation=cv2.INTER_AREA) for frame in frames
    ]
    return np.stack(resized).transpose(0, 3, 1, 2)


@torch.inference_mode()
def encode_by_hand(weights: Path, clips: list[np.ndarray]) -> np.ndarray:
    """Tokens of clips, uint8 [T, 3, S, S] each, one at a time: float32 [clips, L, width]."""
    encoder = zoo.load_encoder(weights).eval()
    return torch.cat([encoder(torch.from_numpy(clip)[None]) for clip in clips]).numpy()
