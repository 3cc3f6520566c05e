"""STM's learnable mask and its network: one pair at a time, start, gradients, straight-through."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stm.config import SpatioTemporal
from stm.masking import complement, get_strategy, to_boolean
from stm.models.spatiotemporal.decoder import MaskGradient, gather_visible
from stm.models.spatiotemporal.mask import SampledMask, SpatioTemporalMask
from stm.models.spatiotemporal.pair_predictor import PairPredictor
from stm.tubelets import gather_tokens

BOTH = ("as_released", "log_probability")
GRADIENTS: tuple[MaskGradient, ...] = ("by_token", "as_released")
STEM = 12


def build(
    sampling: str = "log_probability", side: int = 4, disturbed: bool = True, **more: object
) -> SpatioTemporalMask:
    torch.manual_seed(0)
    mask = SpatioTemporalMask(STEM, side, SpatioTemporal.model_validate({"sampling": sampling, "width": 8, **more}))
    if disturbed:
        disturb(mask.predictor)
    return mask


def disturb(predictor: nn.Module) -> None:
    """Moves it away from its start, where all points are at the centre and norms do nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in predictor.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator))


def draw_inputs(frames: int = 3, side: int = 4, batch: int = 2, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stem = torch.randn(batch, frames * side**2, STEM, generator=generator)
    attention = torch.rand(batch, frames, side**2, generator=generator) ** 6
    attention = 0.9 * attention / attention.sum(dim=-1, keepdim=True)
    return stem, attention, torch.rand(batch, frames, side**2, generator=generator)


def predict_pair(state: dict[str, Tensor], pair: Tensor, ceil: bool) -> tuple[Tensor, Tensor]:
    """Points [4] and feature of one pair [1, 2 * width, side, side], from weights alone, in evaluation."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        shape = (1, -1, 1, 1)
        scaled = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return scaled * weight.view(shape) + bias.view(shape)

    def halve(x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 2, ceil_mode=ceil)

    x = functional.conv2d(pair, state["join.0.weight"], padding=1, groups=pair.shape[1])
    x = norm(x, "join.1").relu()
    x = norm(functional.conv2d(x, state["join.3.weight"]), "join.4").relu()
    feature = x = norm(functional.conv2d(x, state["join.6.weight"], padding=1), "join.7").relu()
    x = halve(norm(functional.conv2d(x, state["shrink.0.weight"], padding=1), "shrink.1")).relu()
    x = halve(norm(functional.conv2d(x, state["shrink.4.weight"], padding=1), "shrink.5")).relu()
    h = x.flatten(2).max(dim=2).values[0]
    points = []
    for frame, part in enumerate(h.chunk(2)):
        rows = slice(frame * len(part) // 2, (frame + 1) * len(part) // 2)
        hidden = (state["point.0.weight"][rows, :, 0] @ part + state["point.0.bias"][rows]).relu()
        two = slice(2 * frame, 2 * frame + 2)
        points.append(state["point.2.weight"][two, :, 0] @ hidden + state["point.2.bias"][two])
    return 0.75 * torch.cat(points).tanh(), feature


@pytest.mark.parametrize("side", [2, 3, 4, 7])
def test_every_pair_is_predicted_by_the_formula_and_on_its_own(side: int) -> None:
    predictor = PairPredictor(6, side, features=16).double()
    disturb(predictor)
    tokens = torch.randn(2, 4, side**2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = predictor.eval()(tokens)
    assert pairs.points.shape == (2, 3, 2, 2) and pairs.feature.shape == (2, 3, 16, side, side)
    for clip in range(2):
        for t in range(3):
            maps = [tokens[clip, t + i].T.reshape(1, 6, side, side) for i in (0, 1)]
            points, feature = predict_pair(predictor.state_dict(), torch.cat(maps, dim=1), ceil=side < 4)
            torch.testing.assert_close(pairs.points[clip, t].flatten(), points)
            torch.testing.assert_close(pairs.feature[clip, t], feature[0])
    assert torch.equal(pairs.former, pairs.points[:, :, 0]) and torch.equal(pairs.latter, pairs.points[:, :, 1])


def test_the_released_size_has_as_many_weights_as_its_layers_add_up_to() -> None:
    join = 1024 * 9 + 2 * 1024 + 1024 * 256 + 2 * 256 + 256 * 256 * 9 + 2 * 256
    shrink = 256 * 128 * 9 + 2 * 128 + 128 * 128 * 9 + 2 * 128
    point = 64 * 64 + 64 + 4 * 32 + 4
    assert sum(p.numel() for p in PairPredictor(512, 14).parameters()) == join + shrink + point


def test_points_start_at_the_centre_and_stay_within_reach() -> None:
    tokens = torch.randn(2, 3, 16, 8) * 100
    assert (PairPredictor(8, 4, 16)(tokens).points == 0).all()
    moved = PairPredictor(8, 4, 16)
    disturb(moved)
    points = moved(tokens).points
    assert points.abs().max() <= 0.75 and points.std() > 0


@pytest.mark.parametrize(("side", "features", "words"), [(1, 16, "1 x 1"), (4, 12, "multiple of 8")])
def test_sizes_that_cannot_be_are_refused(side: int, features: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PairPredictor(8, side, features)


@pytest.mark.parametrize("sampling", BOTH)
@pytest.mark.parametrize("frames", [2, 4])
def test_the_mask_is_the_formula_s(sampling: str, frames: int) -> None:
    mask = build(sampling, points_spread=0.1, temperature=0.2).eval()
    stem, attention, noise = draw_inputs(frames)
    with torch.no_grad():
        mask.mix.fill_(0.3)
        drawn = mask(stem, attention, noise, 0.7)
        tokens = functional.layer_norm(stem @ mask.entry.weight.T + mask.entry.bias, (8,), eps=1e-5)
        points = mask.predictor(tokens.view(2, frames, 16, 8)).points
    grid = torch.linspace(-1, 1, 4)
    for clip in range(2):
        seen = [[points[clip, t, 0]] for t in range(frames - 1)] + [[points[clip, frames - 2, 0]]]
        for t in range(1, frames - 1):
            seen[t].append(points[clip, t - 1, 1])
        for t in range(frames):
            maps = []
            for x, y in (p + 0.1 * torch.tensor([i, j]) for p in seen[t] for i in (-1, 0, 1) for j in (-1, 0, 1)):
                g = [1 + (1 - 1.5 * ((grid - c).abs() - 0.25).clamp(min=0)).clamp(min=0) for c in (y, x)]
                maps.append(torch.outer(*g).flatten())
            blobs = torch.stack(maps).mean(dim=0).softmax(0)
            mixture = 0.3 * blobs + 0.7 * attention[clip, t]
            part = mixture.softmax(0) if sampling == "as_released" else mixture / mixture.sum()
            score = (part if sampling == "as_released" else part.log()) - (-noise[clip, t].log()).log()
            hidden = score >= score.sort().values[16 - 11]  # int(0.7 * 16) = 11
            torch.testing.assert_close(drawn.blobs[clip, t], blobs)
            torch.testing.assert_close(drawn.probability[clip, t], part)
            torch.testing.assert_close(drawn.score[clip, t], score)
            torch.testing.assert_close(drawn.points[clip, t], torch.stack(seen[t]).mean(dim=0))
            assert torch.equal(drawn.weight[clip, t], hidden.float())


@pytest.mark.parametrize("sampling", BOTH)
def test_strategy_and_weight_hide_the_same_tokens_and_the_count_of_videomae_s_truncation(sampling: str) -> None:
    stem, attention, noise = draw_inputs(frames=4, side=14)
    drawn = build(sampling, side=14)(stem, attention, noise, 0.7)
    kept = get_strategy("spatiotemporal")({"spatiotemporal": drawn.score, "noise": noise}, 0.7)
    assert torch.equal(drawn.weight.bool(), to_boolean(kept, 4, 196))
    assert ((drawn.weight == 0) | (drawn.weight == 1)).all()
    assert (drawn.weight.sum(dim=2) == 137).all() and kept.shape == (2, 4 * 59)


def test_at_the_start_blobs_and_points_are_central_in_all_frames() -> None:
    drawn = build(disturbed=False)(*draw_inputs(side=4), 0.5)
    assert (drawn.points == 0).all()
    blobs = drawn.blobs.unflatten(2, (4, 4))
    assert torch.allclose(blobs, blobs.flip(2)) and torch.allclose(blobs, blobs.transpose(2, 3))
    assert (blobs[..., 1, 1] > blobs[..., 0, 0]).all()


def loss_of(drawn: SampledMask) -> Tensor:
    upstream = torch.randn(drawn.weight.shape, generator=torch.Generator().manual_seed(5))
    return (drawn.weight * upstream).sum()


@pytest.mark.parametrize("sampling", BOTH)
def test_gradients_reach_everything_that_is_learned_through_the_weight(sampling: str) -> None:
    mask = build(sampling)
    loss_of(mask(*draw_inputs(), 0.7)).backward()
    missing = [name for name, p in mask.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert missing == []


@pytest.mark.parametrize("sampling", BOTH)
def test_from_the_start_on_gradients_reach_the_layer_of_points_and_the_mix(sampling: str) -> None:
    mask = build(sampling, disturbed=False)
    drawn = mask(*draw_inputs(), 0.7)
    loss_of(drawn).backward()
    last = mask.predictor.point[-1]
    assert isinstance(last, nn.Conv1d)
    assert last.weight.grad is not None and last.weight.grad.abs().max() > 0
    assert mask.mix.grad is not None and mask.mix.grad != 0
    assert not drawn.divergence.requires_grad


def test_the_mix_is_held_between_its_ends_and_still_learns_there() -> None:
    mask = build()
    for outside, held in ((3.0, 1.0), (-0.5, 0.0)):
        with torch.no_grad():
            mask.mix.fill_(outside)
        mask.zero_grad()
        loss_of(mask(*draw_inputs(), 0.7)).backward()
        assert mask.mix.item() == held
        assert mask.mix.grad is not None and mask.mix.grad != 0
    with torch.no_grad():
        mask.mix.fill_(3.0)
    stem, attention, noise = draw_inputs()
    drawn = mask.eval()(stem, attention, noise, 0.7)
    assert mask.mix.item() == 3
    torch.testing.assert_close(drawn.probability, drawn.blobs)


def test_as_released_the_mix_may_leave_its_range_as_in_the_released_code() -> None:
    mask = build("as_released")
    for outside in (3.0, -0.5):
        with torch.no_grad():
            mask.mix.fill_(outside)
        stem, attention, noise = draw_inputs()
        drawn = mask(stem, attention, noise, 0.7)
        assert mask.mix.item() == outside
        expected = (outside * drawn.blobs + (1 - outside) * attention).softmax(dim=-1)
        torch.testing.assert_close(drawn.probability, expected)


def test_as_released_ranks_what_underflows_by_index() -> None:
    stem, attention, noise = draw_inputs(side=14)
    released = build("as_released", side=14)(stem, attention, noise, 0.7)
    assert (released.weight.sum(dim=2) == 137).all()
    rows = released.weight.view(2, -1, 14, 14).mean(dim=(0, 1, 3))
    assert rows[:4].mean() > rows[-4:].mean() + 0.25


def test_the_mix_starts_and_learns_as_the_settings_say() -> None:
    mask = build(mix=0.25, mix_learning_rate=20.0)
    assert mask.mix.item() == 0.25 and mask.learning_rate_factors == {"mix": 20.0}
    assert set(mask.learning_rate_factors) <= {name for name, _ in mask.named_parameters()}


def test_autocast_leaves_probabilities_in_float32() -> None:
    mask, inputs = build(disturbed=False), draw_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        drawn = mask(*inputs, 0.7)
    assert {value.dtype for value in drawn} == {torch.float32}
    assert torch.equal(drawn.weight, mask(*inputs, 0.7).weight)  # points are at the centre either way


def test_the_mask_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    mask, inputs = build(), draw_inputs()
    compiled = torch.compile(mask, fullgraph=True, backend="eager")
    with torch.no_grad():
        mask.mix.fill_(2.0)
    assert torch.equal(compiled(*inputs, 0.7).weight, mask(*inputs, 0.7).weight)
    assert mask.mix.item() == 1


@pytest.mark.parametrize(("frames", "side", "cut"), [(1, 4, 0), (3, 5, 0), (3, 4, 16)])
def test_an_image_and_frames_of_another_size_are_refused(frames: int, side: int, cut: int) -> None:
    stem, attention, noise = draw_inputs(frames, side)
    with pytest.raises(ValueError, match="at least 2 frames, each of 4 x 4"):
        build()(stem[:, cut:], attention, noise, 0.7)


def test_straight_through_leaves_the_visible_tokens_as_they_are_bit_by_bit() -> None:
    tokens = torch.randn(2, 48, 5, generator=torch.Generator().manual_seed(6))
    stem, attention, noise = draw_inputs()
    drawn = build()(stem, attention, noise, 0.7)
    kept = get_strategy("spatiotemporal")({"spatiotemporal": drawn.score, "noise": noise}, 0.7)
    hidden = complement(kept, 48)
    for pooling in GRADIENTS:
        visible = gather_visible(tokens, drawn.weight, kept, pooling)
        assert torch.equal(visible.view(torch.int32), gather_tokens(tokens, kept).view(torch.int32))
        assert torch.equal(gather_visible(tokens, 1 - drawn.weight, hidden, pooling), gather_tokens(tokens, hidden))
        assert gather_visible(tokens.bfloat16(), drawn.weight, kept, pooling).dtype == torch.bfloat16


@pytest.mark.parametrize("pooling", GRADIENTS)
@pytest.mark.parametrize("second_pass", [False, True])
def test_the_student_s_gradient_reaches_mask_and_tokens_at_their_place_and_by_the_pooled_maxima(
    pooling: MaskGradient, second_pass: bool
) -> None:
    """By loops over the memory: 8 tokens of 3 features are 3 rows of 8 numbers as released, and 4 windows of 2 each."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randn(1, 8, 3, generator=generator, dtype=torch.float64)
    weight = torch.tensor([[[1.0, 0, 1, 0], [0, 1, 0, 1]]], dtype=torch.float64)
    kept = torch.tensor([[0, 2, 5, 7]]) if second_pass else torch.tensor([[1, 3, 4, 6]])
    upstream = torch.randn(1, 4, 3, generator=generator, dtype=torch.float64)
    tokens.requires_grad_()
    weight.requires_grad_()
    left_out = 1 - weight if second_pass else weight
    (gather_visible(tokens, left_out, kept, pooling) * upstream).sum().backward()
    seen = (weight if second_pass else 1 - weight).detach().flatten()  # 1: encoded in this pass
    sign = 1 if second_pass else -1  # of the weight in it
    to_weight, to_tokens = torch.zeros(8, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)

    def send(token: int, feature: int, gradient: float) -> None:
        to_weight[token] += sign * gradient * tokens[0, token, feature].item()
        to_tokens[token, feature] += gradient * seen[token]

    for place, token in enumerate(kept[0].tolist()):
        for feature in range(3):
            send(token, feature, upstream[0, place, feature].item())
    for window in range(4):
        for row in range(3):
            if pooling == "by_token":
                candidates = [(2 * window, row), (2 * window + 1, row)]
                gradient = upstream[0, window, row].item()
            else:  # number n of the memory of [8, 3] is feature n % 3 of token n // 3
                candidates = [divmod(8 * row + 2 * window + i, 3) for i in (0, 1)]
                gradient = upstream[0].flatten()[4 * row + window].item()  # the result's memory, [3, 4]
            winner = max(candidates, key=lambda c: tokens[0, c[0], c[1]].item() * seen[c[0]].item())
            send(*winner, gradient)
    torch.testing.assert_close(weight.grad.flatten(), to_weight)
    torch.testing.assert_close(tokens.grad[0], to_tokens)


@pytest.mark.parametrize("pooling", GRADIENTS)
def test_a_loss_on_visible_tokens_trains_the_whole_mask(pooling: MaskGradient) -> None:
    mask = build()
    stem, attention, noise = draw_inputs()
    drawn = mask(stem, attention, noise, 0.7)
    kept = get_strategy("spatiotemporal")({"spatiotemporal": drawn.score, "noise": noise}, 0.7)
    tokens = torch.randn(2, 48, 6, generator=torch.Generator().manual_seed(8))
    gather_visible(tokens, drawn.weight, kept, pooling).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mask.parameters())
