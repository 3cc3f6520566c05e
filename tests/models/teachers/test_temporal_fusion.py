"""The temporal transformer against torch's encoder layers, place by place and layer by layer, and its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stm.models.teachers.temporal_fusion import TemporalFusion
from stm.models.weights.checks import WeightsError


def make_fusion(width: int = 128, frames: int = 5, layers: int = 2) -> TemporalFusion:
    torch.manual_seed(0)
    fusion = TemporalFusion(width, frames, layers=layers).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return fusion


def features(layers: int = 2, batch: int = 2, frames: int = 3, tokens: int = 4, width: int = 128) -> Tensor:
    return torch.randn(layers, batch, frames * tokens, width, generator=torch.Generator().manual_seed(1))


def make_peer(state: dict[str, Tensor], start: str) -> nn.TransformerEncoderLayer:
    """torch's own block, of two heads, with the weights of the one whose names begin so."""
    peer = nn.TransformerEncoderLayer(
        128,
        2,
        dim_feedforward=512,
        dropout=0,
        activation=lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's quick GELU
        layer_norm_eps=1e-12,  # ActionCLIP's
        batch_first=True,
        norm_first=True,
    )
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    found = {
        name.removeprefix(start).replace(ours, theirs): tensor
        for name, tensor in state.items()
        for ours, theirs in names.items()
        if name.startswith(f"{start}{ours}.")
    }
    peer.load_state_dict(found)
    return peer.eval()


@torch.no_grad()
def test_each_place_s_frames_are_a_sequence_for_clip_s_blocks_and_what_went_in_is_added_again() -> None:
    fusion, given = make_fusion(), features()
    state = fusion.state_dict()
    blocks = [make_peer(state, f"transformer.resblocks.{number}.") for number in range(2)]
    fused = fusion(given, 3)
    assert fused.shape == given.shape
    for layer in range(2):
        for clip in range(2):
            for place in range(4):
                sequence = given[layer, clip, place::4]  # its 3 frames
                x = (sequence + state["frame_position_embeddings.weight"][:3])[None]
                for block in blocks:
                    x = block(x)
                torch.testing.assert_close(fused[layer, clip, place::4], x[0] + sequence, atol=1e-5, rtol=1e-5)


def test_frames_have_an_order_and_the_table_an_end() -> None:
    fusion, given = make_fusion(), features()
    backwards = given.unflatten(2, (3, 4)).flip(2).flatten(2, 3)
    assert not torch.allclose(
        fusion(backwards, 3).unflatten(2, (3, 4)).flip(2).flatten(2, 3), fusion(given, 3), atol=0.1
    )
    with pytest.raises(ValueError, match="clips of 6 frames: the temporal fusion has positions for 5 frames"):
        fusion(features(frames=6), 6)


def test_its_shape_is_actionclip_s_unless_told_otherwise() -> None:
    fusion = TemporalFusion(512, 77)
    assert len(fusion.transformer.resblocks) == 6
    assert {block.attn.num_heads for block in fusion.transformer.resblocks} == {8}
    assert TemporalFusion(16, 4).transformer.resblocks[0].attn.num_heads == 1


def nest(state: dict[str, Tensor]) -> dict[str, Any]:
    other = {"visual.proj": torch.zeros(2)}
    return {"epoch": 3, "model_state_dict": other, "fusion_model_state_dict": state, "optimizer_state_dict": {}}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["checkpoint", "state dict", "safetensors", "joint safetensors"])
@torch.no_grad()
def test_its_weights_are_read_from_actionclip_s_checkpoint_and_from_its_own_state(
    prefix: str, kind: str, tmp_path: Path
) -> None:
    fusion, given = make_fusion(), features()
    state = {f"{prefix}{name}": tensor for name, tensor in fusion.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if "safetensors" in kind else "weights.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "joint safetensors":
        joint = {f"fusion_model_state_dict.{name}": tensor for name, tensor in state.items()}
        save_file({**joint, "model_state_dict.proj": torch.zeros(2)}, path)
    else:
        torch.save(nest(state) if kind == "checkpoint" else state, path)
    read = TemporalFusion.load(path).eval()
    assert all(torch.equal(tensor, fusion.state_dict()[name]) for name, tensor in read.state_dict().items())
    torch.testing.assert_close(read(given, 3), fusion(given, 3))


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in make_fusion().state_dict().items()}, tmp_path / "half.pt")
    assert {parameter.dtype for parameter in TemporalFusion.load(tmp_path / "half.pt").parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fusion_model_state_dict": {"lstm.weight": torch.zeros(2)}}, "holds no temporal transformer .* lstm.weight"),
        ({"frame_position_embeddings.weight": torch.zeros(4, 8)}, "holds no temporal transformer"),
        (
            {
                "frame_position_embeddings.weight": torch.zeros(4, 8),
                "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
            },
            "its weights do not fit: 11 missing: transformer.resblocks.0.attn.in_proj_bias",
        ),
        ([torch.zeros(2)], "holds a list, not a dictionary"),
    ],
)
def test_other_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=message):
        TemporalFusion.load(tmp_path / "other.pth")


def test_missing_and_torn_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no such file"):
        TemporalFusion.load(tmp_path / "nowhere.pth")
    for name in ("torn.pth", "torn.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 torn")
        with pytest.raises(WeightsError, match=name):
            TemporalFusion.load(tmp_path / name)


@torch.no_grad()
def test_heads_are_those_of_the_file_s_metadata(tmp_path: Path) -> None:
    """The tensors' shapes do not tell: with other heads the same weights compute something else."""
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    four = TemporalFusion(128, 5, 4, 2).eval()
    save_file(four.state_dict(), path, {"heads": "4"})
    read = TemporalFusion.load(path).eval()
    torch.testing.assert_close(read(features(), 3), four(features(), 3))
    save_file(four.state_dict(), path)  # ActionCLIP's: one per 64 features
    assert {block.attn.num_heads for block in TemporalFusion.load(path).transformer.resblocks} == {2}
    for wrong in ("5", "0", "two"):
        save_file(four.state_dict(), path, {"heads": wrong})
        with pytest.raises(
            WeightsError, match=f"model.safetensors: the metadata says '{wrong}' heads, which must divide"
        ):
            TemporalFusion.load(path)
