"""All benchmarks of actions: each listed clip once, the counts checked, no file from outside the root."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_copies import MAKERS, Copy, make_copy, write
from test_probe import make_video

import stm.datasets.actions
from stm.config import Config, parse_config
from stm.datasets import DatasetError, build_manifest, list_fingerprint
from stm.datasets.actions import BENCHMARKS, check_benchmark, official_counts, read_benchmark, typical
from stm.jobs.status import Status
from stm.manifest import TooManyFailures, make_key
from stm.storage.tables import read_table


@pytest.fixture(params=MAKERS)
def copy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy(request.param, tmp_path, monkeypatch)


@pytest.fixture
def ucf101(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    return make_copy("ucf101", tmp_path, monkeypatch)


def test_every_clip_of_the_lists_is_there_once(copy: Copy) -> None:
    found = read_benchmark(copy.dataset)
    assert Counter(named.clip.split for named in found.clips) == copy.listed
    assert found.refused == []
    keys = [make_key(named.video_id) for named in found.clips]
    assert len(set(keys)) == len(keys) == sum(copy.listed.values())
    assert {copy.root / named.clip.path for named in found.clips} <= set(copy.files)
    assert all(named.clip.label for named in found.clips)


def test_a_whole_copy_passes_and_is_counted(copy: Copy) -> None:
    report = check_benchmark(copy.dataset)
    assert report.is_official and report.is_complete and not report.missing
    for split, clips in copy.listed.items():
        assert f"  {split:5} {clips:>12} {clips:>12} {clips:>12}" in report.describe()


def test_files_are_found_in_any_folder(copy: Copy) -> None:
    before = [(named.video_id, named.clip.label) for named in read_benchmark(copy.dataset).clips]
    names = Counter(file.name for file in copy.files)
    for file in copy.files:
        if names[file.name] == 1:  # HMDB51 may have one name in two classes; see test_hmdb51
            file.rename(copy.root / file.name)
    assert [(named.video_id, named.clip.label) for named in read_benchmark(copy.dataset).clips] == before


def test_a_missing_file_is_reported_with_counts_and_the_remedy(copy: Copy) -> None:
    gone = copy.files[-1] if copy.dataset.source != "hmdb51" else copy.files[0]
    gone.unlink()
    with pytest.raises(DatasetError, match="partial: true") as error:
        check_benchmark(copy.dataset)
    message = str(error.value)
    assert "on disk" in message and gone.name in message and str(copy.root) in message
    assert all(f"  {split:5} {clips:>12} {clips:>12}" in message for split, clips in copy.listed.items())


def test_a_partial_copy_goes_on_and_lists_what_it_lacks(copy: Copy) -> None:
    gone = copy.files[-1] if copy.dataset.source != "hmdb51" else copy.files[0]
    gone.unlink()
    dataset = copy.with_(partial=True)
    found = read_benchmark(dataset)
    report = check_benchmark(dataset, found)
    assert not report.is_complete and report.is_official
    assert {one.status for one in found.refused} == {Status.MISSING_FILE}
    assert len(found.clips) + len(found.refused) == sum(copy.listed.values())
    assert report.found == len(found.clips) > 0


def test_a_copy_without_a_single_file_is_an_error_even_if_partial(copy: Copy) -> None:
    for file in copy.files:
        file.unlink()
    with pytest.raises(DatasetError, match="has no file of"):
        check_benchmark(copy.with_(partial=True))


def test_lists_of_another_size_are_an_error_even_if_partial(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    source = copy.dataset.source
    more = {split: clips + 1 for split, clips in copy.listed.items()}
    monkeypatch.setitem(BENCHMARKS, source, replace(BENCHMARKS[source], counts={1: more}))
    for partial in (False, True):
        with pytest.raises(DatasetError, match="not the official ones") as error:
            check_benchmark(copy.with_(partial=partial))
        first = next(iter(copy.listed))
        assert f"{first:5} {more[first]:>12} {copy.listed[first]:>12}" in str(error.value)
        assert "Get them from http" in str(error.value)


def test_every_list_that_is_missing_is_named(copy: Copy) -> None:
    read = list(read_benchmark(copy.dataset).annotations)
    assert read
    for path in read:
        file = copy.annotations / path
        data = file.read_bytes()
        file.unlink()
        if copy.dataset.source == "hmdb51":  # one class less changes the count
            with pytest.raises(DatasetError, match="not the official ones"):
                check_benchmark(copy.dataset)
        else:
            with pytest.raises(
                DatasetError, match=rf"lists, but there is (no|none of).* {file.name.replace('.', '.')}"
            ):
                check_benchmark(copy.dataset)
        file.write_bytes(data)


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xfe\x00", b"<html>404</html>", b"[1, 2]", b"{}", b"a,b\n1,2\n"])
def test_another_file_in_place_of_a_list_is_a_readable_error(copy: Copy, rubbish: bytes) -> None:
    for path in read_benchmark(copy.dataset).annotations:
        file = copy.annotations / path
        data = file.read_bytes()
        file.write_bytes(rubbish)
        with pytest.raises(DatasetError):
            check_benchmark(copy.dataset)
        file.write_bytes(data)


def test_missing_folders_are_named(copy: Copy, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset\.root: .*nowhere is not a folder"):
        read_benchmark(copy.with_(root=str(tmp_path / "nowhere")))
    with pytest.raises(DatasetError, match=r"dataset\.annotations: .*nowhere"):
        read_benchmark(copy.with_(annotations=str(tmp_path / "nowhere")))


def test_lists_may_lie_in_the_folder_itself(copy: Copy) -> None:
    for path in read_benchmark(copy.dataset).annotations:
        (copy.annotations / path).rename(copy.annotations / path.name)
    assert check_benchmark(copy.dataset).is_complete


def test_a_byte_order_mark_before_a_list_does_no_harm(copy: Copy) -> None:
    for path in read_benchmark(copy.dataset).annotations:
        file = copy.annotations / path
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert check_benchmark(copy.dataset).is_complete


def test_a_path_in_a_list_cannot_lead_out_of_the_root(ucf101: Copy, tmp_path: Path) -> None:
    write(tmp_path / "YoYo/secret.avi", "")
    listed = ucf101.annotations / "ucfTrainTestlist/testlist01.txt"
    for path in ("../YoYo/secret.avi", f"{tmp_path}/YoYo/secret.avi"):
        listed.write_text(f"{path}\n")
        found = read_benchmark(ucf101.with_(partial=True))
        assert [(one.video_id, one.status) for one in found.refused] == [("secret", Status.MISSING_FILE)]


def test_a_link_out_of_the_root_is_refused_and_one_within_it_is_not(ucf101: Copy, tmp_path: Path) -> None:
    first, second, third, _ = ucf101.files
    write(tmp_path / "elsewhere.avi", "")
    first.unlink()
    first.symlink_to(tmp_path / "elsewhere.avi")
    second.rename(second.parent / "renamed.data")
    second.symlink_to(second.parent / "renamed.data")
    third.unlink()
    third.symlink_to(third)  # a loop
    found = read_benchmark(ucf101.dataset)
    refused = {one.video_id: one.status for one in found.refused}
    assert refused == {first.stem: Status.PATH_OUTSIDE_ROOT, third.stem: Status.MISSING_FILE}
    assert second.stem in {named.video_id for named in found.clips}
    with pytest.raises(DatasetError, match=rf"{first.stem}: a link that leaves dataset\.root"):
        check_benchmark(ucf101.dataset)


def test_linked_folders_are_skipped_and_reported(ucf101: Copy, tmp_path: Path) -> None:
    folder = ucf101.files[0].parent
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    (ucf101.root / "again").symlink_to(ucf101.root)
    with pytest.raises(DatasetError, match="Linked folders are not searched: UCF-101/ApplyEyeMakeup, again"):
        check_benchmark(ucf101.dataset)


def test_a_file_wins_over_a_link_and_hidden_files_and_other_kinds_are_skipped(ucf101: Copy) -> None:
    file = ucf101.files[0]
    other = ucf101.root / "AAA" / file.parent.name
    other.mkdir(parents=True)
    (other / file.name).symlink_to(file)
    write(ucf101.root / ".cache" / file.name, "")
    write(other / f"{file.stem}.txt", "")
    found = {named.video_id: named.clip.path for named in read_benchmark(ucf101.dataset).clips}
    assert found[file.stem] == file.relative_to(ucf101.root).as_posix()


def test_a_clip_listed_twice_is_taken_once(ucf101: Copy) -> None:
    listed = ucf101.annotations / "ucfTrainTestlist/testlist01.txt"
    first = (ucf101.annotations / "ucfTrainTestlist/trainlist01.txt").read_text().split()[0]
    listed.write_text(f"{first}\n")
    found = read_benchmark(ucf101.dataset)
    assert [(one.video_id, one.status) for one in found.refused] == [(Path(first).stem, Status.DUPLICATE_ID)]
    assert [named.clip.split for named in found.clips if named.video_id == Path(first).stem] == ["train"]


def test_at_most_ten_missing_files_are_shown(ucf101: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"YoYo/v_YoYo_g{number:02d}_c01.avi 101\n" for number in range(30)]
    (ucf101.annotations / "ucfTrainTestlist/trainlist01.txt").write_text("".join(lines))
    monkeypatch.setitem(BENCHMARKS, "ucf101", replace(BENCHMARKS["ucf101"], counts={1: {"train": 30, "test": 1}}))
    with pytest.raises(DatasetError) as error:
        check_benchmark(ucf101.dataset)
    shown = [line for line in str(error.value).splitlines() if line.startswith("  YoYo/")]
    assert shown == [f"  {line.split()[0]}" for line in lines[:10]]
    assert "30 clips have no file. The first of 30 missing files" in str(error.value)


# ------------------------------------------------------------------------------------------------ known numbers


def test_official_counts_agree_with_the_totals_that_the_papers_and_pages_state() -> None:
    assert sum(official_counts("something-something-v2").values()) == 220_847 - 27_157  # without the test list
    assert all(sum(official_counts("ucf101", fold).values()) == 13_320 for fold in (1, 2, 3))
    assert all(official_counts("hmdb51", fold) == {"train": 3_570, "test": 1_530} for fold in (1, 2, 3))
    assert sum(official_counts("epic-kitchens-55").values()) == 28_472
    assert official_counts("diving48", fold=3) == official_counts("diving48")  # has no folds


def test_all_sources_of_the_config_are_known() -> None:
    sources = stm.config.BenchmarkDataset.model_fields["source"].annotation.__args__
    assert set(sources) == set(BENCHMARKS) == set(MAKERS)
    for source in sources:
        clip = typical(source)
        assert clip.frames >= 16 and 320 <= clip.width <= 1920 and 240 <= clip.height <= 1080 and clip.basis


def test_asking_is_light() -> None:
    code = "import sys, stm.datasets.actions; print(sorted({'torch', 'av', 'cv2', 'transformers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


# ------------------------------------------------------------------------------------------------ the manifest


def config_of(copy: Copy, **changes: Any) -> Config:
    dataset = copy.with_(**changes).model_dump(mode="json")
    return parse_config({"name": "test", "dataset": dataset})


def build(config: Config, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    manifest, quarantine = folder / "manifest.parquet", folder / "quarantine.parquet"
    build_manifest(config, None, manifest, quarantine, processes=1)
    return read_table(manifest).to_pylist(), read_table(quarantine).to_pylist()


def test_the_manifest_of_segments_of_long_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = make_copy("epic-kitchens-55", tmp_path, monkeypatch)
    video = make_video(tmp_path / "video.mp4", frames=4).read_bytes()
    for file in copy.files:
        file.write_bytes(video)
    rows, refused = build(config_of(copy), tmp_path / "out")
    assert refused == [] and [row["video_id"] for row in rows] == [
        "P01_01_0",
        "P01_01_45",
        "P22_05_24001",
        "P31_14_39236",
    ]
    assert [(row["start"], row["end"], row["split"]) for row in rows[:2]] == [
        (0.14, 3.37, "train"),
        (250.05, 257.87, "train"),
    ]
    assert rows[1]["captions"] == ["pour courgette onto pan"] and rows[1]["width"] == 96
    assert "EPIC-KITCHENS-55: clips" in capfd.readouterr().err


def test_a_partial_copy_becomes_a_manifest_however_little_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ucf101: Copy
) -> None:
    names = [f"v_YoYo_g{number:02d}_c01" for number in range(1, 31)]
    lines = "".join(f"YoYo/{name}.avi 101\n" for name in names)
    (ucf101.annotations / "ucfTrainTestlist/trainlist01.txt").write_text(lines)
    monkeypatch.setitem(BENCHMARKS, "ucf101", replace(BENCHMARKS["ucf101"], counts={1: {"train": 30, "test": 1}}))
    make_video(ucf101.files[1].parent / f"{names[4]}.avi", frames=4)
    with pytest.raises(DatasetError, match="is not a complete copy of UCF101"):
        build(config_of(ucf101), tmp_path / "out")
    assert not (tmp_path / "out/manifest.parquet").exists()
    rows, refused = build(config_of(ucf101, partial=True), tmp_path / "out")
    assert [row["video_id"] for row in rows] == [names[4]]
    # 29 files are not there, and the test clip's is empty.
    assert Counter(row["status"] for row in refused) == {"missing_file": 29, "empty_file": 1}
    strict = config_of(ucf101, partial=True).model_dump(mode="json", exclude_none=True)
    strict["bad_input"] = {"policy": {"missing_file": "fail"}}
    with pytest.raises(TooManyFailures, match="policy is `fail`"):
        build(parse_config(strict), tmp_path / "out")


def test_the_fingerprint_sees_lists_and_files_but_not_strangers(copy: Copy) -> None:
    config = config_of(copy, partial=True)
    before = list_fingerprint(config)
    write(copy.root / "stranger.mp4", "x")
    assert list_fingerprint(config) == before
    state = copy.files[0].stat()
    os.utime(copy.files[0], ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))
    assert (later := list_fingerprint(config)) != before
    copy.files[-1].unlink()
    assert (fewer := list_fingerprint(config)) not in (before, later)
    file = copy.annotations / next(iter(read_benchmark(copy.dataset).annotations))
    file.write_bytes(file.read_bytes() + b"\n")
    assert (changed := list_fingerprint(config)) != fewer
    file.unlink()
    assert list_fingerprint(config) != changed  # nothing readable is a state too
    assert list_fingerprint(config_of(copy)) != list_fingerprint(config)
