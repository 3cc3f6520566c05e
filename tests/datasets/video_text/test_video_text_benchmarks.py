"""Benchmarks of videos with text: one clip per video, with all its captions and questions; wrong copies are reported."""

import json
from pathlib import Path
from typing import Any

import pytest
from language_copies import build, make_benchmark, make_dataset, write_list
from test_probe import make_video

from stm.config import Config, LanguageDataset, parse_config
from stm.datasets import DatasetError, list_fingerprint
from stm.datasets.video_text import check_language, clean_text, read_answers, read_language
from stm.jobs.status import Status
from stm.manifest import Question
from stm.storage.tables import read_receipt, read_table

RETRIEVAL: dict[str, Any] = {
    "train": [
        {"video": "video1.mp4", "caption": "A man, driving.", "duration": 12.3},
        {"video": "video2.mp4", "caption": "a dog"},
        {"video": "video1.mp4", "caption": "someone drives a car"},
    ],
    "test": [{"video": "video7.mp4", "caption": "two men talk"}],
}
VIDEOS = ["all/video1.mp4", "all/video2.mp4", "all/video7.mp4"]


@pytest.fixture
def msrvtt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageDataset:
    sizes = {"train": 2, "test": 1}
    return make_benchmark("msrvtt", tmp_path, monkeypatch, RETRIEVAL, VIDEOS, sizes, {"test": 1})


def clips_by_id(dataset: LanguageDataset) -> dict[str, Any]:
    return {named.video_id: named.clip for named in read_language(dataset).clips}


# ------------------------------------------------------------------------------------------------ formats


def test_a_video_is_one_clip_with_all_its_captions_as_written(msrvtt: LanguageDataset) -> None:
    clips = clips_by_id(msrvtt)
    assert {name: clip.captions for name, clip in clips.items()} == {
        "video1": ("A man, driving.", "someone drives a car"),
        "video2": ("a dog",),
        "video7": ("two men talk",),
    }
    assert [(clip.path, clip.split, clip.end) for clip in clips.values()] == [
        ("all/video1.mp4", "train", None),
        ("all/video2.mp4", "train", None),
        ("all/video7.mp4", "test", None),
    ]
    report = check_language(msrvtt)
    assert report.is_official and report.is_complete
    assert "  train            2            2            2            3            ?" in report.table()
    assert "  test             1            1            1            1            1" in report.table()


def test_paragraphs_are_joined_and_only_the_first_thirty_seconds_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"video": "5@N00_1_a.b.mp4", "caption": ["first she runs.", "then, she jumps"]}
    lists = {"train": [entry], "val": [], "test": [{"video": "x.mov", "caption": "alone"}]}
    dataset = make_benchmark("didemo", tmp_path, monkeypatch, lists, ["5@N00_1_a.b.avi", "x.mp4"], {"test": [2, 1]})
    clips = clips_by_id(dataset)
    assert clips["5@N00_1_a.b"].captions == ("first she runs. then, she jumps",)
    assert clips["x"].captions == ("alone",)
    assert {clip.end for clip in clips.values()} == {30.0} and {clip.start for clip in clips.values()} == {None}
    assert check_language(dataset).splits["train"].texts == 1


def test_several_captions_that_are_no_paragraph_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["a man sings", "a person is singing", ""]
    lists = {split: [{"video": f"{split}.avi", "caption": captions}] for split in ("train", "val", "test")}
    files = [f"{split}.avi" for split in lists]
    clips = clips_by_id(make_benchmark("msvd", tmp_path, monkeypatch, lists, files))
    assert [clip.captions for clip in clips.values()] == [("a man sings", "a person is singing")] * 3


def test_a_text_of_several_videos_belongs_to_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {
        "train": [{"image": "1.webm", "caption": "Opening [something]"}],
        "test": [{"video": ["2.webm", "3.webm"], "caption": "Closing [something]"}, {"video": [], "caption": "x"}],
    }
    dataset = make_benchmark("ssv2-template", tmp_path, monkeypatch, lists, ["1.webm", "2.webm", "3.webm"])
    clips = clips_by_id(dataset)
    assert clips["2"].captions == clips["3"].captions == ("Closing [something]",) and clips["1"].split == "train"
    assert [one.status for one in read_language(dataset).refused] == [Status.BAD_ROW]


def test_questions_of_a_video_come_together_and_several_answers_weigh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {
        "train": [
            {"video": "v1.mp4", "question": "who drives?", "answer": "man", "question_id": 0},
            {"video": "v1.mp4", "question": "what is it?", "answer": ["car", "car", "bus"], "question_id": 1},
        ],
        "val": [],
        "test": [{"video": "v2.mp4", "question": "where?", "answer": "road", "question_id": "v2_1"}],
    }
    files = ["v1.mp4", "v2.mp4"]
    sizes = {"train": 4, "test": 1}
    dataset = make_benchmark("activitynet-qa", tmp_path, monkeypatch, lists, files, texts=sizes)
    clips = clips_by_id(dataset)
    answers = [Question("who drives?", "man")] + [Question("what is it?", a) for a in ("car", "car", "bus")]
    assert clips["v1"].questions == tuple(answers) and clips["v1"].captions == ()
    assert check_language(dataset).is_complete
    write_list(tmp_path / "lists/anet_qa_answer_list.json", ["man", "car"])
    assert read_answers(dataset) == ("man", "car")
    write_list(tmp_path / "lists/anet_qa_answer_list.json", {"man": 0})
    with pytest.raises(DatasetError, match="must hold a list"):
        read_answers(dataset)


CHOICES = ["a boy", "a trailer", "a man talks", "a boat", "a dance"]


def test_a_multiple_choice_has_its_five_captions_and_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {
        "train": RETRIEVAL["train"],
        "test": [{"video": "video7.mp4", "caption": CHOICES, "answer": 3}]
        + [{"video": "video8.mp4", "caption": CHOICES, "answer": answer} for answer in (5, -1, "no", None)]
        + [{"video": "video9.mp4", "caption": "one", "answer": 0}],
    }
    dataset = make_benchmark("msrvtt-mc", tmp_path, monkeypatch, lists, VIDEOS, partial=True)
    clip = clips_by_id(dataset)["video7"]
    assert clip.questions == (Question("", "a boat", tuple(CHOICES)),) and clip.captions == ("a boat",)
    found = read_language(dataset)
    assert [one.status for one in found.refused] == [Status.BAD_ROW] * 5
    assert found.report.splits["test"].texts == 1 and "`answer` must be from 0 to 4, is 5" in found.report.describe()


def test_the_release_of_msrvtt_is_split_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def release(videos: dict[str, str]) -> dict[str, Any]:
        sentences = [{"video_id": v, "caption": f"{v} {n}", "sen_id": n} for n in (1, 2) for v in videos]
        return {"videos": [{"video_id": v, "split": s} for v, s in videos.items()], "sentences": sentences}

    files = [f"video{number}.mp4" for number in range(3)]
    sizes = {"train": 2, "val": 2, "test": 2}
    dataset = make_benchmark("msrvtt-captioning", tmp_path, monkeypatch, {}, files, dict.fromkeys(sizes, 1), sizes)
    write_list(tmp_path / "lists/train_val_videodatainfo.json", release({"video0": "train", "video1": "validate"}))
    write_list(tmp_path / "lists/test_videodatainfo.json", release({"video2": "test"}))
    clips = clips_by_id(dataset)
    assert {name: clip.split for name, clip in clips.items()} == {"video0": "train", "video1": "val", "video2": "test"}
    assert clips["video1"].captions == ("video1 1", "video1 2") and check_language(dataset).is_complete
    together = release({"video0": "train", "video1": "validate", "video2": "test"})  # as another copy has it
    for name in ("train_val_videodatainfo.json", "test_videodatainfo.json"):
        (tmp_path / "lists" / name).unlink()
    write_list(tmp_path / "lists/MSRVTT_data.json", together)
    assert clips_by_id(dataset) == clips


def test_names_with_dots_and_no_ending_find_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["0001_A/0001_A_00.00.51.926-00.00.54.129", "0001_A/0001_A_00.00.55.967-00.00.59.752.avi"]
    lists = {"train": [{"video": name, "caption": "x"} for name in names], "val": [], "test": []}
    files = [f"{names[0]}.avi", names[1].replace(".avi", ".mp4")]
    dataset = make_benchmark("lsmdc", tmp_path, monkeypatch, lists, files)
    assert [clip.path for clip in clips_by_id(dataset).values()] == files
    for file in files:  # a flat copy
        (tmp_path / "root" / file).rename(tmp_path / "root" / file.rpartition("/")[2])
    assert len(clips_by_id(dataset)) == 2


def test_cleaning_is_umts_and_done_once_is_done() -> None:
    text = '  <PERSON>\'s re-make, of A/B: (2 nd) "cut"; #1 ~* really?!\n'
    assert clean_text(text) == "persons re make of a b 2 nd cut 1 really"
    assert clean_text(clean_text(text)) == clean_text(text) and clean_text("?!") == ""


# ------------------------------------------------------------------------------------------------ what is refused


def test_lists_of_another_size_are_refused_even_if_partial(
    msrvtt: LanguageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sizes, texts in (({"train": 3, "test": 1}, {}), ({"train": [9, 3], "test": 1}, {}), ({}, {"test": 2})):
        dataset = make_benchmark("msrvtt", tmp_path, monkeypatch, RETRIEVAL, VIDEOS, sizes, texts, partial=True)
        with pytest.raises(DatasetError, match=r"not the official ones.*\n.*(\n.*)*VindLU"):
            check_language(dataset)
    assert check_language(make_benchmark("msrvtt", tmp_path, monkeypatch, RETRIEVAL, VIDEOS)).is_official  # unknown


def test_missing_files_are_reported_with_counts_and_allowed_when_partial(msrvtt: LanguageDataset) -> None:
    (Path(msrvtt.root) / VIDEOS[1]).unlink()
    with pytest.raises(
        DatasetError, match=r"1 videos have no file. The first of 1 missing files:\n  video2\.mp4\n.*partial: true"
    ):
        check_language(msrvtt)
    partial = msrvtt.model_copy(update={"partial": True})
    found = read_language(partial)
    assert check_language(partial, found).found == 2
    assert [(one.path, one.status) for one in found.refused] == [("video2.mp4", Status.MISSING_FILE)]
    for name in (VIDEOS[0], VIDEOS[2]):
        (Path(msrvtt.root) / name).unlink()
    with pytest.raises(DatasetError, match="has no file of MSR-VTT"):
        check_language(partial)


@pytest.mark.parametrize("path", ["../x.mp4", "a/../../x.mp4", "/etc/passwd", "a\x00.mp4"])
def test_a_path_out_of_the_root_is_refused(
    path: str, msrvtt: LanguageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.mp4").touch()
    lists = {**RETRIEVAL, "test": [{"video": path, "caption": "x"}, *RETRIEVAL["test"]]}
    dataset = make_benchmark("msrvtt", tmp_path, monkeypatch, lists, [*VIDEOS, "x.mp4"])
    found = read_language(dataset)
    assert [one.status for one in found.refused] == [Status.PATH_OUTSIDE_ROOT] and len(found.clips) == 3
    with pytest.raises(DatasetError, match="stay under it"):
        check_language(dataset)


@pytest.mark.parametrize(
    "entry",
    [
        *(3, None, [], {}, {"video": 3.5}, {"video": "a.mp4"}, {"video": "\ud800", "caption": "x"}),
        *({"video": "a.mp4", "caption": caption} for caption in ("", [], [None, 1.5], {"a": 1})),
    ],
)
def test_a_bad_entry_is_refused_and_does_not_stop_the_others(
    entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {**RETRIEVAL, "train": [entry, *RETRIEVAL["train"]]}
    found = read_language(make_benchmark("msrvtt", tmp_path, monkeypatch, lists, VIDEOS))
    assert [one.status for one in found.refused] == [Status.BAD_ROW] and len(found.clips) == 3
    assert "msrvtt_ret_train9k.json, entry 0" in found.refused[0].detail


def test_a_video_in_two_splits_is_used_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {**RETRIEVAL, "test": RETRIEVAL["train"][:1]}
    dataset = make_benchmark("msrvtt", tmp_path, monkeypatch, lists, VIDEOS)
    assert [one.status for one in read_language(dataset).refused] == [Status.DUPLICATE_ID]
    with pytest.raises(DatasetError, match="video1: an earlier clip has this video_id"):
        check_language(dataset)


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xfe\x00", b"<html>404</html>", b"{}"])
def test_damaged_and_missing_lists_are_readable_errors(rubbish: bytes, msrvtt: LanguageDataset) -> None:
    path = Path(msrvtt.annotations) / "msrvtt_ret_test1k.json"
    path.write_bytes(rubbish)
    with pytest.raises(DatasetError, match=r"msrvtt_ret_test1k\.json"):
        read_language(msrvtt)
    path.unlink()
    with pytest.raises(DatasetError, match=r"no msrvtt_ret_test1k\.json"):
        read_language(msrvtt)
    with pytest.raises(DatasetError, match="is not a folder"):
        read_language(msrvtt.model_copy(update={"annotations": "nowhere"}))


# ------------------------------------------------------------------------------------------------ the manifest


def config_of(dataset: LanguageDataset, **more: Any) -> Config:
    return parse_config({"name": "test", "dataset": dataset.model_dump(mode="json"), **more})


def test_the_manifest_has_choices_trims_and_the_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    video = make_video(tmp_path / "video.mp4", frames=4).read_bytes()
    lists = {"train": RETRIEVAL["train"], "test": [{"video": "video7.mp4", "caption": CHOICES, "answer": 0}]}
    dataset = make_benchmark("msrvtt-mc", tmp_path / "mc", monkeypatch, lists, VIDEOS)
    for name in VIDEOS:
        (Path(dataset.root) / name).write_bytes(video)
    manifest, _ = build(config_of(dataset), tmp_path / "out", monkeypatch)
    rows = {row["video_id"]: row for row in read_table(manifest).to_pylist()}
    assert rows["video7"]["questions"] == [{"question": "", "answer": CHOICES[0], "choices": CHOICES}]
    assert rows["video1"]["questions"] == [] and len(rows["video1"]["captions"]) == 2
    assert "MSR-VTT multiple choice: videos" in capfd.readouterr().err
    receipt = read_receipt(manifest)["settings"]["dataset"]
    assert receipt["protocol"]["task"] == "multiple_choice" and "root" not in receipt
    lists = {"train": [], "val": [], "test": [{"video": "video7.mp4", "caption": ["a", "b"]}]}
    didemo = make_benchmark("didemo", tmp_path / "didemo", monkeypatch, lists, VIDEOS)
    (Path(didemo.root) / VIDEOS[2]).write_bytes(video)
    manifest, _ = build(config_of(didemo), tmp_path / "out", monkeypatch)
    (row,) = read_table(manifest).to_pylist()
    assert (row["start"], row["end"], row["captions"], row["width"]) == (None, 30.0, ["a b"], 96)


def test_the_fingerprint_sees_lists_files_and_the_protocol(
    msrvtt: LanguageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(msrvtt)
    seen = [list_fingerprint(config)]
    assert list_fingerprint(config) == seen[0]
    (Path(msrvtt.root) / VIDEOS[0]).write_bytes(b"x")
    seen.append(list_fingerprint(config))
    path = Path(msrvtt.annotations) / "msrvtt_ret_test1k.json"
    path.write_text(json.dumps([*RETRIEVAL["test"], *RETRIEVAL["test"]]))
    seen.append(list_fingerprint(config))
    from stm.datasets import video_text

    changed = video_text.read_protocol("msrvtt").model_copy(update={"trim_seconds": 10.0})
    monkeypatch.setattr(video_text, "read_protocol", lambda name: changed)
    seen.append(list_fingerprint(config))
    path.unlink()
    seen.append(list_fingerprint(config))  # nothing readable is a state too
    assert len(set(seen)) == 5
    assert list_fingerprint(config_of(make_dataset("msrvtt", tmp_path / "none")))
