"""Sizes, our own files, and the one door for all sources."""

import ast
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_parts import Head, draw, numbers
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stm.config import PretrainRun
from stm.models.vit import Architecture, VideoEncoder, VideoMAE
from stm.models.weights import zoo
from stm.models.weights.checks import outline
from stm.models.weights.transformers import from_transformers_state

README = Path(__file__).parents[3] / "README.md"
DOCUMENT = README.parent / "docs/weights.md"
TINY = PretrainRun(model="tiny", image_size=32, patch_size=8, frames=4)


SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in ("base", "large", "huge")]


@pytest.mark.parametrize("size", ["small", *SLOW_SIZES])
def test_sizes_have_transformers_number_of_parameters(size: str) -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    with torch.device("meta"):
        architecture = zoo.describe(PretrainRun.model_validate({"model": size}))
        model = VideoMAE(architecture)
        peer = VideoMAEForPreTraining(VideoMAEConfig(**zoo.transformers_config(architecture)))
    key_biases = architecture.depth * architecture.width + architecture.decoder_depth * architecture.decoder_width
    assert zoo.count_parameters(model) == zoo.count_parameters(peer) + key_biases


def test_the_base_encoder_has_the_published_86_million_parameters() -> None:
    with torch.device("meta"):
        model = VideoMAE(zoo.describe(PretrainRun()))
    assert round(zoo.count_parameters(model.encoder) / 1e6) == 86


def test_a_run_s_decoder_depth_overrides_the_size_s() -> None:
    assert zoo.describe(PretrainRun(model="large")).decoder_depth == 12
    assert zoo.describe(PretrainRun(model="large", decoder_depth=4)).decoder_depth == 4


def test_the_same_seed_builds_the_same_weights() -> None:
    torch.manual_seed(7)
    first = zoo.build(TINY).state_dict()
    torch.manual_seed(7)
    second = zoo.build(TINY).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_weights_come_back_exactly_and_as_the_same_bytes(tmp_path: Path) -> None:
    model = zoo.build(TINY)
    zoo.save(model, tmp_path / "a.safetensors")
    again = zoo.load(tmp_path / "a.safetensors")
    assert again.architecture == model.architecture
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    zoo.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_encoder_can_be_had_alone_with_stochastic_depth(tmp_path: Path) -> None:
    model = zoo.build(TINY)
    zoo.save(model, tmp_path / "a.safetensors")
    encoder = zoo.load_encoder(tmp_path / "a.safetensors", drop_path=0.2)
    assert encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert torch.equal(encoder.norm.weight, model.encoder.norm.weight)


def test_files_that_are_not_ours_or_torn_are_errors_that_name_them(tmp_path: Path) -> None:
    torn, foreign, absent = (tmp_path / f"{name}.safetensors" for name in ("torn", "foreign", "absent"))
    zoo.save(zoo.build(TINY), torn)
    torn.write_bytes(torn.read_bytes()[:1000])
    save_file({"x": torch.zeros(1)}, foreign)
    for path, reason in [(torn, "cannot be read"), (foreign, "not written by stm"), (absent, "cannot be read")]:
        with pytest.raises(ValueError, match=rf"{path.stem}\.safetensors.*{reason}"):
            zoo.load(path)


def test_an_architecture_of_another_version_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    header = {"architecture": {**asdict(zoo.describe(TINY)), "newer": 1}}
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {zoo.HEADER_KEY: json.dumps(header)})
    with pytest.raises(ValueError, match=r"a\.safetensors was written by another version.*newer"):
        zoo.load(tmp_path / "a.safetensors")


def test_weights_of_another_shape_than_the_header_says_are_an_error(tmp_path: Path) -> None:
    model = zoo.build(TINY)
    model.architecture = zoo.describe(PretrainRun(model="tiny", image_size=32, patch_size=8, frames=4, decoder_depth=1))
    zoo.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors was written by stm.*12 not expected: decoder\.blocks\.1"):
        zoo.load(tmp_path / "a.safetensors")


def blank(architecture: Architecture) -> zoo.Weights:
    return zoo.Weights(architecture, outline(architecture, "pretraining"))


def test_weights_go_to_transformers_and_back_unchanged() -> None:
    model = zoo.build(TINY)
    back = from_transformers_state(zoo.to_transformers(model), blank(model.architecture), "a state")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_the_export_loads_into_transformers_without_a_key_missing_or_left_over() -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    model = zoo.build(TINY)
    peer = VideoMAEForPreTraining(VideoMAEConfig(**zoo.transformers_config(model.architecture)))
    assert peer.state_dict().keys() == zoo.to_transformers(model).keys()
    peer.load_state_dict(zoo.to_transformers(model))


def snippets() -> list[Any]:
    """The python blocks on weights: of docs/weights.md's section on timm and transformers, and of the README, if any."""
    section = DOCUMENT.read_text(encoding="utf-8").partition("## In timm and transformers")[2].partition("\n## ")[0]
    ours, others = (
        re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        for text in (section, README.read_text(encoding="utf-8"))
    )
    assert ours
    named = {"weights.md": ours, "README": [code for code in others if "stm.models.weights" in code]}
    return [
        pytest.param(code, id=f"{name}-{number}") for name, codes in named.items() for number, code in enumerate(codes)
    ]


@pytest.mark.parametrize("code", snippets())
def test_the_documents_lines_on_weights_work_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    (path,) = set(re.findall(r'"(results/\S+?)"', code))
    model = zoo.build(TINY).eval()
    zoo.save(model, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    video, clip, masked = draw(model.architecture)
    names: dict[str, Any] = {"clip": clip.float()}
    exec(code, names)
    peer = next(names[name] for name in ("peer", "model") if isinstance(names.get(name), nn.Module))
    if isinstance(peer, VisionTransformer):
        expected, found = model.encoder.forward_features(video), names["features"]
    else:
        expected = model(video, numbers(~masked), numbers(masked))
        found = peer.eval()(clip.float().transpose(1, 2), masked).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # transformers' epsilon, see the document


def test_the_snippets_for_timm_s_and_transformers_users_have_three_lines() -> None:
    codes = [parameter.values[0] for parameter in snippets() if str(parameter.id).startswith("weights.md")]
    assert [len(ast.parse(code).body) for code in codes] == [3, 3]


def test_a_state_without_the_final_norm_or_of_other_depth_is_an_error() -> None:
    model = zoo.build(TINY)
    state = zoo.to_transformers(model)
    del state["videomae.layernorm.weight"]
    with pytest.raises(ValueError, match=r"a state.*1 missing: videomae\.layernorm\.weight"):
        from_transformers_state(state, blank(model.architecture), "a state")
    depth = model.architecture.depth
    deeper = Architecture(**{**vars(model.architecture), "depth": depth + 1})
    with pytest.raises(ValueError, match=rf"a state.*layer\.{depth}"):
        from_transformers_state(zoo.to_transformers(model), blank(deeper), "a state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": "wide"}, "invalid width 'wide'"),
        ({"depth": 10**9}, "invalid depth 1000000000"),
        ({"image_size": 32768, "patch_size": 2}, "tokens per clip; the maximum is"),
        ({"heads": 5}, "width 128 is not divisible by heads 5"),
        ({"norm_eps": -1.0}, "invalid norm_eps -1.0"),
    ],
)
def test_a_forged_header_is_an_error_before_anything_is_built(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    header = {"architecture": {**asdict(zoo.describe(TINY)), **change}}
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {zoo.HEADER_KEY: json.dumps(header)})
    with pytest.raises(zoo.WeightsError, match=rf"a\.safetensors.*{message}"):
        zoo.load_any(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", ["[]", "3", '{"architecture": []}', '{"architecture": {"width": 1}}'])
def test_a_header_of_another_form_is_an_error_that_names_the_file(tmp_path: Path, header: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {zoo.HEADER_KEY: header})
    with pytest.raises(zoo.WeightsError, match=r"a\.safetensors"):
        zoo.load_any(tmp_path / "a.safetensors")


def test_an_encoder_and_a_classifier_have_files_too(tmp_path: Path) -> None:
    model = zoo.build(TINY)
    zoo.save(model.encoder, tmp_path / "encoder.safetensors")
    zoo.save(Head(model.encoder, 3), tmp_path / "classifier.safetensors", labels=["a", "b", "c"])
    for kind in ("encoder", "classifier"):
        path = tmp_path / f"{kind}.safetensors"
        assert zoo.read(path).kind == kind
        assert isinstance(zoo.load_any(path), VideoEncoder)
        assert torch.equal(zoo.load_encoder(path).norm.weight, model.encoder.norm.weight)
        with pytest.raises(zoo.WeightsError, match=rf"{kind}\.safetensors has an encoder and no decoder"):
            zoo.load(path)
    assert zoo.read(tmp_path / "classifier.safetensors").labels == ("a", "b", "c")
    with pytest.raises(zoo.WeightsError, match="2 names for 3 classes"):
        zoo.save(Head(model.encoder, 3), tmp_path / "b.safetensors", labels=["a", "b"])


@pytest.mark.parametrize("format", ["stm", "videomae", "transformers"])
def test_weights_go_into_a_model_of_other_clips_and_pictures(tmp_path: Path, format: zoo.Format) -> None:
    zoo.save(zoo.build(TINY), tmp_path / "a.safetensors")
    path = zoo.convert(tmp_path / "a.safetensors", tmp_path / "converted", format)
    wanted = zoo.describe(TINY.model_copy(update={"image_size": 48, "frames": 8}))
    model = zoo.load_any(path, wanted)
    assert isinstance(model, VideoMAE) and model.architecture == wanted
    video, _, masked = draw(wanted)
    assert model(video, numbers(~masked), numbers(masked)).shape == (2, wanted.tokens - 3, wanted.token_values)
    # An encoder of its own of this size, with the same weights, is the same network: nothing else was carried over.
    fresh = VideoEncoder(wanted)
    fresh.load_state_dict(model.encoder.state_dict())
    assert torch.equal(fresh.positions, model.encoder.positions)


@pytest.mark.parametrize("format", ["stm", "videomae", "transformers"])
def test_other_architectures_are_errors_that_say_the_difference(tmp_path: Path, format: zoo.Format) -> None:
    zoo.save(zoo.build(TINY), tmp_path / "a.safetensors")
    path = zoo.convert(tmp_path / "a.safetensors", tmp_path / "converted", format)
    a = zoo.describe(TINY)
    with pytest.raises(zoo.WeightsError, match=r"converted: .*its architecture is not the run's: heads 4 instead of 8"):
        zoo.load_any(path, replace(a, heads=8))
    deeper = replace(a, decoder_depth=7)
    with pytest.raises(zoo.WeightsError, match="decoder_depth 2 instead of 7"):
        zoo.load_any(path, deeper)
    assert zoo.load_encoder(path, architecture=deeper).architecture == deeper


@pytest.mark.parametrize("format", ["stm", "videomae", "official", "transformers", "timm"])
@pytest.mark.parametrize("encoder_only", [False, True])
def test_conversion_gives_back_what_it_was_given(tmp_path: Path, format: str, encoder_only: bool) -> None:
    model = zoo.build(TINY)
    zoo.save(model, tmp_path / "a.safetensors")
    zoo.convert(tmp_path / "a.safetensors", tmp_path / "there", format, encoder_only=encoder_only)
    zoo.convert(tmp_path / "there", tmp_path / "back.safetensors", "stm")
    weights = zoo.read(tmp_path / "back.safetensors")
    assert weights.kind == ("encoder" if encoder_only or format == "timm" else "pretraining")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.tensors.items())


def test_folders_and_files_of_no_known_kind_are_errors_that_say_so(tmp_path: Path) -> None:
    zoo.save(zoo.build(TINY), tmp_path / "run/weights.safetensors")
    assert isinstance(zoo.load_any(tmp_path / "run"), VideoMAE)
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("text.pth", "neither safetensors nor"),
        ("empty", "this folder has neither"),
        ("no", "no such"),
    ]:
        with pytest.raises(zoo.WeightsError, match=rf"{name}: .*{message}"):
            zoo.load_any(tmp_path / name)
    with pytest.raises(zoo.WeightsError, match="unknown format 'keras'; there are: stm, videomae, transformers, timm"):
        zoo.convert(tmp_path / "run", tmp_path / "x", "keras")


@pytest.mark.parametrize("folder", [True, False])
def test_without_transformers_a_message_says_what_its_models_need(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    name = str(tmp_path) if folder else "mistyped"
    with pytest.raises(
        zoo.WeightsError, match=r"need the library transformers: pip install 'stm-video\[language\]'"
    ) as caught:
        zoo.read(name)
    assert ("there is no such file or folder" in str(caught.value)) != folder
