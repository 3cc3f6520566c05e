"""These tests evaluate on the shards that the tests of training make, and on the small runs with text of the methods' tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("training", "methods")]
