"""Sizes, files and transformers' checkpoints."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stm.config import PretrainRun
from stm.models import zoo
from stm.models.vit import Architecture, VideoMAE

README = Path(__file__).parents[2] / "README.md"
TINY = PretrainRun(model="tiny", image_size=32, patch_size=8, frames=4)


SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in ("base", "large", "huge")]


@pytest.mark.parametrize("size", ["small", *SLOW_SIZES])
def test_sizes_have_transformers_number_of_parameters(size: str) -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    with torch.device("meta"):
        architecture = zoo.describe(PretrainRun(model=size))
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
    with pytest.raises(ValueError, match=r"a\.safetensors: the weights do not fit"):
        zoo.load(tmp_path / "a.safetensors")


def test_weights_go_to_transformers_and_back_unchanged() -> None:
    model = zoo.build(TINY)
    back = zoo.from_transformers(zoo.to_transformers(model), model.architecture)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())


def test_the_export_loads_into_transformers_without_a_key_missing_or_left_over() -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    model = zoo.build(TINY)
    peer = VideoMAEForPreTraining(VideoMAEConfig(**zoo.transformers_config(model.architecture)))
    assert peer.state_dict().keys() == zoo.to_transformers(model).keys()
    peer.load_state_dict(zoo.to_transformers(model))


def test_the_readme_s_lines_on_weights_work_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text(encoding="utf-8").partition("## Weights")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    (path,) = re.findall(r'"(results/\S+)"', code)
    model = zoo.build(TINY)
    zoo.save(model, tmp_path / path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    expected = zoo.to_transformers(model)
    found = names["peer"].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_checkpoint_with_mean_pooling_or_other_depth_is_an_error() -> None:
    model = zoo.build(TINY)
    state = zoo.to_transformers(model)
    del state["videomae.layernorm.weight"]
    with pytest.raises(ValueError, match=r"no weight 'videomae\.layernorm\.weight'.*without mean pooling"):
        zoo.from_transformers(state, model.architecture)
    depth = model.architecture.depth
    deeper = Architecture(**{**vars(model.architecture), "depth": depth + 1})
    with pytest.raises(ValueError, match=rf"layer\.{depth}.*{depth + 1} \+ 2 blocks"):
        zoo.from_transformers(zoo.to_transformers(model), deeper)
