"""The network's parts, against torch's convolution and transformers' table."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stm.models.vit import (
    Architecture,
    TubeletEmbedding,
    VideoEncoder,
    VideoMAE,
    make_blocks,
    make_positions,
    position_table,
    separable_table,
)
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD, join_tubelets, split_tubelets

SMALL = Architecture(32, 8, 2, 4, width=48, depth=3, heads=3, decoder_width=24, decoder_depth=2, decoder_heads=2)


def draw_video(batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)


def normalise(video: torch.Tensor) -> torch.Tensor:
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (video.float() / 255 - mean) / deviation


@pytest.mark.parametrize(("positions", "width"), [(1568, 768), (32, 48), (7, 6)])
def test_the_position_table_is_transformers_own(positions: int, width: int) -> None:
    from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

    torch.testing.assert_close(
        position_table(positions, width), get_sinusoid_encoding_table(positions, width), atol=1e-6, rtol=0
    )


def test_the_embedding_is_a_convolution_of_the_normalised_pixels() -> None:
    embedding = TubeletEmbedding(SMALL)
    convolution = nn.Conv3d(3, 48, kernel_size=(2, 8, 8), stride=(2, 8, 8))
    with torch.no_grad():
        convolution.weight.copy_(embedding.projection.weight.view_as(convolution.weight))
        convolution.bias.copy_(embedding.projection.bias)
    video = draw_video()
    expected = convolution(normalise(video).transpose(1, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(video, None), expected, atol=1e-5, rtol=1e-5)
    kept = torch.tensor([[0, 5, 31], [2, 3, 30]])
    picked = torch.stack([expected[row, kept[row]] for row in range(2)])
    torch.testing.assert_close(embedding(video, kept), picked, atol=1e-5, rtol=1e-5)


def test_tubelets_are_numbered_slot_row_column_and_join_again() -> None:
    video = draw_video()
    tubelets = split_tubelets(video, 2, 8)
    for slot in range(2):
        for row in range(4):
            for column in range(4):
                block = video[:, 2 * slot : 2 * slot + 2, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                assert torch.equal(tubelets[:, slot * 16 + row * 4 + column], block.transpose(1, 2).flatten(2))
    assert torch.equal(join_tubelets(tubelets, 2, 8, 4), video)


def test_bytes_and_fractions_of_one_are_the_same_pixels() -> None:
    encoder = VideoEncoder(SMALL).eval()
    video = draw_video()
    torch.testing.assert_close(encoder(video), encoder(video.float() / 255))


def test_keeping_all_tokens_is_keeping_none_out() -> None:
    encoder = VideoEncoder(SMALL).eval()
    everything = torch.arange(32).expand(2, -1)
    torch.testing.assert_close(encoder(draw_video(), everything), encoder(draw_video()))


def test_hidden_tokens_have_no_influence() -> None:
    encoder = VideoEncoder(SMALL).eval()
    kept = torch.tensor([[1, 4, 20], [7, 8, 31]])
    video = draw_video()
    tubelets = split_tubelets(video, 2, 8)
    hidden = torch.ones(2, 32, dtype=torch.bool).scatter(1, kept, False)
    changed = join_tubelets(torch.where(hidden[:, :, None, None], 255 - tubelets, tubelets), 2, 8, 4)
    assert not torch.equal(changed, video)
    assert torch.equal(encoder(changed, kept), encoder(video, kept))


def test_a_prediction_belongs_to_its_place_whatever_the_order_of_the_tokens() -> None:
    model = VideoMAE(SMALL).eval()
    kept = torch.tensor([[1, 4, 20, 25]])
    decoded = torch.tensor([[0, 2, 9, 30]])
    forward = model(draw_video(1), kept, decoded)
    backward = model(draw_video(1), kept.flip(1), decoded.flip(1))
    assert forward.shape == (1, 4, 3 * 2 * 8 * 8)
    torch.testing.assert_close(backward.flip(1), forward, atol=1e-5, rtol=1e-4)


def test_features_are_the_mean_of_the_tokens() -> None:
    encoder = VideoEncoder(SMALL).eval()
    torch.testing.assert_close(encoder.forward_features(draw_video()), encoder(draw_video()).mean(dim=1))
    raw = encoder(draw_video(), final_norm=False)
    torch.testing.assert_close(encoder.forward_features(draw_video(), final_norm=False), raw.mean(dim=1))
    torch.testing.assert_close(encoder.norm(raw), encoder(draw_video()))


def test_layers_are_the_last_blocks_outputs_through_the_final_norm() -> None:
    encoder = VideoEncoder(SMALL).eval()
    with torch.no_grad():
        encoder.norm.weight.normal_()
    kept = torch.tensor([[1, 4, 20], [7, 8, 31]])
    caught: list[torch.Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    layers = encoder.forward_layers(draw_video(), kept, 2)
    assert layers.shape == (2, 2, 3, 48)
    torch.testing.assert_close(layers, torch.stack([encoder.norm(output) for output in caught[1:]]))
    assert torch.equal(layers[-1], encoder(draw_video(), kept))
    torch.testing.assert_close(encoder.forward_layers(draw_video(), None, 1)[0], encoder(draw_video()))


@pytest.mark.parametrize("layers", [0, 4])
def test_more_layers_than_blocks_are_refused(layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers {layers} must be 1 to 3"):
        VideoEncoder(SMALL).forward_layers(draw_video(), None, layers)


@pytest.mark.parametrize("positions", ["joint", "separable"])
def test_a_shorter_clip_has_the_table_s_first_positions(positions: str) -> None:
    """As if the same clip were the beginning of one that is long enough, of which only that part is kept."""
    encoder = VideoEncoder(replace(SMALL, positions=positions)).eval()
    video, first = draw_video(), torch.arange(16).expand(2, -1)
    torch.testing.assert_close(encoder(video[:, :2]), encoder(video, first))
    kept = torch.tensor([[0, 3, 15], [1, 2, 9]])
    torch.testing.assert_close(encoder(video[:, :2], kept), encoder(video, kept))


def test_stochastic_depth_rises_to_its_rate_and_is_off_in_evaluation() -> None:
    blocks = make_blocks(48, 4, 3, 4.0, 1e-6, drop_path=0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    encoder = VideoEncoder(SMALL, drop_path=0.9)
    assert not torch.equal(encoder(draw_video()), encoder(draw_video()))
    encoder.eval()
    assert torch.equal(encoder(draw_video()), encoder(draw_video()))


def test_the_initialisation_is_videomae_s() -> None:
    torch.manual_seed(0)
    model = VideoMAE(replace(SMALL, width=192, decoder_width=96))
    qkv = model.encoder.blocks[0].attn.qkv
    assert qkv.weight.abs().max() <= (6 / (192 + 576)) ** 0.5 and qkv.bias.abs().max() == 0
    assert qkv.weight.std().item() == pytest.approx((2 / (192 + 576)) ** 0.5, rel=0.02)
    # Truncated at one standard deviation, so that 0.54 of it is left.
    token = model.decoder.mask_token
    assert token.abs().max() <= 0.02 and token.std().item() == pytest.approx(0.02 * 0.5396, rel=0.15)
    # Between encoder and decoder torch's default: uniform in 1 / sqrt(width).
    entry = model.decoder.entry.weight
    assert entry.abs().max() <= 192**-0.5 and entry.std().item() == pytest.approx((3 * 192) ** -0.5, rel=0.02)
    # The convolution there keeps torch's own: uniform in 1 / sqrt(values), bias and all.
    embedding = model.encoder.embedding.projection
    assert embedding.weight.abs().max() <= 384**-0.5 and embedding.bias.abs().max() > 0


def test_umts_tables_at_4_12_and_1_frames_are_the_first_rows_of_one_table() -> None:
    """Entry j of row p is sin(p / 10000^(2 (j // 2) / width)), for odd j its cosine; rows count on from frame to frame."""
    shape = Architecture(
        224, 16, 1, 12, width=768, depth=1, heads=12, decoder_width=8, decoder_depth=1, decoder_heads=1
    )
    tables = {frames: make_positions(replace(shape, frames=frames), 768)[0] for frames in (1, 4, 12)}
    assert {frames: len(table) for frames, table in tables.items()} == {1: 196, 4: 784, 12: 2352}
    for frames in (1, 4):
        assert torch.equal(tables[frames], tables[12][: 196 * frames])
    for row in (0, 1, 195, 196, 783, 784, 1567, 2351):
        for column in (0, 1, 2, 383, 500, 767):
            angle = row / 10000 ** (2 * (column // 2) / 768)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert tables[12][row, column].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("positions", ["joint", "separable"])
@pytest.mark.parametrize(("known", "frames"), [(8, 4), (4, 12), (4, 4)])
def test_positions_of_another_length_are_stretched_between_the_slots(positions: str, known: int, frames: int) -> None:
    """Against numpy's interpolation of each place's numbers over time, whose samples lie in the middle of equal parts."""
    made = replace(SMALL, tubelet=1, frames=known, positions=positions)
    table = make_positions(made, 48)[0].unflatten(0, (known, -1)).numpy()
    found = (
        make_positions(replace(made, frames=frames, position_frames=known), 48)[0].unflatten(0, (frames, -1)).numpy()
    )
    times = (np.arange(frames) + 0.5) * known / frames - 0.5
    for place in (0, 5, 15):
        for number in (0, 1, 30, 47):
            expected = np.interp(times, np.arange(known), table[:, place, number])
            np.testing.assert_allclose(found[:, place, number], expected, atol=1e-6)
    assert found.shape == (frames, 16, 48)


def test_separable_positions_are_three_tables_side_by_side() -> None:
    slots, side, width, period = 2, 3, 20, 50.0
    table = separable_table(slots, side, width, period)[0]
    assert table.shape == (slots * side**2, width)
    for slot in range(slots):
        for row in range(side):
            for column in range(side):
                parts = [
                    position_table(9, part, period)[0, place] for part, place in ((8, slot), (6, row), (6, column))
                ]
                torch.testing.assert_close(table[slot * side**2 + row * side + column], torch.cat(parts))


def test_an_architecture_chooses_the_table_of_encoder_and_decoder() -> None:
    separable = replace(SMALL, positions="separable", position_period=50.0)
    model, joint = VideoMAE(separable), VideoMAE(SMALL)
    assert torch.equal(model.encoder.positions, separable_table(2, 4, 48, 50.0))
    assert torch.equal(model.decoder.positions, separable_table(2, 4, 24, 50.0))
    assert torch.equal(joint.encoder.positions, position_table(32, 48))
