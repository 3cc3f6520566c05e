"""The demo's config with its pretraining dataset alone, for tests of configs with one `dataset`."""

import copy
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).parents[2] / "config/demo.yaml"


def demo_values(dataset: str = "shapes") -> dict[str, Any]:
    """Return the demo's config with the keys of one of its datasets at the top level, and without its expectations.

    Expectations name runs and evaluations, which tests replace.
    """
    values: dict[str, Any] = yaml.safe_load(PATH.read_text())
    values |= values.pop("datasets")[dataset]
    values["report"] = {key: value for key, value in values["report"].items() if key != "expect"}
    for section in ("pretrain", "evaluate"):
        for name, entry in values[section].items():
            # Runs share mappings through the file's anchors; a test changes those of one run.
            values[section][name] = {key: copy.deepcopy(value) for key, value in entry.items() if key != "dataset"}
    return values
