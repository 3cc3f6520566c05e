"""`stm predict` and `stm retrieve`: what they print is what the model says of windows cut by hand, and weights that cannot do it
are refused."""

import csv
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from language_runs import CLIP, make_run, make_small_bert
from small_weights import FRAMES, SIZE, SMALL, crop_by_hand, decode_by_hand, save_encoder
from synthetic_videos import make_pan, make_video

from stm.cli import main
from stm.config import Contrast, Text
from stm.evaluation.classification.finetune import Classifier
from stm.features import ClipSettings, FeatureError, predict, retrieve
from stm.methods.contrast_head import ContrastHead, VideoEmbedder
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import EXTRA, VideoLanguageModel
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.pretrained.text_encoder import TextEncoder

SHORT = 48
SETTINGS = ClipSettings(windows=2, every=2, short_side=SHORT, batch_size=4, device="cpu")
LABELS = ["walk", "run", "jump"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(("a.mp4", "b.mp4")):
        make_video(folder / name, make_pan(20, dx=3 * number, width=128, height=96))
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def windows_of(video: Path) -> list[list[int]]:
    """The two windows of 4 frames, 2 apart, in 20 frames: at positions 0 and 6 of the 10 on the grid."""
    return [[0, 1, 2, 3], [6, 7, 8, 9]]


def save_classifier(path: Path, labels: list[str] | None) -> Classifier:
    torch.manual_seed(1)
    classifier = Classifier(VideoEncoder(SMALL), len(LABELS)).eval()
    torch.nn.init.normal_(classifier.head.weight)
    zoo.save(classifier, path, labels=labels)
    return classifier


def test_probabilities_are_the_mean_of_the_softmax_over_windows_and_crops(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = save_classifier(tmp_path / "classifier.safetensors", LABELS)
    out = tmp_path / "out.json"
    options = ["--windows", "2", "--every", "2", "--short-side", str(SHORT), "--crops", "3", "--device", "cpu"]
    # A folder of an evaluation is read as its classifier.
    assert main(["predict", str(tmp_path), str(folder), "--top", "2", "--out", str(out), *options]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].split() == ["empty.mp4", "empty_file:", "the", "file", "has", "no", "bytes"]
    found = json.loads(out.read_text())
    for video in ("a.mp4", "b.mp4"):
        stored = decode_by_hand(folder / video, 64, SHORT, 2)
        clips = [crop_by_hand(stored, left)[window] for window in windows_of(folder) for left in (0, 8, 16)]
        with torch.inference_mode():
            logits = torch.cat([classifier.classify(torch.from_numpy(clip)[None]) for clip in clips])
        mean = logits.double().softmax(1).mean(0).numpy()
        best = np.argsort(-mean)[:2]
        (row,) = [row for row in found["predictions"] if row["video"] == video]
        assert [each["class"] for each in row["classes"]] == [LABELS[number] for number in best]
        assert np.allclose([each["probability"] for each in row["classes"]], mean[best], atol=1e-6)
        (line,) = [line for line in printed if line.startswith(video)]
        assert line.split()[1:] == [f"{mean[best[0]]:.3f}", LABELS[best[0]]]


def test_class_names_come_from_a_file_where_the_weights_have_none(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "classifier.safetensors"
    save_classifier(weights, None)
    names = tmp_path / "names.txt"
    names.write_text("eins\nzwei\n")
    with pytest.raises(FeatureError, match="2 names for the 3 classes"):
        predict(weights, [folder], settings=SETTINGS, classes=names)
    names.write_text("eins\nzwei\ndrei\n")
    predictions = predict(weights, [folder / "a.mp4"], tmp_path / "out.csv", SETTINGS, classes=names)
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {"eins", "zwei", "drei"}
    assert [row["class"] for row in rows] == list(predictions[0].classes)
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1)


def test_weights_that_are_no_classifier_or_have_no_text_are_refused_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    weights = save_encoder(tmp_path / "weights.safetensors")
    with pytest.raises(FeatureError, match="an encoder alone, not a fine-tuned classifier"):
        predict(weights, [folder], settings=SETTINGS)
    with pytest.raises(FeatureError, match="have no text"):
        retrieve(weights, ["a dog"], [folder], SETTINGS)
    with pytest.raises(FeatureError, match="text is empty"):
        retrieve(weights, [" "], [folder], SETTINGS)
    with pytest.raises(FeatureError, match=r"ends in \.csv or \.parquet or \.json"):
        predict(weights, [folder], "out.txt", SETTINGS)


def save_contrast_run(path: Path, width: int, sha256: str) -> VideoEmbedder:
    torch.manual_seed(2)
    branch = ContrastHead(SMALL.width, width, Contrast(hidden=16))
    branch.text_model = {"model": CLIP, "weights_sha256": sha256}
    embedder = VideoEmbedder(VideoEncoder(SMALL), branch).eval()
    zoo.save(embedder.encoder, path, extra={"contrast": branch.state_dict()}, header={"contrast": branch.describe()})
    return embedder


def test_a_run_with_contrast_finds_videos_and_keeps_their_vectors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(folder, videos)
    encoder = TextEncoder.load(Text(model=CLIP), "cpu")
    texts = ["a red circle", "a blue square"]
    vectors = encoder.encode(texts)
    save_contrast_run(tmp_path / "weights.safetensors", vectors.shape[1], "0" * 64)
    with pytest.raises(FeatureError, match="their weights differ"):
        retrieve(tmp_path, texts, videos, SETTINGS)
    sha256 = str(encoder.identity["weights_sha256"])
    embedder = save_contrast_run(tmp_path / "weights.safetensors", vectors.shape[1], sha256)
    found = retrieve(tmp_path, texts, [videos], SETTINGS)
    expected = {}
    for video in ("a.mp4", "b.mp4"):
        cropped = crop_by_hand(decode_by_hand(videos / video, 64, SHORT, 2))
        with torch.inference_mode():
            units = [embedder(torch.from_numpy(cropped[window])[None])[0].numpy() for window in windows_of(videos)]
        mean = np.sum(units, axis=0)
        expected[video] = mean / np.linalg.norm(mean)
    for text, matches in zip(vectors, found, strict=True):
        assert {match.video: match.score for match in matches} == pytest.approx(
            {video: float(text @ vector) for video, vector in expected.items()}, abs=1e-5
        )
        assert matches[0].score >= matches[1].score
    assert (tmp_path / "videos.stm-retrieve.parquet").is_file()
    capsys.readouterr()
    os.utime(videos / "a.mp4", ns=(0, 0))  # as if it had changed
    assert retrieve(tmp_path, texts[:1], [videos], SETTINGS, top=1) == [found[0][:1]]
    assert "2 videos, 1 of which were known" in capsys.readouterr().err


def test_a_run_with_language_compares_the_frames_of_whole_frames(folder: Path, tmp_path: Path) -> None:
    run = make_run("umt", make_small_bert(tmp_path / "bert"))
    torch.manual_seed(3)
    assert run.language is not None
    model = VideoLanguageModel(
        VideoEncoder(zoo.describe(run)), SplitBert.load(run.language), run.language.embedding
    ).eval()
    zoo.save(
        model.encoder,
        tmp_path / "weights.safetensors",
        extra={EXTRA: model.language_state()},
        header={EXTRA: model.describe()},
    )
    (tmp_path / "config.json").write_text(json.dumps({"run": run.model_dump(mode="json")}))
    ((first, second),) = retrieve(
        tmp_path / "weights.safetensors",
        ["a red circle moves left"],
        [folder],
        ClipSettings(every=2, short_side=SHORT, device="cpu", sampling="tsn"),
        index=tmp_path / "index.parquet",
    )
    assert run.frames == FRAMES and run.image_size == SIZE * 2
    scores = {}
    for video in ("a.mp4", "b.mp4"):
        stored = decode_by_hand(folder / video, 64, SHORT, 2)[[1, 3, 6, 8]]  # the middle of each quarter of 10 frames
        squashed = [cv2.resize(frame, (64, 64), interpolation=cv2.INTER_CUBIC) for frame in stored]
        clip = torch.from_numpy(np.stack(squashed).transpose(0, 3, 1, 2))[None]
        with torch.inference_mode():
            tokens = model.language.tokenizer.encode(["a red circle moves left"], 8)
            text = model.embed_text(model.encode_text(tokens))[0]
            scores[video] = float(model.embed_frames(model.encoder(clip), 4)[0] @ text)
    assert {first.video: first.score, second.video: second.score} == pytest.approx(scores, abs=1e-5)
    assert first.score >= second.score
