"""Checkpoints of UMT's and STM's releases, read whole: every tensor is used, named as unused, or an error."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from umt_release import EMBEDDING, FUSION, HEADS, WIDTH, make_release

from stm.models.vit import Architecture
from stm.models.weights.checks import WeightsError
from stm.models.weights.released import Release, read_release

VOCABULARY = 18
SHAPE = Architecture(32, 8, 1, 4, WIDTH, 4, HEADS, decoder_width=64, decoder_depth=2, decoder_heads=2)
STM_ALONE = ["tau", "lambda_param_tp", "temp_fc.weight", "temp_attn.fc.bias", "fusion_model.transformer.weight"]


def read(state: dict[str, Any], path: Path, **content: Any) -> Release:
    torch.save({"model": state, **content}, path)
    return read_release(path, SHAPE, FUSION)


def test_a_pretrained_release_has_all_but_a_decoder_of_answers(tmp_path: Path) -> None:
    state = make_release("pretrained", VOCABULARY)
    release = read(state, tmp_path / "b16.pth")
    assert release.decoder == {} and release.unused == ("clip_teacher", "vision_encoder.clip_decoder")
    expected = {
        "temperature": "temp",
        "pool_norm.bias": "vision_encoder.pool_norm.bias",
        "video_projection.weight": "vision_proj.weight",
        "text_projection.bias": "text_proj.bias",
        "matching_head.weight": "itm_head.weight",
        "language.embeddings.LayerNorm.bias": "text_encoder.bert.embeddings.LayerNorm.bias",
        "language.text_layers.1.output.dense.weight": "text_encoder.bert.encoder.layer.1.output.dense.weight",
        "language.fusion_layers.0.crossattention.self.key.bias": "text_encoder.bert.encoder.layer.2.crossattention.self.key.bias",
        "language.word_bias": "text_encoder.cls.predictions.bias",
        "language.transform.dense.weight": "text_encoder.cls.predictions.transform.dense.weight",
    }
    for ours, theirs in expected.items():
        assert torch.equal(release.language[ours], state[theirs]), ours
    # All others are used once: the encoder's, the numbers of positions, the two tied tensors, and those named above.
    rest = [n for n in state if not n.startswith(("vision_encoder.encoder.", "vision_encoder.clip", "clip_teacher"))]
    assert len(release.language) == len(rest) - 3
    query = release.encoder.tensors["encoder.blocks.3.attn.qkv.bias"][:WIDTH]
    assert torch.equal(query, state["vision_encoder.encoder.blocks.3.attn.q_bias"])


def test_fine_tuned_releases_lack_what_their_task_does_not_need(tmp_path: Path) -> None:
    state = make_release("retrieval", VOCABULARY)
    retrieval = read(state, tmp_path / "ret.pth")
    assert retrieval.decoder == {} and retrieval.unused == ()
    assert "language.word_bias" not in retrieval.language and retrieval.language["temperature"] == state["temp"]
    assert retrieval.language["video_projection.bias"].shape == (EMBEDDING,)
    state = make_release("questions", VOCABULARY)
    questions = read(state, tmp_path / "qa.pth")
    assert not any(name.startswith(("temp", "video_", "matching")) for name in questions.language)
    assert len(questions.decoder) == sum(name.startswith("text_decoder.") for name in state) - 3
    name = "bert.encoder.layer.0.crossattention.self.value.weight"
    assert torch.equal(questions.decoder[name], state[f"text_decoder.{name}"])


def test_half_precision_is_read_as_single(tmp_path: Path) -> None:
    state = {
        name: t.half() if t.is_floating_point() else t for name, t in make_release("retrieval", VOCABULARY).items()
    }
    release = read(state, tmp_path / "half.pth")
    tensors = [*release.language.values(), *release.encoder.tensors.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_what_stm_trains_beside_it_is_named_as_unused(tmp_path: Path) -> None:
    state = make_release("pretrained", VOCABULARY) | {name: torch.zeros(1) for name in STM_ALONE}
    state["vision_encoder.clip_decoder_invis.0.head.bias"] = torch.zeros(1)
    expected = {name.split(".")[0] for name in STM_ALONE} | {"clip_teacher"}
    expected |= {"vision_encoder.clip_decoder", "vision_encoder.clip_decoder_invis"}
    assert read(state, tmp_path / "stm.pth").unused == tuple(sorted(expected))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taught.weight", "1 not expected: taught.weight"),
        ("temperature", "1 not expected: temperature"),
        ("vision_encoder.decoder.weight", "1 not expected: vision_encoder.decoder.weight"),
        ("vision_encoder.encoder.pos_embed", "1 not expected: encoder.pos_embed"),
    ],
)
def test_an_unknown_tensor_is_refused(name: str, message: str, tmp_path: Path) -> None:
    state = make_release("retrieval", VOCABULARY) | {name: torch.zeros(1, 3, WIDTH)}
    with pytest.raises(WeightsError, match=message):
        read(state, tmp_path / "odd.pth")


def test_a_word_head_of_its_own_is_refused(tmp_path: Path) -> None:
    state = make_release("questions", VOCABULARY)
    state["text_decoder.cls.predictions.decoder.weight"] = torch.zeros(VOCABULARY, WIDTH)
    with pytest.raises(WeightsError, match=r"cls\.predictions\.decoder\.weight is not the same as the embeddings"):
        read(state, tmp_path / "untied.pth")


@pytest.mark.parametrize("name", ["text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias"])
def test_a_tied_value_that_is_no_tensor_is_refused(name: str, tmp_path: Path) -> None:
    state = make_release("questions", VOCABULARY)
    bias = {"text_decoder.cls.predictions.bias": torch.zeros(VOCABULARY)}
    bias["text_decoder.cls.predictions.decoder.bias"] = bias["text_decoder.cls.predictions.bias"]
    with pytest.raises(WeightsError, match=r"decoder\.bias is not the same as the predictions\.bias"):
        read(state | bias | {name: 3}, tmp_path / "untied.pth")


class EasyDict(dict):
    """As in UMT's code: a dictionary whose entries are attributes, too."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.__dict__.update(values)


def test_the_settings_that_umt_saves_are_read_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_release("retrieval", VOCABULARY)
    with monkeypatch.context() as patch:
        patch.setattr(EasyDict, "__module__", "utils.easydict")
        module = ModuleType("utils.easydict")
        module.EasyDict = EasyDict  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "utils", ModuleType("utils"))
        patch.setitem(sys.modules, "utils.easydict", module)
        torch.save({"model": state, "config": EasyDict(frames=4, inner=EasyDict(a=1))}, tmp_path / "settings.pth")
    release = read_release(tmp_path / "settings.pth", SHAPE, FUSION)
    assert torch.equal(release.language["temperature"], state["temp"])


def test_a_file_that_was_not_downloaded_yet_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"b16_25m.pth: cannot be read: there is no such file"):
        read_release(tmp_path / "b16_25m.pth", SHAPE, FUSION)


def test_any_other_class_is_refused(tmp_path: Path) -> None:
    torch.save({"model": make_release("retrieval", VOCABULARY), "config": EasyDict(a=1)}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="holds more than weights"):
        read_release(tmp_path / "odd.pth", SHAPE, FUSION)
