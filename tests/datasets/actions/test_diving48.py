"""Diving48: classes spelled out, so that a text model understands them."""

from itertools import product
from pathlib import Path

import pytest
from benchmark_copies import Copy, make_copy

from stm.datasets import DatasetError
from stm.datasets.actions import read_benchmark
from stm.datasets.actions.diving48 import name_dive
from stm.jobs.status import Status


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy("diving48", tmp_path, monkeypatch)


def test_both_lists(copy: Copy) -> None:
    clips = [named.clip for named in read_benchmark(copy.dataset).clips]
    assert [(clip.video_id, clip.split, clip.label) for clip in clips] == [
        ("-mmq0PT-u8k_00155", "train", "back dive, 1.5 somersaults, 0.5 twists, free position"),
        ("_8Vy3dlHg2w_00000", "train", "forward dive, no somersault, no twist, straight position"),
        ("2x00lRzlTVQ_00001", "test", "forward dive, no somersault, no twist, straight position"),
    ]
    assert all(clip.start is None and clip.end is None for clip in clips)


@pytest.mark.parametrize(
    ("dive", "words"),
    [
        (["Forward", "1som", "NoTwis", "PIKE"], "forward dive, 1 somersault, no twist, pike position"),
        (["Forward", "25som", "3Twis", "PIKE"], "forward dive, 2.5 somersaults, 3 twists, pike position"),
        (["Inward", "3som", "1Twis", "TUCK"], "inward dive, 3 somersaults, 1 twist, tuck position"),
        (["Reverse", "odd", "15Twis", "NEW"], "reverse dive, odd, 1.5 twists, new position"),
    ],
)
def test_dives_are_spelled_out(dive: list[str], words: str) -> None:
    assert name_dive(dive) == words


def test_no_two_dives_that_can_be_written_have_one_name() -> None:
    somersaults = ["Dive", *(f"{n}som" for n in (1, 15, 2, 25, 3, 35, 45))]
    twists = ["NoTwis", "05Twis", *(f"{n}Twis" for n in (1, 15, 2, 25, 3, 35))]
    takeoffs, positions = ["Back", "Forward", "Inward", "Reverse"], ["FREE", "PIKE", "STR", "TUCK"]
    dives = [list(dive) for dive in product(takeoffs, somersaults, twists, positions)]
    assert len({name_dive(dive) for dive in dives}) == len(dives)


def test_labels_beyond_the_vocabulary_are_refused(copy: Copy) -> None:
    rows = '[{"vid_name": "a", "label": 2, "start_frame": 0, "end_frame": 9}, {"label": 0}, {"vid_name": "b", "label": -1}]'
    (copy.annotations / "Diving48_V2_test.json").write_text(rows)
    refused = read_benchmark(copy.dataset).refused
    assert [one.status for one in refused] == [Status.BAD_ROW] * 3
    assert "label 2 is not one of the 2" in refused[0].detail and "vid_name" in refused[1].detail


def test_a_vocabulary_of_another_form_is_an_error(copy: Copy) -> None:
    for text in ('["Back"]', '[["Back", "15som", "05Twis", 3]]', '[["a", "b", "c", "d"], ["a", "b", "c", "d"]]'):
        (copy.annotations / "Diving48_vocab.json").write_text(text)
        with pytest.raises(DatasetError, match=r"Diving48_vocab\.json"):
            read_benchmark(copy.dataset)
