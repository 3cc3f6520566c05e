"""Small shards, written from the format's description."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference_shards import make_clip, write_shard

from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry


@pytest.fixture
def clip() -> Callable[..., dict[str, Any]]:
    return make_clip


@pytest.fixture
def shard() -> Callable[[Path, list[dict[str, Any]]], Path]:
    return write_shard


@pytest.fixture
def open_clips(tmp_path: Path, shard: Callable, clip: Callable) -> Callable[..., ClipDataset]:
    """Opens a data set of broad, high and short clips."""
    shapes = [{"width": 80, "height": 64}, {"width": 48, "height": 72}, {"width": 64, "height": 64, "frames": 3}]
    path = shard(tmp_path / "train-00000.parquet", [clip(n, **shapes[n % 3]) for n in range(6)])

    def build(**changes: Any) -> ClipDataset:
        augmentation = Augmentation(crop="random_resized", scale=(0.1, 1.0))
        arguments = {"geometry": Geometry(32, 8, 2, 4, 2), "augmentation": augmentation, "seed": 3, "train": True}
        return ClipDataset([path], **{**arguments, "repeats": 2, **changes})

    return build
