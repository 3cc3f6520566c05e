"""UMT's linear decoders and ClusterSTM's decoder, against the same written out in plain matrices."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_parts import disturb
from torch import Tensor, nn

from stm.masking import complement
from stm.models.feature_decoders import LinearDecoders, TokenDecoder
from stm.models.vit import Architecture
from stm.objectives.alignment import alignment_loss

TINY = Architecture(32, 8, 1, 4, width=24, depth=2, heads=3, decoder_width=16, decoder_depth=4, decoder_heads=2)
CHANNELS = 10  # of the teacher's joint space


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_kept(batch: int, kept: int, total: int = TINY.tokens, seed: int = 0) -> Tensor:
    order = torch.rand(batch, total, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values


def position(token: int, width: int) -> Tensor:
    angles = [token / 10000 ** (2 * (j // 2) / width) for j in range(width)]
    return torch.tensor(
        [math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(angles)], dtype=torch.float32
    ).double()


def norm(x: Tensor, layer: nn.Module, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def map_by(x: Tensor, layer: nn.Module) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def run_block(x: Tensor, block: Any, heads: int) -> Tensor:
    """A pre-norm transformer block on tokens [L, W]."""
    q, k, v = map_by(norm(x, block.norm1), block.attn.qkv).chunk(3, dim=1)
    outputs = []
    for head in range(heads):
        part = slice(head * x.shape[1] // heads, (head + 1) * x.shape[1] // heads)
        weight = (q[:, part] @ k[:, part].T / math.sqrt(x.shape[1] / heads)).softmax(dim=1)
        outputs.append(weight @ v[:, part])
    x = x + map_by(torch.cat(outputs, dim=1), block.attn.proj)
    hidden = map_by(norm(x, block.norm2), block.mlp.fc1)
    return x + map_by(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), block.mlp.fc2)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_each_layer_adds_its_tokens_positions_and_goes_through_its_own_linear_map_and_norm(eps: float) -> None:
    decoders: Any = disturb(LinearDecoders(TINY, CHANNELS, layers=3, norm_eps=eps)).double()
    features, kept = draw(3, 2, 5, 24), draw_kept(2, 5)
    found = decoders(features, kept)
    assert found.shape == (3, 2, 5, CHANNELS)
    for layer in range(3):
        for clip in range(2):
            for k in range(5):
                placed = features[layer, clip, k] + position(int(kept[clip, k]), 24)
                expected = norm(map_by(placed, decoders.heads[layer]), decoders.norms[layer], eps)
                torch.testing.assert_close(found[layer, clip, k], expected, rtol=1e-9, atol=1e-9)


def test_decoded_tokens_equal_blocks_written_out_over_visible_and_mask_tokens() -> None:
    decoder: Any = disturb(TokenDecoder(TINY, CHANNELS, depth=2)).double()
    assert len(decoder.blocks) == 2  # not the architecture's
    encoded, kept = draw(2, 6, 24), draw_kept(2, 6)
    decoded = complement(kept, TINY.tokens)[:, ::7]
    found = decoder(encoded, kept, decoded)
    assert found.shape == (2, decoded.shape[1], CHANNELS)
    for clip in range(2):
        rows = [map_by(encoded[clip, k], decoder.entry) + position(int(kept[clip, k]), 16) for k in range(6)]
        rows += [decoder.mask_token[0, 0] + position(int(token), 16) for token in decoded[clip]]
        x = torch.stack(rows)
        for block in decoder.blocks:
            x = run_block(x, block, heads=2)
        expected = map_by(norm(x[6:], decoder.norm), decoder.head)
        torch.testing.assert_close(found[clip], expected, rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_linear_decoder_and_the_student_s_layers() -> None:
    decoders = LinearDecoders(TINY, CHANNELS, layers=3).double()
    features, kept = draw(3, 2, 5, 24).requires_grad_(), draw_kept(2, 5)
    alignment_loss(decoders(features, kept), draw(3, 2, 5, CHANNELS, seed=1)).backward()
    assert features.grad is not None and (features.grad != 0).any(dim=-1).all()
    for parameter in decoders.parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any()
    assert torch.autograd.gradcheck(lambda x: decoders(x, kept[:1, :2]), (draw(3, 1, 2, 24).requires_grad_(),))


def test_gradients_reach_every_part_of_the_decoder_and_each_visible_token() -> None:
    decoder = TokenDecoder(TINY, CHANNELS, depth=2).double()
    encoded, kept = draw(2, 6, 24).requires_grad_(), draw_kept(2, 6)
    decoder(encoded, kept, complement(kept, TINY.tokens)).square().sum().backward()
    assert encoded.grad is not None and (encoded.grad != 0).any(dim=-1).all()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


@pytest.mark.parametrize("positions", ["joint", "separable"])
def test_images_have_the_places_of_a_clip_s_first_frame(positions: str) -> None:
    """A clip of one frame has the first N token numbers; a student of single frames has the same table of them."""
    architecture = replace(TINY, positions=positions)
    kept = draw_kept(2, 5, total=TINY.slot_tokens)
    decoders: Any = disturb(LinearDecoders(architecture, CHANNELS, layers=1))
    decoder = disturb(TokenDecoder(architecture, CHANNELS, depth=1))
    hidden = complement(kept, TINY.slot_tokens)
    shorter = replace(architecture, frames=1)
    one, another = LinearDecoders(shorter, CHANNELS, 1), TokenDecoder(shorter, CHANNELS, 1)
    one.load_state_dict(decoders.state_dict())
    another.load_state_dict(decoder.state_dict())
    features = draw(1, 2, 5, 24).float()
    assert torch.equal(decoders(features, kept), one(features, kept))
    assert torch.equal(decoder(features[0], kept, hidden), another.eval()(features[0], kept, hidden))


def test_a_prediction_depends_on_its_place_and_not_on_the_order_of_places() -> None:
    decoder = disturb(TokenDecoder(TINY, CHANNELS, depth=2)).double()
    encoded, kept = draw(1, 6, 24), draw_kept(1, 6)
    decoded = complement(kept, TINY.tokens)
    found = decoder(encoded, kept, decoded)
    assert torch.cdist(found[0], found[0]).fill_diagonal_(1).min() > 1e-4
    torch.testing.assert_close(decoder(encoded, kept, decoded.flip(1)), found.flip(1), rtol=1e-9, atol=1e-9)
    order = torch.randperm(6)
    torch.testing.assert_close(decoder(encoded[:, order], kept[:, order], decoded), found, rtol=1e-9, atol=1e-9)


def test_positions_are_fixed_and_no_part_of_the_weights() -> None:
    decoders, decoder = LinearDecoders(TINY, CHANNELS, layers=6), TokenDecoder(TINY, CHANNELS, depth=2)
    assert sum(p.numel() for p in decoders.parameters()) == 6 * (24 * CHANNELS + CHANNELS + 2 * CHANNELS)
    for module in (decoders, decoder):
        assert not any("positions" in name for name in [*module.state_dict(), *dict(module.named_parameters())])
    assert decoder.head.weight.shape == (CHANNELS, 16) and (decoder.head.bias == 0).all()


def test_features_of_bfloat16_pass_through_under_autocast() -> None:
    decoders, decoder = LinearDecoders(TINY, CHANNELS, layers=2), TokenDecoder(TINY, CHANNELS, depth=1)
    kept = draw_kept(2, 5)
    features = draw(2, 2, 5, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = decoders(features, kept), decoder(features[0], kept, complement(kept, TINY.tokens))
    for tensor in found:
        assert tensor.isfinite().all()
    plain = decoders(features.float(), kept)
    torch.testing.assert_close(found[0].float(), plain, rtol=0.1, atol=0.1)


def test_layers_and_decoders_are_as_many() -> None:
    with pytest.raises(ValueError, match="features of 5 layers for 6 linear decoders"):
        LinearDecoders(TINY, CHANNELS, layers=6)(torch.zeros(5, 2, 3, 24), draw_kept(2, 3))
