"""`stm view`: a video of one's own, from the file to a page that a browser runs."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from browser import run_in_browser
from synthetic_videos import ffmpeg, make_pan, make_video

from stm.cli import main
from stm.config.strategies import StrategyError
from stm.manifest import read_rows
from stm.report.viewer.own_video import (
    ViewError,
    ViewRequest,
    check_request,
    choose_step,
    draw_video,
    make_config,
    probe_video,
    write_manifest,
)

MODEL = f"local-dir:{Path(__file__).parents[3] / 'stm/assets/demo-clip'}"
SMALL: dict[str, Any] = {"frames": 4, "image_size": 64, "patch_size": 16, "tubelet": 2}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 frames at 25 per second; a name that needs escaping."""
    return make_video(tmp_path_factory.mktemp("video") / "a <b> & c.mp4", make_pan(48))


@pytest.fixture(scope="module")
def page(video: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page as the command line writes it."""
    out = tmp_path_factory.mktemp("page") / "new" / "view.html"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    captions = ["--caption", "a red square", "--caption", "a <blue> circle"]
    assert main(["view", str(video), *captions, "--model", MODEL, *options, "--out", str(out)]) == 0
    return out.read_text()


def read_data(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)
    values: dict[str, Any] = json.loads(text)
    return values


@pytest.mark.slow
def test_the_page_has_every_strategy_that_needs_no_training(page: str) -> None:
    data = read_data(page)
    names = {strategy["name"] for strategy in data["strategies"]}
    assert {
        "random",
        "tube",
        "text_top",
        "text_bottom",
        "motion",
        "motion_box",
        "flow",
        "attention",
        "cluster",
    } <= names
    assert "Not drawn: spatiotemporal (learned by runs of the method stm)." in page
    (clip,) = data["clips"]
    assert clip["captions"] == ["a red square", "a <blue> circle"]
    assert (data["side"], data["slots"], len(clip["frames"])) == (4, 2, 4)
    first, second = ([entry["bits"] for entry in entries] for entries in clip["masks"]["text_top"])
    assert first != second  # each caption has its own masks
    assert set(clip["maps"]) == {"similarity", "motion", "motion_compensated"}
    assert "<title>Masks of a &lt;b&gt; &amp; c.mp4</title>" in page and "<b> &" not in page
    assert page.count('<img alt="') == 1 + 2 + len(names)  # still images: frames, two maps, every mask


@pytest.mark.slow
def test_the_frames_are_the_middle_of_the_video_and_its_central_square(page: str) -> None:
    shown = [base64.b64decode(frame) for frame in read_data(page)["clips"][0]["frames"]]
    pan = make_pan(48)[16:32:4]  # 4 frames, 4 apart, in the middle of 48
    for jpeg, frame in zip(shown, pan, strict=True):
        square = frame[:, 32:192].reshape(8, 20, 8, 20, 3).mean(axis=(1, 3))
        small = simplejpeg.decode_jpeg(jpeg, colorspace="RGB").reshape(8, 8, 8, 8, 3).mean(axis=(1, 3))
        assert np.abs(square - small).mean() < 6


@pytest.mark.slow
def test_a_browser_runs_the_page_at_a_phones_width(page: str, tmp_path: Path) -> None:
    script = (
        "const root = document.scrollingElement; const part = (name) => document.querySelector(`[data-part=${name}]`);"
    )
    script += "return [part('says').textContent, part('caption').options.length, root.scrollWidth - root.clientWidth];"
    says, captions, wide = run_in_browser(page, script, tmp_path, 390)
    assert (says, captions, wide) == ("text_top at 0.60 hides 56.3 % of the tokens (18 of 32).", 2, 0)


@pytest.mark.slow
def test_without_captions_no_model_is_needed_and_a_strategy_of_ones_own_is_shown(video: Path, tmp_path: Path) -> None:
    code = "from stm.masking import get_strategy, register\n\n"
    code += "@register('own')\ndef own(guides, ratio):\n    return get_strategy('tube')(guides, ratio)\n"
    (tmp_path / "own.py").write_text(code)
    viewer = draw_video(ViewRequest(video, strategies=(f"{tmp_path / 'own.py'}:own",), **SMALL))
    drawn = [strategy.strategy for strategy in viewer.strategies]
    assert {"random", "tube", "motion", "flow", f"{tmp_path / 'own.py'}:own"} <= {*drawn} and "text_top" not in drawn
    assert viewer.missing["text_top"] == viewer.missing["text_bottom"] == "needs a caption: --caption"
    assert viewer.missing["attention"] == viewer.missing["cluster"] == "needs a model: --model"


@pytest.mark.parametrize(
    ("facts", "changes", "every", "start"),
    [
        ({"frames": 400, "fps": 25.0, "duration": 16.0}, {}, 4, 6.72),  # 64 of 400 frames, in the middle
        ({"frames": 33, "fps": 25.0, "duration": 1.32}, {}, 2, 0.02),  # too short for every fourth frame
        ({"frames": 5, "fps": 25.0, "duration": 0.2}, {}, 1, None),
        ({"frames": None, "fps": None, "duration": None}, {}, 4, None),  # nothing is known: from the start
        ({"frames": 400, "fps": 25.0, "duration": 16.0}, {"every": 10, "start": 2.5}, 10, 2.5),
    ],
)
def test_the_shown_part(
    facts: dict[str, Any], changes: dict[str, Any], every: int, start: float | None, tmp_path: Path
) -> None:
    request = ViewRequest(Path("a.mp4"), **changes)
    assert choose_step(request, facts) == every
    config = make_config(request, every, tmp_path)
    assert config.frames.every == every and config.frames.max_frames == 16
    write_manifest(request, facts, every, tmp_path / "manifest.parquet")
    (row,) = read_rows(tmp_path / "manifest.parquet")
    assert row["start"] == start and row["path"] == "a.mp4" and row["fps"] == facts["fps"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 5}, ["--frames 5", "--tubelet 2"]),
        ({"tubelet": 0}, ["--tubelet 0"]),
        ({"image_size": 100}, ["--image-size 100", "--patch-size 16"]),
        ({"image_size": 16}, ["2 to 64 patches"]),
        ({"captions": ("a dog", " ")}, ["--caption is empty"]),
        ({"every": 0}, ["--every 0"]),
        ({"start": -1.0}, ["--start -1"]),
        ({"strategies": ("nowhere.py:mine",)}, ["nowhere.py does not exist"]),
        ({"video": Path("nowhere.mp4")}, ["nowhere.mp4", "no such file"]),
        ({"video": Path(__file__).parent}, ["not a file"]),
    ],
)
def test_unsuitable_options_are_refused_before_any_work(changes: dict[str, Any], words: list[str], video: Path) -> None:
    with pytest.raises((ViewError, StrategyError)) as error:
        check_request(ViewRequest(**{"video": video, **changes}))
    for word in words:
        assert word in str(error.value)


def damaged(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "text":
        path.write_text("not a video")
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "sound":
        ffmpeg("-f", "lavfi", "-i", "sine=duration=1", path)
    if kind == "one frame":
        make_video(path, make_pan(1))
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "open failed"),
        ("empty", "the file has no bytes"),
        ("sound", "no video stream"),
        ("one frame", "too short"),
    ],
)
def test_a_video_that_cannot_be_shown_is_one_message(
    kind: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(tmp_path, kind)
    assert main(["view", str(path), "--out", str(tmp_path / "view.html")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"stm view: {path} cannot be shown: ") and words in message
    assert not (tmp_path / "view.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("caption", [["--caption", "a dog"], []])
def test_a_model_that_cannot_be_loaded_is_named_with_the_remedy(
    caption: list[str], video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"local-dir:{tmp_path / 'none'}"
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["view", str(video), *small, *caption, "--model", model, "--out", str(tmp_path / "view.html")]) == 2
    message = capsys.readouterr().err
    assert model in message and "--model" in message and "Without --caption" in message


def test_out_may_not_be_a_folder(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(video), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_out_is_checked_before_any_work(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["view", str(video), "--out", str(tmp_path / "file/new/view.html")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"stm view: --out {tmp_path}/file/new/view.html cannot be written: {tmp_path}/file is not a folder"
    ]


def test_an_interruption_is_one_message(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stm.report.viewer.own_video.probe_video", interrupt)
    assert main(["view", str(video), "--out", str(tmp_path / "view.html")]) == 130
    assert capsys.readouterr().err.splitlines() == ["stm view: interrupted"]
    assert list(tmp_path.iterdir()) == []


def test_a_container_says_what_it_knows(video: Path) -> None:
    facts = probe_video(video)
    assert (facts["frames"], facts["fps"], facts["duration"]) == (48, 25.0, pytest.approx(1.92))
