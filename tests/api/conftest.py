"""A folder of results with small shards of two splits, opened as a user would."""

from pathlib import Path

import pytest
from training_shards import make_shard


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a dataset: 7 clips of `train` in two shards, 3 of `test`; 40 x 32 pixels, 6 frames, 4 x 5 cells."""
    folder = tmp_path_factory.mktemp("results") / "shapes"
    make_shard(folder / "shards/train/train-00000.parquet", ["red", "green", "blue", None], prefix="a")
    make_shard(folder / "shards/train/train-00001.parquet", ["blue", "red", "red"], seed=1, prefix="b")
    make_shard(folder / "shards/test/test-00000.parquet", ["green", "red", "blue"], seed=2, prefix="c")
    return folder
