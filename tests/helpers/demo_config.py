"""The demo's config with its pretraining dataset alone, for tests of configs with one `dataset`."""

import copy
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).parents[2] / "config/demo.yaml"


def demo_values(dataset: str = "shapes") -> dict[str, Any]:
    """Return the demo's config, as written, with the keys of one of its datasets at the top level."""
    values: dict[str, Any] = yaml.safe_load(PATH.read_text())
    values |= values.pop("datasets")[dataset]
    for section in ("pretrain", "evaluate"):
        for name, entry in values[section].items():
            # Runs share mappings through the file's anchors; a test changes those of one run.
            values[section][name] = {key: copy.deepcopy(value) for key, value in entry.items() if key != "dataset"}
    return values
