"""Small shards, written from the format's description."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference_shards import make_clip, write_shard


@pytest.fixture
def clip() -> Callable[..., dict[str, Any]]:
    return make_clip


@pytest.fixture
def shard() -> Callable[[Path, list[dict[str, Any]]], Path]:
    return write_shard
