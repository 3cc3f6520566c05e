"""Generation: real files, the same bytes every time, and nothing done twice."""

from pathlib import Path

import av
import numpy as np
import pytest

from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes import generate as moving_shapes
from stm.datasets.moving_shapes.clip_spec import part_boxes, true_boxes
from stm.datasets.moving_shapes.generate import TRUTH_SCHEMA, draw_clip_spec, encode, generate, render_clip
from stm.storage.files import sha256_file
from stm.storage.tables import read_receipt, read_table

SMALL = MovingShapesDataset(source="moving-shapes", clips={"train": 5, "test": 3}, frames=12, width=64, height=64)


def hashes(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


@pytest.mark.slow
def test_two_runs_and_any_number_of_processes_give_the_same_bytes(tmp_path: Path) -> None:
    generate(SMALL, 1, tmp_path / "one", processes=1)
    generate(SMALL, 1, tmp_path / "two", processes=2)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert len(hashes(tmp_path / "one")) == 8 + 3  # the videos, two tables and the list of what was made


def test_files_are_ordinary_h264_and_look_like_what_was_rendered(tmp_path: Path) -> None:
    dataset = MovingShapesDataset(source="moving-shapes", clips={"train": 1})
    generate(dataset, 0, tmp_path, processes=1)
    path = tmp_path / "videos/train/train-000000.mp4"
    frames = decode(path)
    wanted = render_clip(draw_clip_spec(0, "train", 0, dataset)).frames
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 16)
    assert len(frames) == 32 and {int(f.pict_type) for f in frames} == {1, 2, 3}  # I, P and B
    decoded = np.stack([f.to_ndarray(format="rgb24") for f in frames])
    assert np.abs(decoded.astype(int) - wanted).mean() < 8


def test_tables_say_what_the_clips_show(tmp_path: Path) -> None:
    generate(SMALL, 1, tmp_path, processes=1)
    annotations = read_table(tmp_path / "annotations.parquet").to_pylist()
    truth = read_table(tmp_path / "truth.parquet").to_pylist()
    assert [row["video_id"] for row in truth] == [row["video_id"] for row in annotations]
    assert len({row["video_id"] for row in truth}) == 8
    for note, row in zip(annotations, truth, strict=True):
        split, index = row["split"], int(row["video_id"][-6:])
        spec = draw_clip_spec(1, split, index, SMALL)
        rendered = render_clip(spec)
        assert (tmp_path / note["path"]).is_file() and note["label"] == row["label"] == spec.label
        assert row["camera"] == ("moving" if spec.camera.moving else "fixed")
        np.testing.assert_array_equal(np.float32(row["boxes"]).reshape(12, 4), rendered.boxes)
        boxes = np.float32(row["distractor_boxes"]).reshape(row["distractors"], row["frames"], 4)
        np.testing.assert_array_equal(boxes, rendered.distractor_boxes)
        assert len(note["captions"]) == 1 and len(note["questions"]) == 7
    assert read_receipt(tmp_path / "truth.parquet")["seed"] == 1


def test_tables_of_options_have_their_truth_and_others_do_not(tmp_path: Path) -> None:
    options = SMALL.model_copy(
        update={"companion": 0.5, "moving_background": 0.5, "caption": "action", "clips": {"train": 6}}
    )
    generate(options, 1, tmp_path / "options", processes=1)
    truth = read_table(tmp_path / "options/truth.parquet").to_pylist()
    assert {row["companion"] for row in truth} == {"in step", "independent"}
    for index, row in enumerate(truth):
        spec = draw_clip_spec(1, "train", index, options)
        boxes = np.float32(row["distractor_boxes"]).reshape(row["distractors"], 12, 4)
        np.testing.assert_array_equal(boxes[0], true_boxes(spec.distractors[0], spec))
        np.testing.assert_array_equal(np.float32(row["background_boxes"]).reshape(-1, 4), part_boxes(spec))
        assert row["background_motion"] == (spec.part.path.motion if spec.part else None)
    assert {len(row["background_boxes"]) for row in truth} == {0, 48}
    assert not any(
        "background" in row["captions"][0] for row in read_table(tmp_path / "options/annotations.parquet").to_pylist()
    )
    generate(SMALL.model_copy(update={"clips": {"train": 1}}), 1, tmp_path / "plain", processes=1)
    assert read_table(tmp_path / "plain/truth.parquet").column_names == TRUTH_SCHEMA.names


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are encoded from here on."""
    names: list[str] = []

    def noting(frames: np.ndarray, fps: int, path: Path) -> None:
        names.append(path.stem)
        encode(frames, fps, path)

    monkeypatch.setattr(moving_shapes, "encode", noting)
    return names


def test_only_missing_damaged_and_new_clips_are_made(tmp_path: Path, encoded: list[str]) -> None:
    generate(SMALL, 1, tmp_path, processes=1)
    before, videos = hashes(tmp_path), tmp_path / "videos" / "train"
    (videos / "train-000001.mp4").unlink()
    (videos / "train-000003.mp4").write_bytes((videos / "train-000003.mp4").read_bytes()[:500])
    encoded.clear()
    generate(SMALL, 1, tmp_path, processes=1)
    assert encoded == ["train-000001", "train-000003"] and hashes(tmp_path) == before
    encoded.clear()
    generate(SMALL.model_copy(update={"clips": {"train": 6, "test": 3}}), 1, tmp_path, processes=1)
    assert encoded == ["train-000005"]


def test_a_killed_run_continues_where_it_was(
    tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = moving_shapes.encode

    def dying(frames: np.ndarray, fps: int, path: Path) -> None:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        real(frames, fps, path)

    monkeypatch.setattr(moving_shapes, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        generate(SMALL, 1, tmp_path, processes=1)
    monkeypatch.setattr(moving_shapes, "encode", real)
    assert not (tmp_path / "annotations.parquet").exists()
    generate(SMALL, 1, tmp_path, processes=1)
    assert len(encoded) == 8 and len(set(encoded)) == 8


def test_another_seed_makes_everything_anew(tmp_path: Path, encoded: list[str]) -> None:
    generate(SMALL, 1, tmp_path, processes=1)
    before = hashes(tmp_path)
    generate(SMALL, 2, tmp_path, processes=1)
    assert len(encoded) == 16
    assert all(digest != before[name] for name, digest in hashes(tmp_path).items())


def test_a_failing_encoder_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(moving_shapes.EncodeError, match=r"bad\.mp4.*ffmpeg failed"):
        encode(np.zeros((4, 63, 63, 3), np.uint8), 16, tmp_path / "bad.mp4")  # H.264 in 4:2:0 needs even sides
    assert list(tmp_path.iterdir()) == []


def test_the_class_may_be_what_the_object_looks_like_and_the_clips_may_have_a_seed_of_their_own(tmp_path: Path) -> None:
    generate(SMALL, 7, tmp_path / "motion", processes=1)
    colors = SMALL.model_copy(update={"label": "color", "seed": 7})
    generate(colors, 1, tmp_path / "color", processes=1)
    truth = {row["video_id"]: row for row in read_table(tmp_path / "motion/truth.parquet").to_pylist()}
    for row in read_table(tmp_path / "color/annotations.parquet").to_pylist():
        assert row["label"] == truth[row["video_id"]]["color"]
        path = Path("videos") / row["split"] / f"{row['video_id']}.mp4"
        assert sha256_file(tmp_path / "motion" / path) == sha256_file(tmp_path / "color" / path)
