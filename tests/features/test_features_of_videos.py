"""`stm features` from files to the table: the values are those of clips cut and encoded by hand."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_weights import FRAMES, SIZE, SMALL, crop_by_hand, decode_by_hand, encode_by_hand, save_encoder
from synthetic_videos import X264, ffmpeg, make_pan, make_video
from training_shards import make_shard

import stm.features
from stm.cli import main
from stm.config import Augmentation
from stm.data.dataset import ClipDataset
from stm.data.geometry import Geometry
from stm.features import ClipSettings, FeatureError, batches, extract, read_features
from stm.features.inputs import collect_sources
from stm.storage.files import sha256_file

WIDTH, HEIGHT, SHORT = 128, 96, 48
SETTINGS = ClipSettings(windows=3, every=2, short_side=SHORT, batch_size=4, device="cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("weights") / "weights.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, one of which has no video stream, one in a subfolder."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for number, name in enumerate(("a.mp4", "c.mp4", "more/d.mp4")):
        frames = make_pan(20 + 8 * number, dx=2 + number, width=WIDTH, height=HEIGHT)
        make_video(folder / name, frames, [*X264, "-bf", "2"])
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", folder / "b.mp4")
    (folder / "notes.txt").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def table(weights: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "features.parquet"
    done = extract(weights, [folder], out, SETTINGS)
    assert (done.videos, done.windows, [video for video, _ in done.failed]) == (3, 9, ["b.mp4"])
    return out


def tokens_by_hand(weights: Path, video: Path, windows: list[list[int]]) -> np.ndarray:
    cropped = crop_by_hand(decode_by_hand(video, 64, SHORT, 2))
    return encode_by_hand(weights, [cropped[[index // 2 for index in window]] for window in windows])


def test_features_are_those_of_windows_cut_and_encoded_by_hand(weights: Path, folder: Path, table: Path) -> None:
    rows, features, receipt = read_features(table)
    assert rows.column("video").to_pylist() == [v for v in ("a.mp4", "c.mp4", "more/d.mp4") for _ in range(3)]
    assert features.shape == (9, SMALL.width) and features.dtype == np.float32
    for video in ("a.mp4", "c.mp4", "more/d.mp4"):
        own = [row for row in range(9) if rows.column("video")[row].as_py() == video]
        windows = [rows.column("frames")[row].as_py() for row in own]
        assert [rows.column("window")[row].as_py() for row in own] == [0, 1, 2]
        truth = tokens_by_hand(weights, folder / video, windows).mean(1)
        assert np.abs(features[own] - truth).max() < 1e-5
    assert receipt["weights"]["sha256"] == sha256_file(weights)
    assert receipt["settings"]["windows"]["every"] == 2 and {"stm", "torch", "av"} <= receipt["versions"].keys()


def test_a_file_that_cannot_be_read_has_a_row_with_the_reason(table: Path) -> None:
    whole = pq.read_table(table)
    (row,) = [row for row in whole.to_pylist() if row["video"] == "b.mp4"]
    assert row["status"] == "no_video_stream" and "none of them video" in row["detail"]
    assert row["feature"] is None and row["window"] is None


def test_neither_processes_nor_an_interruption_change_a_byte(
    weights: Path, folder: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = tmp_path / "two.parquet"
    extract(weights, [folder], two, ClipSettings(**{**vars(SETTINGS), "processes": 2}))
    assert two.read_bytes() == table.read_bytes()
    compute, calls = batches.ClipBatches._compute, []

    def interrupt(self: Any, size: int) -> Any:
        calls.append(size)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(self, size)

    out = tmp_path / "interrupted.parquet"
    monkeypatch.setattr(batches.ClipBatches, "_compute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(weights, [folder], out, SETTINGS)
    assert not out.exists() and list(tmp_path.glob(".interrupted.parquet.journal/*"))
    monkeypatch.setattr(batches.ClipBatches, "_compute", lambda self, size: calls.append(size) or compute(self, size))
    calls.clear()
    extract(weights, [folder], out, SETTINGS)
    # The first batch again, of which only the window of c.mp4 is needed.
    assert calls == [4, 4, 1]
    assert out.read_bytes() == table.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"two.parquet", "interrupted.parquet"}


def test_tokens_and_means_over_windows(weights: Path, folder: Path, table: Path, tmp_path: Path) -> None:
    extract(weights, [folder / "a.mp4"], tmp_path / "tokens.parquet", SETTINGS, pool="none")
    rows, tokens, _ = read_features(tmp_path / "tokens.parquet")
    assert tokens.shape == (3, SMALL.slots, SMALL.slot_tokens, SMALL.width) and tokens.dtype == np.float16
    truth = tokens_by_hand(weights, folder / "a.mp4", rows.column("frames").to_pylist())
    assert np.abs(tokens.reshape(truth.shape) - truth).max() < 2e-3
    extract(weights, [folder / "a.mp4"], tmp_path / "mean.parquet", SETTINGS, average=True)
    rows, mean, _ = read_features(tmp_path / "mean.parquet")
    assert np.allclose(mean, read_features(table).features[:3].mean(0), atol=1e-6)
    assert rows.column("end").to_pylist() == [pq.read_table(table).to_pylist()[2]["end"]]


def test_a_list_names_parts_of_videos(weights: Path, folder: Path, tmp_path: Path) -> None:
    listed, lines = tmp_path / "list.csv", ("a.mp4,0.2,0.6,first", "more/d.mp4,,,", "not-there.mp4,,,", "a.mp4,5,1,")
    listed.write_text("\n".join(["path,start,end,id", *lines, "a.mp4,-1,1,"]))
    done = extract(weights, [listed], tmp_path / "out.parquet", SETTINGS, root=folder)
    rows = {row["video"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    bad = [f"{listed}: line 5", f"{listed}: line 6"]
    assert list(rows) == ["first", "more/d.mp4", "not-there.mp4", *bad]
    assert rows["first"]["start"] >= 0.2 and rows["first"]["end"] < 0.6 and rows["first"]["frames"][0] > 0
    assert [video for video, _ in done.failed] == ["not-there.mp4", *bad]
    assert rows["not-there.mp4"]["status"] == "missing_file"
    assert [rows[row]["status"] for row in bad] == ["bad_row"] * 2 and rows[bad[0]]["path"] == "a.mp4"


def test_no_row_of_a_list_vanishes_and_ids_come_from_every_format(folder: Path, tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "start": start, "end": 2.0, "id": name} for start, name in ((0.1000001, "x"), (0.1, "y"))]
    for name in ("list.parquet", "list.json"):
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        else:
            (tmp_path / name).write_text(json.dumps(rows))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [source.video for source in collect_sources(tmp_path / name, folder)] == ["x", "y"]
    (tmp_path / "list.json").write_text(json.dumps([{**row, "id": None} for row in [*rows, rows[0]]]))
    near = [source.video for source in collect_sources(tmp_path / "list.json", folder)]
    assert near == ["a.mp4@0.1000001-2", "a.mp4@0.1-2"]


def test_linked_videos_are_read_and_linked_folders_are_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to(folder / "a.mp4")
    (tmp_path / "b.mp4").symlink_to("b.mp4")
    (tmp_path / "more").symlink_to(tmp_path)
    found = {source.video: source.refused and source.refused[0] for source in collect_sources(tmp_path)}
    assert found == {"a.mp4": None, "b.mp4": "missing_file", "more": "path_outside_root"}


@pytest.mark.parametrize("settings", [{"windows": 2, "crops": 3}, {"windows": 1}])
def test_packed_clips_are_seen_as_evaluations_see_them(weights: Path, tmp_path: Path, settings: dict[str, int]) -> None:
    index = make_shard(tmp_path / "shards/test/test-00000.parquet", ["red", None, "blue"])
    extract(weights, [tmp_path], tmp_path / "out.parquet", ClipSettings(**settings, device="cpu"))
    rows, features, _ = read_features(tmp_path / "out.parquet")
    assert rows.column("video").to_pylist() == [f"clip-{n:03d}" for n in range(3) for _ in range(settings["windows"])]
    views, crops = settings["windows"], settings.get("crops", 1)
    dataset = ClipDataset(
        [index], Geometry(SIZE, 16, 2, FRAMES), Augmentation(), 0, False, views, guides=(), crops=crops
    )
    clips = [sample["video"] for number in range(3) for sample in dataset[number]]
    truth = encode_by_hand(weights, clips).mean(1).reshape(3 * views, crops, -1).mean(1)
    assert np.abs(features - truth).max() < 1e-5


def test_the_command_says_by_its_status_whether_all_videos_were_read(
    weights: Path, folder: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "by-command.parquet"
    options = ["--windows", "3", "--every", "2", "--short-side", str(SHORT), "--batch-size", "4", "--device", "cpu"]
    assert main(["-q", "features", str(weights), str(folder), "--out", str(out), *options]) == 1
    assert "9 windows of 3 videos; 1 without features" in (said := capsys.readouterr()).out
    assert "b.mp4: no_video_stream" in said.err
    assert out.read_bytes() == table.read_bytes()
    assert main(["features", str(weights), "nowhere.mp4"]) == 2
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"frames": 3}, {}, "divisible by the weights' tubelets of 2"),
        ({"windows": 2, "stride_seconds": 1.0}, {}, "only one of them"),
        ({"stride_seconds": 0.0}, {}, "at least 0.001"),
        ({"stride_frames": 4, "sampling": "tsn"}, {}, "cannot slide"),
        ({"crops": 3}, {"pool": "none"}, "pool none with crops 1"),
        ({}, {"out": "features.csv"}, "ends in .parquet"),
        ({"crops": 2}, {}, "1 or 3"),
        ({"backend": "opencv"}, {}, "backend must be one of pyav, pyav-seek, decord"),
        ({"device": "abacus"}, {}, "device: "),
        ({"device": "meta"}, {}, "device: "),
        ({}, {"out": "folder.parquet"}, "a folder has this name"),
        ({}, {"out": "list.parquet"}, "would replace an input"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    weights: Path, folder: Path, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    out, listed = tmp_path / options.pop("out", "features.parquet"), tmp_path / "list.parquet"
    (tmp_path / "folder.parquet").mkdir()
    pq.write_table(pa.table({"path": ["a.mp4"]}), listed)
    with pytest.raises(FeatureError, match=message):
        extract(weights, [folder, listed], out, ClipSettings(**settings), root=folder, **options)


def test_a_clips_place_in_its_batch_follows_from_the_clips_before_it() -> None:
    class Model:
        architecture = SMALL
        shape = (1,)

        @staticmethod
        def function(video: torch.Tensor) -> torch.Tensor:
            places.append(len(video))
            return video.float().mean((1, 2, 3, 4))[:, None] * 100 + torch.arange(len(video))[:, None]

    def run(known: set[int], restart: bool) -> dict[int, float]:
        found: dict[int, float] = {}
        queue = batches.ClipBatches(Model(), 4, torch.device("cpu"), lambda i, c, v: found.update({10 * i + c: v[0]}))  # type: ignore[arg-type]
        for item, clips in enumerate((3, 4, 2)):
            if item in known:
                queue.skip(clips)
                continue
            queue.begin()
            for attempt in range(1 + (restart and item == 1)):
                for clip in range(clips - (restart and item == 1 and attempt == 0)):
                    queue.add(item, clip, np.full((FRAMES, 3, SIZE, SIZE), 10 * item + clip, np.uint8))
                if restart and item == 1 and attempt == 0:
                    queue.restart()
        queue.flush(end=True)
        return found

    places: list[int] = []
    whole = run(set(), False)
    assert whole == {i: 100 * i + place % 4 for place, i in enumerate((0, 1, 2, 10, 11, 12, 13, 20, 21))}
    assert places == [4, 4, 1]
    assert run(set(), True) == whole
    for known in ({0}, {1}, {0, 1}, {0, 2}):
        assert run(known, False).items() <= whole.items()


def test_neither_the_package_nor_its_workers_load_torch() -> None:
    code = "import sys, stm.features, stm.features.decoding; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(AttributeError):
        stm.features.nothing  # noqa: B018


def test_a_backend_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(FeatureError, match=r"pip install 'stm-video\[decord\]'"):
        ClipSettings(backend="decord").check()
