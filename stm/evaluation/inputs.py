"""What an evaluation reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Splits(NamedTuple):
    """Indexes of the packed shards: `shards/{split}/{shard}.parquet`, and what their benchmark says of their captions."""

    train: Sequence[Path]
    validation: Sequence[Path]  # empty where the task names no such split
    test: Sequence[Path]
    # Clips with an equal caption share it: it asks once, and each of them is right (SSv2). Else a caption means its clip alone.
    shared_texts: bool = False
