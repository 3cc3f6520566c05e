"""The untrained runs that a column of a paper's table is compared with are read by the column's own metric."""

from pathlib import Path
from typing import Any

import pytest
from report_study import CONTRAST, RUN, make_headline, make_study_config

from stm.layout import Layout
from stm.report.paper.tables import paper_table
from stm.storage.files import write_json

# R@1 of both directions, the headline's first.
R1 = {"text": (0.8, 0.6), "attentive": (0.2, 0.3), "blank": (0.1, 0.7)}


@pytest.mark.parametrize(("metric", "bold"), [(None, ["Text"]), ("video_to_text.r1", [])])
def test_a_run_without_a_row_is_compared_by_the_column_s_metric(
    metric: str | None, bold: list[str], tmp_path: Path
) -> None:
    """Untrained, the run is the worst by the headline and the best from videos to texts."""
    mask = {"strategy": "tube", "ratio": 0.75}
    runs: dict[str, Any] = {name: {**RUN, **CONTRAST, "mask": mask} for name in R1}
    runs["blank"]["optimisation"] = {"epochs": 0}
    column = {"title": "R@1", "task": "retrieval"} | ({"metric": metric} if metric else {})
    rows = [{"label": "Text", "runs": "text"}, {"label": "Attention", "runs": "attentive"}]
    config = make_study_config(
        tmp_path,
        seeds=[0],
        pretrain=runs,
        evaluate={"retrieval": {"task": "retrieval"}},
        tables={"main": {"title": "Directions", "columns": [column], "rows": rows}},
        figures={},
    )
    for instance, _ in config.evaluations():
        both = R1[instance.removesuffix("-seed0")]
        ways = dict(zip(("text_to_video", "video_to_text"), both, strict=True))
        intervals = {way: {"r1": [value - 0.05, value + 0.05]} for way, value in ways.items()}
        headline = make_headline("text_to_video.r1", "R@1", both[0], intervals["text_to_video"]["r1"], 0.01)
        figures = {way: {"r1": value} for way, value in ways.items()}
        path = Layout.of(config).evaluate(instance, "retrieval") / "metrics.json"
        chance = {"r1": 0.01}
        write_json(
            path, {"task": "retrieval", "headline": headline, **figures, "confidence95": intervals, "chance": chance}
        )
    table = paper_table(config, "main")
    assert [row[0].text for row in table.rows if row[1].bold] == bold
    assert [row[1].text for row in table.rows] == (["80.0", "20.0"] if metric is None else ["60.0", "30.0"])
