"""Something-Something V2: templates as labels, what was written for the video as caption."""

import json
from pathlib import Path

import pytest
from benchmark_copies import Copy, make_copy

from stm.datasets.actions import check_benchmark, read_benchmark
from stm.jobs.status import Status


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy("something-something-v2", tmp_path, monkeypatch)


def test_labels_are_templates_without_brackets_and_captions_name_the_objects(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.dataset).clips]
    assert [(clip.video_id, clip.split, clip.label, clip.captions) for clip in clips] == [
        ("78687", "train", "Holding something next to something", ("holding potato next to vicks vaporub bottle",)),
        ("8675", "train", "Stacking number of something", ("stacking 3 \u201ccoins\u201d",)),
        ("36585", "val", "Something falling like a feather or paper", ("plastic falling like a feather or paper",)),
    ]
    assert {clip.path.rpartition(".")[2] for clip in clips} == {"webm"}


def test_the_first_release_names_its_files_in_full(copy: Copy) -> None:
    for name in ("labels", "train", "validation", "test"):
        old = copy.annotations / f"something-something-v2-{name}.json"
        (copy.annotations / "labels" / f"{name}.json").rename(old)
    assert check_benchmark(copy.dataset).is_complete


def test_an_unknown_template_and_a_row_without_one_are_refused(copy: Copy) -> None:
    rows = [{"id": "1", "label": "x", "template": "Eating [something]"}, {"id": "2", "label": "y"}, 7]
    rows += [{"id": "3", "label": "\ud800", "template": "Stacking [number of] [something]"}]
    (copy.annotations / "labels/train.json").write_text(json.dumps(rows))
    refused = read_benchmark(copy.dataset).refused
    assert [one.status for one in refused] == [Status.BAD_ROW] * 4
    assert [text in one.detail for one, text in zip(refused, ("Eating", "template", "7", "Unicode"), strict=True)]
    assert "train.json, entry 0" in refused[0].detail
