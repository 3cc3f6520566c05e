"""A training step, against transformers' VideoMAEForPreTraining with the same weights, and its promises."""

import pytest
import torch
from made_batches import draw_batch, draw_guides, make_run
from torch import nn

from stm.config import PretrainRun
from stm.masking import to_boolean
from stm.methods import build_method
from stm.methods.mae import MAE
from stm.models.vit import VideoMAE
from stm.models.weights import zoo
from stm.objectives.reconstruction import reconstruction_targets
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD


def make_peer(method: MAE) -> nn.Module:
    """transformers' model with our weights."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    peer = VideoMAEForPreTraining(VideoMAEConfig(**zoo.transformers_config(method.model.architecture)))
    peer.load_state_dict(zoo.to_transformers(method.model))
    return peer


def disturb(model: nn.Module) -> None:
    """Makes biases and norms differ from their initial 0 and 1, so that swapped ones are noticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def check_parity(run: PretrainRun, batch_size: int) -> None:
    torch.manual_seed(0)
    method = build_method(run)
    assert isinstance(method, MAE)
    disturb(method.model)
    peer = make_peer(method)
    batch = draw_batch(run, batch_size)
    kept, masked = method.mask(batch["guides"])
    shape = method.model.architecture
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (batch["video"].float() / 255 - mean) / deviation

    theirs = peer(pixels, to_boolean(kept, shape.slots, shape.slot_tokens).flatten(1))
    loss = method(batch)["loss"]
    logits = method.model(batch["video"], kept, masked)
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-4, atol=0)

    loss.backward()
    theirs.loss.backward()
    check_gradients(method, peer)


def check_gradients(method: MAE, peer: nn.Module) -> None:
    ours = {name: parameter.grad for name, parameter in method.model.named_parameters()}
    # The export's renaming applies to gradients as well; only the biases of the keys, which transformers
    # lacks, drop out.
    holder = VideoMAE(method.model.architecture)
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            gradient = ours[name]
            assert gradient is not None
            parameter.copy_(gradient)
    translated = zoo.to_transformers(holder)
    theirs = {name: parameter.grad for name, parameter in peer.named_parameters()}
    assert translated.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            translated[name],
            gradient,
            rtol=1e-3,
            atol=1e-3 * scale,
            msg=lambda m, n=name: f"{n}: {m}",  # type: ignore[misc]
        )
    qkv = ours["encoder.blocks.0.attn.qkv.bias"]
    width = qkv.numel() // 3
    assert qkv[width : 2 * width].abs().max() < 1e-5 * qkv.abs().max()  # a key's bias moves nothing


def test_forward_loss_and_gradients_equal_transformers() -> None:
    check_parity(make_run(), batch_size=3)


@pytest.mark.parametrize("strategy", ["random", "text_top", "motion"])
def test_parity_holds_for_masks_that_differ_from_slot_to_slot(strategy: str) -> None:
    check_parity(make_run(mask={"strategy": strategy, "ratio": 0.6}), batch_size=2)


@pytest.mark.slow
def test_forward_loss_and_gradients_equal_transformers_at_vit_b() -> None:
    check_parity(PretrainRun(), batch_size=1)


@pytest.mark.parametrize("decode_ratio", [1.0, 0.5])
@pytest.mark.parametrize("strategy", ["tube", "text_top"])
def test_the_training_forward_is_one_graph_whatever_the_batch_carries(strategy: str, decode_ratio: float) -> None:
    torch._dynamo.reset()
    run = make_run(mask={"strategy": strategy, "ratio": 0.75}, decode_ratio=decode_ratio)
    method = build_method(run)
    compiled = torch.compile(method, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for seed in range(3):  # keys, labels and captions differ from batch to batch, and must not compile anew
        batch = draw_batch(run, seed=seed)
        torch.testing.assert_close(compiled(batch)["loss"], method(batch)["loss"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bfloat16_gives_nearly_the_same_loss_and_finite_gradients() -> None:
    run = make_run()
    method = build_method(run)
    batch = draw_batch(run)
    exact = method(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(batch)["loss"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    rough.backward()
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters())


def test_decoding_everything_is_videomae_and_decoding_less_is_the_same_prediction_task() -> None:
    run = make_run()
    whole = build_method(run)
    assert isinstance(whole, MAE)
    half = MAE(whole.model, whole.strategy, 0.75, decode_ratio=0.5)
    batch = draw_batch(run, batch=3)
    _, masked = half.mask(batch["guides"])
    decoded = half.choose_decoded(masked, batch["guides"]["noise"])
    assert decoded.shape == (3, masked.shape[1] // 2)
    assert (decoded.diff(dim=1) > 0).all()
    for row in range(3):
        assert set(decoded[row].tolist()) <= set(masked[row].tolist())
    assert half(batch)["loss"].isfinite()
    whole = MAE(half.model, half.strategy, 0.75)
    assert torch.equal(whole.choose_decoded(masked, batch["guides"]["noise"]), masked)


@pytest.mark.parametrize("strategy", ["random", "tube", "text_top"])
def test_every_masked_token_is_decoded_equally_often(strategy: str) -> None:
    run = make_run(mask={"strategy": strategy, "ratio": 0.75}, decode_ratio=0.25)
    method = build_method(run)
    guides = draw_guides(run, 6000, torch.Generator().manual_seed(0))
    guides["similarity"] = (guides["similarity"] * 3).floor()  # many ties
    _, masked = method.mask(guides)
    decoded = method.choose_decoded(masked, guides["noise"])
    hidden = torch.zeros(6000, 64).scatter(1, masked, 1).sum(dim=0)
    chosen = torch.zeros(6000, 64).scatter(1, decoded, 1).sum(dim=0)
    rate = chosen / hidden
    assert (rate - 0.25).abs().max() < 5 * (0.25 * 0.75 / hidden.min()).sqrt()


def test_the_loss_of_a_step_depends_on_video_and_guides_alone() -> None:
    run = make_run()
    method = build_method(run)
    batch = draw_batch(run)
    bare = {"video": batch["video"], "guides": {"noise": batch["guides"]["noise"]}}
    assert torch.equal(method(bare)["loss"], method(batch)["loss"])


def test_reconstruct_keeps_visible_tokens_and_marks_the_masked_ones() -> None:
    run = make_run()
    method = build_method(run)
    batch = draw_batch(run)
    pictures = method.reconstruct(batch)
    assert pictures["video"].shape == (2, 8, 3, 64, 64) and pictures["video"].dtype == torch.float32
    assert pictures["video"].min() >= 0 and pictures["video"].max() <= 1
    hidden = pictures["masked"]
    assert hidden.shape == (2, 4, 16) and hidden.dtype == torch.bool and (hidden.sum(dim=2) == 12).all()
    pixels = hidden.view(2, 4, 4, 4).repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    same = (pictures["video"] == batch["video"].float() / 255).all(dim=2)
    assert same[~pixels].all()
    assert same[pixels].float().mean() < 0.1


def test_reconstruct_of_perfect_predictions_is_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(decode_ratio=0.5)
    method = build_method(run)
    batch = draw_batch(run)
    perfect = lambda encoded, kept, decoded: reconstruction_targets(batch["video"], decoded, 2, 16)  # noqa: E731
    monkeypatch.setattr(method.model.decoder, "forward", perfect)
    assert method(batch)["loss"] == 0
    torch.testing.assert_close(method.reconstruct(batch)["video"], batch["video"].float() / 255, atol=1e-5, rtol=0)


def test_with_pixels_as_target_predictions_are_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(reconstruction={"target": "pixels"})
    method = build_method(run)
    batch = draw_batch(run)
    perfect = lambda encoded, kept, decoded: reconstruction_targets(batch["video"], decoded, 2, 16, False)  # noqa: E731
    monkeypatch.setattr(method.model.decoder, "forward", perfect)
    assert method(batch)["loss"] == 0
    torch.testing.assert_close(method.reconstruct(batch)["video"], batch["video"].float() / 255, atol=1e-6, rtol=0)
    # A grey guess is off by the deviation of the hidden pixels from grey.
    grey = lambda encoded, kept, decoded: torch.full((*decoded.shape, 2 * 16 * 16 * 3), 0.5)  # noqa: E731
    monkeypatch.setattr(method.model.decoder, "forward", grey)
    hidden = method.reconstruct(batch)["masked"].view(2, 4, 4, 4)
    hidden = hidden.repeat_interleave(2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    error = (batch["video"].double() / 255 - 0.5).square().mean(dim=2)[hidden].mean()
    assert method(batch)["loss"].item() == pytest.approx(error.item(), rel=1e-5)


def test_a_few_steps_on_one_batch_lower_the_loss() -> None:
    torch.manual_seed(0)
    run = make_run()
    method = build_method(run)
    batch = draw_batch(run)
    batch["video"] = batch["video"][:, :1].expand(-1, 8, -1, -1, -1).contiguous()
    optimiser = torch.optim.AdamW(method.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_ratio_that_hides_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"mask\.ratio 0\.05 hides none of a slot's 16 tokens; the minimum is 0\.0625"):
        build_method(make_run(mask={"strategy": "tube", "ratio": 0.05}))


def test_stochastic_depth_of_pretraining_reaches_the_encoder() -> None:
    encoder = zoo.build(make_run(drop_path=0.9)).encoder
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0.9 * number / (len(rates) - 1) for number in range(len(rates))])
