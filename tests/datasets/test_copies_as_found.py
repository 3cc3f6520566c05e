"""Copies of public datasets as people have them: names of videos, folders and lists that differ from the official ones."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_copies import make_copy, write
from language_copies import make_benchmark, make_dataset, write_list

import stm
from stm.config import BenchmarkDataset, LanguageDataset
from stm.datasets import DatasetError
from stm.datasets.actions import check_benchmark, official_counts, read_benchmark, typical
from stm.datasets.file_names import SimilarNames, bare_name
from stm.datasets.folder import list_clips
from stm.datasets.video_text import check_language, read_language, read_protocol

ROOT = Path(stm.__file__).parents[1]
DOCS = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")


def paths_of(dataset: BenchmarkDataset | LanguageDataset) -> dict[str, str]:
    """Paths of the files that were found, by the id of their clip."""
    copy = read_language(dataset) if isinstance(dataset, LanguageDataset) else read_benchmark(dataset)
    return {named.video_id: named.clip.path for named in copy.clips}


# ------------------------------------------------------------------------------------------------ DiDeMo

ENDINGS = (".mov", ".AVI", ".mp4", ".3g2", ".mts", ".m2ts", ".qt", ".3gpp", ".asf", ".divx", ".null", ".")
# On disk and in lists: the originals; what the dataset's own script downloads; and all as if converted.
SPELLINGS = {"original": "{stem}{ending}", "downloaded": "{stem}{ending}.mp4", "mp4": "{stem}.mp4"}


@pytest.mark.parametrize(("on_disk", "listed"), product(SPELLINGS, SPELLINGS))
def test_didemo_files_are_found_under_all_names_and_endings_of_the_originals(
    on_disk: str, listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stems = {f"1234{number}@N00_56_ab.c{number}": ending for number, ending in enumerate(ENDINGS)}
    files = [SPELLINGS[on_disk].format(stem=stem, ending=ending) for stem, ending in stems.items()]
    names = [SPELLINGS[listed].format(stem=stem, ending=ending) for stem, ending in stems.items()]
    lists = {"train": [{"video": name, "caption": "x"} for name in names], "val": [], "test": []}
    dataset = make_benchmark("didemo", tmp_path, monkeypatch, lists, files, {"train": len(files)})
    assert paths_of(dataset) == dict(zip(stems, files, strict=True))  # the ids depend on neither
    assert check_language(dataset).is_complete


def test_didemo_original_files_are_preferred_to_downloaded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"train": [{"video": "x_1.mov", "caption": "x"}], "val": [], "test": []}
    dataset = make_benchmark("didemo", tmp_path, monkeypatch, lists, ["a/x_1.mov.mp4", "b/x_1.mov"])
    assert paths_of(dataset) == {"x_1": "b/x_1.mov"}


def test_a_listed_file_is_found_whatever_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {
        "train": [{"video": name, "caption": "x"} for name in ("x_1.mxf", "x_2.")],
        "val": [],
        "test": [],
    }
    dataset = make_benchmark("didemo", tmp_path, monkeypatch, lists, ["x_1.mxf", "x_2", "notes.txt"])
    assert set(paths_of(dataset).values()) == {"x_1.mxf", "x_2"}  # some file systems drop a dot at the end
    described = check_language(dataset).describe()
    assert "1 files are ignored" in described and ".txt (1)" in described


def test_didemo_sizes_say_what_each_is(tmp_path: Path) -> None:
    protocol = read_protocol("didemo")
    assert protocol.sizes("test") == (1004, 1003) and protocol.sizes("val") == (1065,)
    for number in ("1,037", "1,094", "8,392", "1,036"):
        assert number in DOCS
        assert number in (ROOT / "config/datasets/didemo.yaml").read_text()


# ------------------------------------------------------------------------------------------------ similar names


@pytest.mark.parametrize(
    ("missing", "there", "similar"),
    [
        ("x.mov", "x.mov.mp4.part", True),
        ("abcdefghijk.mp4", "v_abcdefghijk.mkv", True),
        ("v_abcdefghijk.mp4", "abcdefghijk.mkv", True),
        ("abcdefghijk_000084_000094.mp4", "abcdefghijk.f137.mp4", False),
        ("abcdefghijk.mp4", "abcdefghijk.f137.mp4", True),
        ("abcdefghijk_000084_000094.mp4", "k400/abcdefghijk.mp4", True),
        ("a clip (1).avi", "A_clip__1_.mp4", True),
        ("video12.mp4", "video123.mp4", False),
        ("video123.mp4", "video12.mp4", False),
        ("v_YoYo_g01_c01.avi", "v_YoYo_g01_c02.avi", False),
        ("v_YoYo_g01_c01.avi", "v.avi", False),
        ("caf\u00e9.mp4", "cafe\u0301.txt", True),
    ],
)
def test_similar_names_are_those_that_one_would_look_at(missing: str, there: str, similar: bool) -> None:
    others = ["other.mp4", "README", "zz_9.mp4"]
    assert SimilarNames([*others, there]).find(missing) == ([there] if similar else [])


def test_names_without_endings_of_videos() -> None:
    bare = {"x": "x", "x.mov": "x", "x.MOV.mp4": "x", "x.": "x", "x..mp4": "x", ".mp4": ".mp4", "x.jpg": "x.jpg"}
    bare["0001_A_00.00.51.926-00.00.54.129"] = "0001_A_00.00.51.926-00.00.54.129"
    assert {name: bare_name(name) for name in bare} == bare


def test_a_missing_video_is_reported_with_similar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"train": [{"video": f"x_{n}.mov", "caption": "x"} for n in (1, 2, 3)], "val": [], "test": []}
    files = ["x_1.mov", "y/x_2.mov.mp4.part", "z.mp4"]
    dataset = make_benchmark("didemo", tmp_path, monkeypatch, lists, files)
    with pytest.raises(DatasetError, match=r"\n  x_2\.mov; there is y/x_2\.mov\.mp4\.part\n  x_3\.mov\n"):
        check_language(dataset)


def test_a_missing_video_of_a_folder_is_refused_with_similar_files(tmp_path: Path) -> None:
    write(tmp_path / "videos/a/x.mov.mp4", "")
    write(tmp_path / "clips.csv", "path\na/x.mov\na/y.mov\n../x.mov\n")
    refused = list_clips(tmp_path / "videos", tmp_path / "clips.csv", (".mp4",), "train").refused
    assert [one.detail for one in refused[:2]] == ["there is no such file; there is x.mov.mp4", "there is no such file"]
    assert "stay under it" in refused[2].detail and "there is" not in refused[2].detail


def test_archives_that_are_not_unpacked_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = make_copy("hmdb51", tmp_path, monkeypatch)
    for file in copy.files:  # hmdb51_org.rar holds one archive per class
        file.unlink()
        write(copy.root / f"{file.parent.name}.rar", "")
    with pytest.raises(
        DatasetError, match=r"4 archives are not read; unpack them below dataset\.root: brush_hair\.rar, cl"
    ):
        check_benchmark(copy.dataset)
    images = make_dataset("cc3m", tmp_path / "cc3m", ["00000.tar", "00000.parquet"])
    write_list(tmp_path / "cc3m/lists/cc3m_train.json", [{"image": "00000/000000001.jpg", "caption": "x"}])
    with pytest.raises(DatasetError, match=r"1 archives are not read; unpack them below dataset\.root: 00000\.tar"):
        check_language(images)


# ------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("name", ["anet_ret_val_1.json", "anet_ret_val.json"])
def test_activitynet_test_list_is_read_under_both_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"train": [{"video": "v_abc.mp4", "caption": ["a", "b"]}]}
    sizes = {"train": 1, "test": 1}
    dataset = make_benchmark("activitynet", tmp_path, monkeypatch, lists, ["v_abc.mkv", "v_def.webm"], sizes)
    write_list(tmp_path / "lists" / name, [{"video": "v_def.mp4", "caption": ["c"]}])
    assert check_language(dataset).is_complete
    assert paths_of(dataset) == {"v_abc": "v_abc.mkv", "v_def": "v_def.webm"}


def test_activitynet_files_are_found_without_their_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {split: [{"video": f"{name}.mp4", "caption": "a"}] for split, name in (("train", "v_abc"), ("test", "def"))}
    files = ["abc.mp4", "v_def.mp4"]
    assert paths_of(make_benchmark("activitynet", tmp_path, monkeypatch, lists, files)) == {
        "v_abc": "abc.mp4",
        "def": "v_def.mp4",
    }


def test_a_missing_list_is_reported_with_similar_ones_and_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"train": [{"video": "v_abc.mp4", "caption": ["a", "b"]}]}
    dataset = make_benchmark("activitynet", tmp_path, monkeypatch, lists, ["v_abc.mkv"])
    for name in ("anet_ret_val_2.json", "videos.json", ".hidden/anet_ret_val.json"):
        write_list(tmp_path / "lists" / name, [])
    message = (
        r"there is none of anet_ret_val_1\.json, anet_ret_val\.json.*; there is anet_ret_val_2\.json.*klauscc/VindLU"
    )
    with pytest.raises(DatasetError, match=message):
        read_language(dataset)


@pytest.mark.parametrize("source", ["msvd", "msvd-qa", "msvd-captioning", "lsmdc"])
def test_lists_that_vindlu_does_not_share_are_not_said_to_be_there(source: str, tmp_path: Path) -> None:
    assert "VindLU" not in read_protocol(source).lists_from
    with pytest.raises(DatasetError) as error:
        read_language(make_dataset(source, tmp_path))
    assert "VindLU" not in str(error.value) and read_protocol(source).lists_from in str(error.value)


def test_epic_lists_are_found_in_the_folder_of_githubs_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = make_copy("epic-kitchens-55", tmp_path, monkeypatch)
    folder = copy.annotations / "epic-kitchens-55-annotations-master"
    folder.mkdir()
    for name in read_benchmark(copy.dataset).annotations:
        (copy.annotations / name).rename(folder / name)
    assert check_benchmark(copy.dataset).is_complete
    above = copy.with_(annotations=str(tmp_path))  # the folder that holds the one with the archive
    assert check_benchmark(above).is_complete
    assert {path.parts[:2] for path in read_benchmark(above).annotations} == {("lists", folder.name)}


def test_different_lists_of_one_name_in_subfolders_are_an_error_and_equal_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_copy("kinetics-400", tmp_path, monkeypatch)
    for name in ("train.csv", "val.csv"):
        text = (copy.annotations / name).read_text()
        (copy.annotations / name).unlink()
        for folder in ("k400", "k400-copy"):
            write(copy.annotations / folder / name, text)
    assert check_benchmark(copy.dataset).is_complete
    write(copy.annotations / "k600/train.csv", "label,youtube_id,time_start,time_end,split\nx,y,1,2,train\n")
    with pytest.raises(
        DatasetError, match=r"different files called train\.csv in k400/, k400-copy/, k600/; name the folder"
    ):
        read_benchmark(copy.dataset)


RELEASES: list[tuple[str, Any, str]] = [
    (
        "didemo",
        [{"annotation_id": 1, "description": "a dog", "video": "x.mov", "times": [[3, 3]], "num_segments": 6}],
        "DiDeMo's own release",
    ),
    (
        "activitynet",
        {"v_abc": {"duration": 1, "timestamps": [[0, 1]], "sentences": ["a"]}},
        "ActivityNet Captions' own",
    ),
    ("activitynet-qa", [{"question": "is it?", "video_name": "abc", "question_id": "v_1"}], "ActivityNet-QA's own"),
    ("msrvtt-qa", [{"answer": "man", "id": 1, "question": "who?", "video_id": 7, "category_id": 1}], "MSRVTT-QA's"),
    ("msrvtt", {"videos": [], "sentences": []}, "MSR-VTT's own release"),
    ("ssv2-label", [{"id": "1", "label": "a", "template": "[x]", "placeholders": []}], "Something-Something V2's own"),
]


@pytest.mark.parametrize(("source", "contents", "whose"), RELEASES)
def test_a_release_under_a_shared_name_is_said_to_be_one(
    source: str, contents: Any, whose: str, tmp_path: Path
) -> None:
    dataset = make_dataset(source, tmp_path)
    name = read_protocol(source).files["train"][0]
    write_list(tmp_path / "lists" / name, contents)
    with pytest.raises(DatasetError, match=rf"{name}: is in the format of {whose}") as error:
        read_language(dataset)
    assert read_protocol(source).lists_from in str(error.value)


def test_a_line_that_cannot_be_used_is_shown_with_its_place_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"train": [{"video": "a.mp4", "text": "x"}], "test": [{"video": "b.mp4", "caption": "x"}]}
    dataset = make_benchmark("msrvtt", tmp_path, monkeypatch, lists, ["b.mp4"])
    assert read_language(dataset).report.describe().count("msrvtt_ret_train9k.json, entry 0") == 1
    copy = make_copy("ucf101", tmp_path / "ucf", monkeypatch)
    write(copy.annotations / "ucfTrainTestlist/testlist01.txt", "Unknown/v_x.avi\n")
    assert read_benchmark(copy.dataset).report.describe().count("testlist01.txt, line 1") == 1


# ------------------------------------------------------------------------------------------------ action benchmarks


@pytest.mark.parametrize("spelling", ["HandstandPushups", "HandStandPushups", "Handstandpushups"])
def test_ucf101_has_one_label_and_id_however_a_copy_spells_them(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_copy("ucf101", tmp_path, monkeypatch)
    official = {named.video_id: named.clip.label for named in read_benchmark(copy.dataset).clips}
    assert official["v_HandStandPushups_g08_c01"] == "handstand pushups"
    for name in ("classInd.txt", "trainlist01.txt"):
        path = copy.annotations / "ucfTrainTestlist" / name
        text = path.read_text().replace("HandstandPushups", spelling).replace("HandStandPushups", spelling)
        path.write_text(text)
    old = copy.files[2]
    write(copy.root / "UCF-101" / spelling / old.name.replace("HandStandPushups", spelling), "")
    old.unlink()
    assert {named.video_id: named.clip.label for named in read_benchmark(copy.dataset).clips} == official
    assert check_benchmark(copy.dataset).is_complete


def test_ssv2_answers_of_the_test_list_are_documented_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_copy("something-something-v2", tmp_path, monkeypatch)
    before = read_benchmark(copy.dataset)
    write(copy.annotations / "labels/test-answers.csv", "1420;Holding something next to something\n")
    after = read_benchmark(copy.dataset)
    assert after.clips == before.clips and after.annotations == before.annotations
    assert "test-answers.csv" in DOCS and "without labels" not in DOCS


def test_ssv2_copies_converted_to_mp4_in_any_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = make_copy("something-something-v2", tmp_path, monkeypatch)
    for number, file in enumerate(copy.files):
        write(copy.root / f"{number}/{file.stem}.mp4", "")
        file.unlink()
    assert check_benchmark(copy.dataset).is_complete


def test_kinetics_lists_of_2018_are_documented_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = make_copy("kinetics-400", tmp_path, monkeypatch)
    for split in ("train", "val"):
        (copy.annotations / f"{split}.csv").rename(copy.annotations / f"kinetics-400_{split}.csv")
    assert check_benchmark(copy.dataset).is_complete
    assert "kinetics-400_{train,val}.csv" in DOCS and f"{official_counts('kinetics-400')['val']:,}" in DOCS


def test_kinetics_files_named_by_seconds_without_zeros_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = make_copy("kinetics-400", tmp_path, monkeypatch)
    for file, name in zip(copy.files[:2], ("---QUuC4vJs_84_94.mkv", "--3ouPhoy2A.mp4"), strict=True):
        file.rename(copy.root / "train" / name)
    assert check_benchmark(copy.dataset).is_complete


def test_diving48_has_the_size_of_a_known_copy() -> None:
    clip = typical("diving48")
    assert (clip.frames, clip.width, clip.height) == (157, 640, 480) and "one public copy" in clip.basis
    assert "157 frames, 640x480" in DOCS and "1280x720 (assumed)" not in DOCS


def test_kinetics_alone_is_partial_in_the_configs() -> None:
    checked = set()
    for path in sorted((ROOT / "config").glob("*.yaml")):
        for name, section in (yaml.safe_load(path.read_text()).get("datasets") or {}).items():
            if section is None:  # left out of the config that it extends
                continue
            dataset = section["dataset"]
            if dataset["source"] in ("folder", "moving-shapes"):
                continue
            assert dataset.get("partial", False) == (dataset["source"] == "kinetics-400"), (path.name, name)
            checked.add(dataset["source"])
    assert {"kinetics-400", "ucf101", "msrvtt"} <= checked


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    "folders", [("all", "all"), ("TrainValVideo", "TestVideo"), ("MSRVTT/videos/all",) * 2, ("", "")]
)
def test_msrvtt_videos_are_found_in_the_folders_of_each_archive(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = {"train": [{"video": "video0.mp4", "caption": "x"}], "test": [{"video": "video7020.mp4", "caption": "y"}]}
    files = [f"{folder}/{name}.mp4".lstrip("/") for folder, name in zip(folders, ("video0", "video7020"), strict=True)]
    assert list(paths_of(make_benchmark("msrvtt", tmp_path, monkeypatch, lists, files)).values()) == files


def test_msrvtt_captions_are_found_in_the_folder_of_their_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_benchmark("msrvtt-captioning", tmp_path, monkeypatch, {}, ["video0.mp4"])
    release = {
        "videos": [{"video_id": "video0", "split": "train"}],
        "sentences": [{"video_id": "video0", "caption": "x"}],
    }
    write_list(tmp_path / "lists/msrvtt_data/MSRVTT_data.json", release)
    assert paths_of(dataset) == {"video0": "video0.mp4"}


def test_msvd_clips_are_found_in_the_folder_of_their_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["-4wsuPCjDBc_5_15", "mv89psg6zh4_33_46", "vid1"]
    lists = {
        split: [{"video": f"{name}.mp4", "caption": "x"}]
        for split, name in zip(("train", "val", "test"), names, strict=True)
    }
    files = [f"YouTubeClips/{name}.avi" for name in names]
    assert list(paths_of(make_benchmark("msvd", tmp_path, monkeypatch, lists, files)).values()) == files


def test_webvid_videos_are_found_by_id_in_a_copy_with_other_folders(tmp_path: Path) -> None:
    dataset = make_dataset("webvid-2m", tmp_path, ["000001_000050/1066674784.mp4", "a/12.mp4", "b/12.mp4"])
    rows = [{"video": f"{name}.mp4", "caption": "x"} for name in ("1066674784", "12", "13")]
    write_list(tmp_path / "lists/webvid_train.json", rows)
    assert paths_of(dataset) == {"1066674784": "000001_000050/1066674784.mp4"}  # two files are called 12
    (tmp_path / "root/13.mp4").touch()  # the copy has the list's folders: other files are others
    assert paths_of(dataset) == {"13": "13.mp4"}


def test_images_in_other_folders_are_named_and_not_guessed(tmp_path: Path) -> None:
    dataset = make_dataset("coco", tmp_path, ["images/train2014/COCO_train2014_000000000009.jpg"])
    rows = [{"image": "train2014/COCO_train2014_000000000009.jpg", "caption": "x"}]
    write_list(tmp_path / "lists/coco.json", json.loads(json.dumps(rows)))
    with pytest.raises(DatasetError, match=r"000009\.jpg; there is images/train2014/COCO_train2014_000000000009\.jpg"):
        check_language(dataset)
