"""STM's decoder against loops, and what it does without text, with one frame and at its start."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stm.models.spatiotemporal.decoder import LayerDecoder, SpatioTemporalDecoder
from stm.models.vit import position_table

WIDTH, FEATURE, LAYERS, SIDE, SLOTS, CHANNELS = 6, 5, 2, 4, 4, 16
TOKENS = SIDE**2


def build(started: bool = False, text_width: int = WIDTH, as_released: bool = False) -> SpatioTemporalDecoder:
    """A decoder in double precision; unless only `started`, with all weights moved away from their start."""
    torch.manual_seed(1)
    sizes = (WIDTH, text_width, FEATURE, LAYERS, SLOTS, SIDE, CHANNELS)
    decoder = SpatioTemporalDecoder(*sizes, as_released).double()
    if not started:
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            for name, buffer in decoder.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand_like(buffer))
    return decoder.eval()


def draw_inputs(
    frames: int, visible: int = 5, batch: int = 2, text_width: int = WIDTH
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, kept tokens (as many a frame) and text."""
    generator = torch.Generator().manual_seed(frames)
    order = torch.rand(batch, frames, TOKENS, generator=generator).argsort(-1)[..., :visible].sort(-1).values
    kept = (order + torch.arange(frames)[:, None] * TOKENS).flatten(1)
    features = torch.randn(LAYERS, *kept.shape, WIDTH, generator=generator, dtype=torch.float64)
    return features, kept, torch.randn(batch, text_width, generator=generator, dtype=torch.float64)


def blob_of(point: Tensor) -> Tensor:
    """Mean of the maps of nine points, [side, side]."""
    grid, total = torch.linspace(-1, 1, SIDE, dtype=torch.float64), torch.zeros(SIDE, SIDE, dtype=torch.float64)
    for down in (-0.2, 0.0, 0.2):
        for right in (-0.2, 0.0, 0.2):
            for row in range(SIDE):
                for column in range(SIDE):
                    value = 1.0
                    for distance in (grid[row] - point[1] - down, grid[column] - point[0] - right):
                        value *= 1 + max(0.0, 1 - 1.5 * max(0.0, abs(distance.item()) - 0.25))
                    total[row, column] += value / 9
    return total


def norm_and_head(layer: LayerDecoder, tokens: Tensor) -> Tensor:
    out = tokens @ layer.head.weight.T + layer.head.bias
    return functional.layer_norm(out, (FEATURE,), layer.norm.weight, layer.norm.bias, 1e-5)


def place(visible: Tensor, kept: list[int], base: Tensor, frames: int) -> Tensor:
    """Tokens of one clip, [L, width]."""
    tokens = torch.stack([base] * (frames * TOKENS))
    for row, number in zip(visible, kept, strict=True):
        tokens[number] = row
    return tokens + position_table(SLOTS * TOKENS, WIDTH)[0, : frames * TOKENS].double()


def decode_clip(layer: LayerDecoder, visible: Tensor, kept: list[int], text: Tensor, frames: int) -> Tensor:
    """One layer's prediction for one clip of several frames, pair by pair: [L, FEATURE]."""
    empty = place(visible, kept, torch.zeros(WIDTH, dtype=torch.float64), frames).view(frames, TOKENS, WIDTH)
    filled = place(visible, kept, text, frames)
    pairs = [layer.alignment.predictor(empty[None, t : t + 2]) for t in range(frames - 1)]
    former = [blob_of(pair.points[0, 0, 0]).flatten() for pair in pairs]
    latter = [blob_of(pair.points[0, 0, 1]).flatten() for pair in pairs]
    halves = [pair.feature[0, 0].split(CHANNELS // 2) for pair in pairs]
    aligned, between = [], []
    for t in range(frames):
        if t == 0:
            aligned.append(former[0][:, None] * empty[0])
            between.append(halves[0][0])
        elif t == frames - 1:
            aligned.append(latter[-1][:, None] * empty[t])
            between.append(halves[-1][1])
        else:
            aligned.append((former[t][:, None] * empty[t] + latter[t - 1][:, None] * empty[t]) / 2)
            between.append((halves[t][0] + halves[t - 1][1]) / 2)
    weight, bias = layer.alignment.temporal.weight[:, :, :, 0, 0], layer.alignment.temporal.bias
    nothing = torch.zeros_like(between[0])
    padded = [nothing, *between, nothing]
    mixed = []
    for t in range(frames):
        around = sum(torch.einsum("oc,cyx->oyx", weight[:, :, k], padded[t + k]) for k in range(3))
        mixed.append((around + bias[:, None, None]).flatten(1).T)
    widen = layer.alignment.widen
    mixed = [value @ widen.weight.T + widen.bias for value in mixed]
    out = filled
    for linear, value in ((layer.from_aligned, torch.cat(aligned)), (layer.from_pairs, torch.cat(mixed))):
        out = out + value @ linear.weight.T + linear.bias
    return norm_and_head(layer, out)


@torch.no_grad()
@pytest.mark.parametrize("frames", [2, 3, 4])
def test_the_decoder_equals_loops_over_layers_clips_and_pairs(frames: int) -> None:
    decoder = build()
    features, kept, text = draw_inputs(frames)
    found = decoder(features, kept, text, frames)
    assert found.shape == (LAYERS, 2, frames * TOKENS, FEATURE)
    for number, layer in enumerate(decoder.layers):
        for clip in range(2):
            assert isinstance(layer, LayerDecoder)
            expected = decode_clip(layer, features[number, clip], kept[clip].tolist(), text[clip], frames)
            torch.testing.assert_close(found[number, clip], expected)


@torch.no_grad()
@pytest.mark.parametrize(("frames", "with_text"), [(1, True), (1, False), (3, False)])
def test_images_and_clips_without_text_are_read_linearly_from_tokens_and_zeros(frames: int, with_text: bool) -> None:
    decoder = build()
    features, kept, text = draw_inputs(frames)
    found = decoder(features, kept, text if with_text else None, frames)
    for number, layer in enumerate(decoder.layers):
        for clip in range(2):
            assert isinstance(layer, LayerDecoder)
            zero = torch.zeros(WIDTH, dtype=torch.float64)
            tokens = place(features[number, clip], kept[clip].tolist(), zero, frames)
            torch.testing.assert_close(found[number, clip], norm_and_head(layer, tokens))


@torch.no_grad()
def test_at_the_start_text_makes_a_difference_only_where_tokens_are_hidden() -> None:
    decoder = build(started=True)
    features, kept, text = draw_inputs(3)
    with_text, without = decoder(features, kept, text, 3), decoder(features, kept, None, 3)
    hidden = torch.ones(2, 3 * TOKENS, dtype=torch.bool).scatter(1, kept, False)
    torch.testing.assert_close(with_text[:, ~hidden], without[:, ~hidden])
    assert (with_text[:, hidden] - without[:, hidden]).abs().amax(dim=-1).min() > 1e-3
    torch.testing.assert_close(decoder(features, kept, torch.zeros_like(text), 3), without)


@torch.no_grad()
def test_layers_have_weights_of_their_own_and_do_not_see_each_other() -> None:
    decoder = build()
    features, kept, text = draw_inputs(3)
    same = features[:1].expand(LAYERS, -1, -1, -1)
    found = decoder(same, kept, text, 3)
    assert (found[0] - found[1]).abs().max() > 0.1
    changed = torch.cat([features[:1], features[1:] + 1])
    assert torch.equal(decoder(changed, kept, text, 3)[0], decoder(features, kept, text, 3)[0])


def test_gradients_reach_visible_tokens_text_and_every_weight() -> None:
    decoder = build().train()
    features, kept, text = draw_inputs(3)
    features.requires_grad_()
    text.requires_grad_()
    target = torch.randn(LAYERS, 2, 3 * TOKENS, FEATURE, generator=torch.Generator().manual_seed(9))
    (decoder(features, kept, text, 3) * target).sum().backward()
    learned = [*decoder.named_parameters(), ("features", features), ("text", text)]
    assert [name for name, p in learned if p.grad is None or not p.grad.abs().max() > 0] == []


def test_both_branches_start_at_zero_and_learn_from_the_first_step() -> None:
    decoder = build(started=True).train()
    features, kept, text = draw_inputs(3)
    target = torch.randn(LAYERS, 2, 3 * TOKENS, FEATURE, generator=torch.Generator().manual_seed(9))
    (decoder(features, kept, text, 3) * target).sum().backward()
    for layer in decoder.layers:
        for linear in (layer.from_aligned, layer.from_pairs):
            assert isinstance(linear, nn.Linear)
            assert not linear.weight.any() and not linear.bias.any()
            assert linear.weight.grad is not None and linear.weight.grad.abs().max() > 0


def test_as_released_the_branches_start_like_all_linear_layers() -> None:
    for layer in build(started=True, as_released=True).layers:
        for linear in (layer.from_aligned, layer.from_pairs):
            bound = (6 / (WIDTH + WIDTH)) ** 0.5  # Xavier's uniform distribution
            assert 0.5 * bound < linear.weight.abs().max() <= bound
            assert not linear.bias.any()


@pytest.mark.parametrize("with_text", [True, False])
def test_as_released_the_gradient_also_comes_from_the_first_places(with_text: bool) -> None:
    """Of a full sequence's gradient, the k-th visible token gets that at its own place and that at place k."""
    features, kept, text = draw_inputs(3)
    gradients: list[Tensor] = []
    values: list[Tensor] = []
    at_places: list[list[Tensor]] = []
    for as_released in (False, True):
        decoder = build(as_released=as_released)
        if as_released:
            decoder.load_state_dict(build().state_dict())
        # The gradient at every place: of a term of value 0 that is added to every layer's input.
        probes: list[Tensor] = []
        for layer in decoder.layers:
            layer.register_forward_pre_hook(partial(add_probes, probes))
        visible = features.clone().requires_grad_()
        predicted = decoder(visible, kept, text if with_text else None, 3)
        values.append(predicted.detach())
        predicted.square().sum().backward()
        assert visible.grad is not None
        gradients.append(visible.grad)
        at_places.append([value.grad.flatten(1, 2) for value in probes if value.grad is not None])
    assert torch.equal(values[0], values[1])
    if not with_text:  # as for images, which the released code treats by itself
        assert torch.equal(gradients[0], gradients[1])
        return
    for number in range(LAYERS):
        empty, filled = at_places[0][2 * number : 2 * number + 2]
        expected = gradients[0][number] + (empty + filled)[:, : kept.shape[1]]
        torch.testing.assert_close(gradients[1][number], expected)


def add_probes(probes: list[Tensor], _: nn.Module, given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    probed: list[Tensor | None] = []
    for value in given:
        if value is not None:
            probes.append(torch.zeros_like(value, requires_grad=True))
        probed.append(None if value is None else value + probes[-1])
    return tuple(probed)


@torch.no_grad()
def test_text_of_another_width_is_projected_and_of_the_same_width_is_not() -> None:
    assert not list(build().text_entry.parameters())
    decoder = build(text_width=9)
    features, kept, text = draw_inputs(3, text_width=9)
    entry = decoder.text_entry
    assert isinstance(entry, nn.Linear)
    narrow = text @ entry.weight.T + entry.bias
    found = decoder(features, kept, text, 3)
    decoder.text_entry = nn.Identity()
    torch.testing.assert_close(found, decoder(features, kept, narrow, 3))


@torch.no_grad()
def test_more_frames_than_slots_and_other_numbers_of_layers_are_refused() -> None:
    decoder = build()
    features, kept, text = draw_inputs(5)
    with pytest.raises(ValueError, match="clips of 5 frames; the decoder has positions for 1 to 4"):
        decoder(features, kept, text, 5)
    features, kept, text = draw_inputs(2)
    with pytest.raises(ValueError, match="features of 1 layers for 2 decoders"):
        decoder(features[:1], kept, text, 2)


@torch.no_grad()
def test_the_decoder_runs_under_autocast_and_compiles_to_one_graph() -> None:
    decoder = build().float()
    features, kept, text = draw_inputs(3)
    given = (features.float(), kept, text.float(), 3)
    with torch.autocast("cpu", torch.bfloat16):
        rough = decoder(*given)
    assert (rough.float() - decoder(*given)).abs().mean() < 0.1
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), decoder(*given))
