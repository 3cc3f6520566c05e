"""The small models are read by the code that reads the published ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stm.config import (
    Config,
    ConfigError,
    FrameTeacher,
    LanguageModelCaptions,
    LanguageRun,
    Text,
    VisionLanguageCaptions,
    parse_config,
)
from stm.models.teachers.frame_teacher import FrameTeacher as Teacher
from stm.models.text.split_bert import SplitBert
from stm.models.weights import zoo
from stm.models.weights.initialise import read_initial
from stm.preprocess.captions.language_model import LanguageModel
from stm.preprocess.captions.vision_language import Question, VisionLanguageModel
from stm.preprocess.similarity.dense_scorer import check_tower
from stm.pretrained.clip import load_clip
from stm.pretrained.text_encoder import TextEncoder
from stm.rehearsal.shrink import shrink
from stm.rehearsal.stand_ins import write_stand_ins
from stm.training.release import convert_release

BERT = "bert-base-uncased"
LANGUAGE = {"model": BERT, "fusion_layer": 9, "embedding": 512}
UMT: dict[str, Any] = {"method": "umt", "teacher": {"model": "ViT-B-16-quickgelu@openai"}, "language": LANGUAGE}
STUDY: dict[str, Any] = {
    "name": "own",
    "dataset": {"source": "folder", "root": "videos"},
    "captions": {"llm": {"kind": "llm", "model": "Owner/Instruct"}},
    "similarity": {"model": "ViT-B-32-quickgelu@openai"},
    "text": {"model": "transformers:owner/encoder", "pooling": "mean"},
    "pack": {"captions": "llm", "text": True},
}


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, **runs: dict[str, Any]) -> Config:
    """The rehearsed config of these runs, in whose folder the test then is."""
    full = parse_config({**STUDY, "pretrain": runs})
    small = shrink(full)
    assert write_stand_ins(full, small, folder) == []
    monkeypatch.chdir(folder)
    return small


def test_clip_has_the_published_one_s_patches_activation_and_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = write(tmp_path, monkeypatch)
    clip = load_clip(small.similarity.model, device="cpu")
    assert clip.model.visual.patch_size == (32, 32)
    assert "QuickGELU" in str(clip.model.visual)
    assert clip.tokenizer(["a red circle"]).shape == (1, 77)
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP@webli", "hf-hub:timm/ViT-SO400M-14-SigLIP2"])
def test_siglip_is_small_and_keeps_its_patches_and_pooling(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = parse_config({**STUDY, "similarity": {"model": name, "method": "dense"}})
    small = shrink(full)
    write_stand_ins(full, small, tmp_path)
    monkeypatch.chdir(tmp_path)
    clip = load_clip(small.similarity.model, device="cpu")
    tower = check_tower(clip.model.visual)
    assert tower.prefix == 0 and tower.grid == (2, 2) and tower.patch_size == ((16, 16) if "-16" in name else (14, 14))
    assert sum(parameter.numel() for parameter in clip.model.visual.parameters()) < 1e6
    assert clip.image_size == (2 * tower.patch_size[0], 2 * tower.patch_size[1])


def test_language_model_and_text_encoder_answer_and_embed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = write(tmp_path, monkeypatch)
    source = small.captions["llm"]
    assert isinstance(source, LanguageModelCaptions)
    model = LanguageModel(source, device="cpu")
    assert model._tokenizer.chat_template and len(model.answer(["Describe the action red."])) == 1
    assert small.text == Text(model="transformers:owner/encoder", pooling="mean")
    vectors = TextEncoder.load(small.text, device="cpu").encode(["a red circle", "a blue square"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("given", ["video", "images"])
def test_vision_language_model_answers_about_frames(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"template": {"enable_thinking": False}, "processor": {"do_image_splitting": False}, "revision": "main"}
    captions = {"vlm": {"kind": "vlm", "model": "Owner/VL-7B", "input": given, "frames": 4, **more}}
    full = parse_config({**STUDY, "captions": captions, "pack": {"captions": "vlm", "text": True}})
    small = shrink(full)
    assert write_stand_ins(full, small, tmp_path) == []
    monkeypatch.chdir(tmp_path)
    source = small.captions["vlm"]
    assert isinstance(source, VisionLanguageCaptions)
    assert (source.frames, source.prompts) == (4, full.captions["vlm"].prompts)
    frames = [np.full((64, 80, 3), 50 * number, np.uint8) for number in range(4)]
    model = VisionLanguageModel(source, device="cpu")
    question = Question(frames, [0.0, 0.5, 1.0, 1.5], 2.0, source.prompts[0])
    assert len(model.answer(model.prepare([question, question]))) == 2


def test_teacher_bert_and_initial_weights_fit_the_small_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actionclip = {"model": "actionclip:weights/a.pt", "temporal_fusion": "weights/a.pt"}
    stm = {**UMT, "method": "stm", "teacher": actionclip, "init": "weights/umt.pth"}
    small = write(tmp_path, monkeypatch, umt=UMT, stm=stm)
    for run in small.pretrain.values():
        assert isinstance(run, LanguageRun) and isinstance(run.teacher, FrameTeacher) and run.language is not None
        teacher = Teacher.load(run.teacher, run.image_size // run.patch_size)
        video = torch.zeros(1, 2, 3, run.image_size, run.image_size, dtype=torch.uint8)
        assert teacher(video).features.shape[:3] == (run.teacher.layers, 1, 2 * 16)
        language = SplitBert.load(run.language)
        assert len(language.text_layers) == 9 and language.width == zoo.describe(run).width
    weights, notes = read_initial("weights/umt.pth", zoo.describe(small.pretrain["stm"]))
    assert weights.architecture.width == 128 and notes == ()


@pytest.mark.parametrize("kind", ["language", "classifier", "safetensors"])
def test_releases_become_the_weights_of_their_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"weights/released.{'safetensors' if kind == 'safetensors' else 'pth'}"
    run = {**UMT, "release": path} if kind == "language" else {"tubelet": 1, "frames": 8, "release": path}
    small = write(tmp_path, monkeypatch, released=run)
    convert_release(small.pretrain["released"], tmp_path / "run")
    weights = zoo.read(tmp_path / "run/weights.safetensors")
    assert weights.architecture.width == 128
    if kind == "language":
        state, _ = zoo.load_extra(tmp_path / "run/weights.safetensors", "language")
        assert "temperature" in state


def test_own_small_models_are_used_and_files_that_do_not_exist_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = parse_config({**STUDY, "text": {"model": "local-dir:stm/assets/demo-clip"}})
    assert write_stand_ins(full, shrink(full), tmp_path) == ["local-dir:stm/assets/demo-clip"]
    assert (tmp_path / "stm/assets/demo-clip/open_clip_config.json").is_file()
    shipped = parse_config({**STUDY, "text": {"model": "package:demo-clip"}})
    assert write_stand_ins(shipped, shrink(shipped), tmp_path / "other") == ["package:demo-clip"]
    assert not list((tmp_path / "other").glob("*package*"))
    task = {"task": "finetune", "classes": "classes.txt", "optimisation": {"epochs": 0, "warmup_epochs": 0}}
    run = {"tubelet": 1, "release": "weights/a.pth"}
    missing = parse_config({**STUDY, "pretrain": {"a": run}, "evaluate": {"b": task}})
    with pytest.raises(ConfigError, match=r"classes\.txt: the config names this file"):
        write_stand_ins(missing, shrink(missing), tmp_path)
