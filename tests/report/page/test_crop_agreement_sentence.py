"""The page's sentence about masks from cached maps, from the file that the stage writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from stm.config import parse_config
from stm.layout import Layout
from stm.report.page.sentences import crop_agreement
from stm.report.results.collect import collect

MEASURED = {"iou": 0.6544, "low": 0.6366, "high": 0.6736, "chance_iou": 0.4241, "crops": 200, "ratio": 0.6}
SMALLER = {"smaller_iou": 0.6151, "smaller_crops": 153}


@pytest.mark.parametrize(
    ("values", "dataset", "parts"),
    [
        (MEASURED, "", ["Similarity maps are cached", "0.654 [0.637, 0.674]; for two random masks it is 0.424."]),
        (
            MEASURED | SMALLER,
            "clips",
            [
                "Similarity maps of clips are",
                "On 200 random crops",
                "0.654 [0.637, 0.674] (0.615 on the 153 of them with less",
            ],
        ),
        (MEASURED | {"smaller_iou": None, "smaller_crops": 0}, "", ["0.654 [0.637, 0.674]; for two random masks"]),
    ],
)
def test_the_page_states_how_well_masks_agree(
    values: dict[str, Any], dataset: str, parts: list[str], tmp_path: Path
) -> None:
    config = parse_config({"name": "mine", "dataset": {"source": "folder", "root": "videos"}, "results": str(tmp_path)})
    layout = Layout.of(config)
    assert crop_agreement(collect(config, layout)) == ""
    layout.crop_agreement.parent.mkdir(parents=True)
    layout.crop_agreement.write_text(json.dumps(values))
    said = crop_agreement(collect(config, layout), dataset)
    assert [part for part in parts if part not in said] == []
