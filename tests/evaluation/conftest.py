"""These tests evaluate on the shards that the tests of training make."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
