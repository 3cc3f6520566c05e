"""The contrast in a training step: what it trains, what it leaves alone, what it is at the end."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_batches import draw_batch, make_run
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import normalize

from stm.config import Contrast, PretrainRun
from stm.masking import get_strategy
from stm.methods import build_method, dataset_needs, load_method
from stm.methods.contrast_head import EXTRA, ContrastHead, load_contrast_head, load_embedder
from stm.methods.mae import MAE
from stm.models.weights import zoo
from stm.objectives.contrast import match_pairs

TEXT = 9


def make_method(contrast: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> MAE:
    run = make_run(contrast=None if contrast is None else {"hidden": 16, **contrast}, **changes)
    torch.manual_seed(seed)
    method = build_method(run, TEXT)
    assert isinstance(method, MAE)
    return method


def draw_captioned(run: PretrainRun | None = None, batch: int = 4, silent: tuple[int, ...] = ()) -> dict[str, Any]:
    found = draw_batch(run or make_run(), batch)
    generator = torch.Generator().manual_seed(8)
    text = normalize(torch.randn(batch, TEXT, generator=generator), dim=1)
    index = torch.zeros(batch, dtype=torch.int64)
    for row in silent:
        text[row], index[row] = 0, -1
    return {**found, "text": text, "caption_index": index}


def train(method: MAE, steps: int = 3, clip: float | None = None) -> None:
    """As the loop does, in short."""
    from stm.training.loop import clip_gradient
    from stm.training.optimizer import group_parameters

    optimiser = torch.optim.AdamW(group_parameters(method, 0.05), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        method(draw_captioned())["loss"].backward()
        clip_gradient(method, clip)
        optimiser.step()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_loss_is_the_weighted_sum_and_its_parts_are_told() -> None:
    method = make_method({"weight": 0.25}, reconstruction={"weight": 2.0})
    batch = draw_captioned()
    values = method(batch)
    assert values.keys() == {"loss", "reconstruction", "contrast", "accuracy"}
    expected = 2 * values["reconstruction"] + 0.25 * values["contrast"]
    torch.testing.assert_close(values["loss"], expected)
    assert torch.equal(values["reconstruction"], make_method()(batch)["reconstruction"])
    kept, _ = method.mask(batch["guides"])
    pooled = method.model.encoder(batch["video"], kept).mean(dim=1)
    video = normalize(method.contrast.head(pooled), dim=1)
    torch.testing.assert_close(values["contrast"], match_pairs(video, batch["text"], 0.07).loss)


def test_with_weight_the_encoder_learns_from_the_contrast() -> None:
    plain, both = make_method(), make_method({})
    for method in (plain, both):
        method(draw_captioned())["loss"].backward()
    names = dict(plain.model.named_parameters())
    differ = {n for n, p in both.model.named_parameters() if not torch.equal(p.grad, names[n].grad)}  # type: ignore[arg-type]
    assert any(n.startswith("encoder.") for n in differ) and not any(n.startswith("decoder.") for n in differ)


def test_the_head_changes_neither_initial_weights_nor_what_is_drawn_in_training() -> None:
    plain, observed = make_method(), make_method({"weight": 0, "learnable": True})
    assert same(plain.model, observed.model)
    state = torch.get_rng_state()
    observed(draw_captioned())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_observed_run_is_a_run_without_contrast_to_the_bit(clip: float | None) -> None:
    plain, observed = make_method(), make_method({"weight": 0, "learnable": True})
    before = [p.clone() for p in observed.contrast.parameters()]
    batch = draw_captioned()
    assert torch.equal(plain(batch)["loss"], observed(batch)["loss"])
    for method in (plain, observed):
        train(method, clip=clip)
    assert same(plain.model, observed.model)
    assert all(not torch.equal(a, b) for a, b in zip(before, observed.contrast.parameters(), strict=True))


def test_an_observing_head_learns_to_read_a_frozen_encoder() -> None:
    method = make_method({"weight": 0, "temperature": 0.1})
    first = method(draw_captioned())["contrast"].item()
    method.model.requires_grad_(False)
    train(method, steps=30)
    assert method(draw_captioned())["contrast"].item() < 0.5 * first


def test_contrast_alone_runs_no_decoder_and_trains_none() -> None:
    method = make_method({}, reconstruction={"weight": 0})
    calls = []
    method.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    values = method(draw_captioned())
    values["loss"].backward()
    assert not calls and values.keys() == {"loss", "contrast", "accuracy"}
    assert all(p.grad is None and not p.requires_grad for p in method.model.decoder.parameters())
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_control_of_an_observed_run_trains_the_same_head_on_a_random_encoder(clip: float | None) -> None:
    observed, control = make_method({"weight": 0}), make_method({"weight": 0}, reconstruction={"weight": 0})
    assert same(observed, control)
    calls = []
    control.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    batch = draw_captioned()
    first = control(batch)
    # The two start alike; what differs later is the encoder alone.
    assert torch.equal(first["contrast"], observed(batch)["contrast"])
    assert first.keys() == {"loss", "contrast", "accuracy"} and first["loss"] == 0
    train(control, steps=30, clip=clip)
    assert not calls
    untouched = make_method({"weight": 0}, reconstruction={"weight": 0})
    assert same(control.model, untouched.model)
    assert control.contrast is not None and untouched.contrast is not None
    assert not same(control.contrast, untouched.contrast)
    # The loss falls although the encoder has learned nothing.
    assert control(batch)["contrast"] < first["contrast"]
    assert not any(p.requires_grad for p in control.model.parameters())
    assert control.observers() == [] and len(observed.observers()) == len(list(observed.contrast.parameters()))


def test_a_run_without_any_objective_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"reconstruction.weight is 0 and there is no `contrast`"):
        make_run(reconstruction={"weight": 0})
    assert not make_run(reconstruction={"weight": 0}, contrast={"weight": 0}).trains_encoder
    assert make_run(reconstruction={"weight": 0}, contrast={}).trains_encoder and make_run().trains_encoder
    assert not make_run(optimisation={"epochs": 0, "warmup_epochs": 0}).trains_encoder


def test_clips_without_a_caption_take_no_part_but_are_reconstructed() -> None:
    method = make_method({})
    batch = draw_captioned(silent=(1, 3))
    values = method(batch)
    kept, _ = method.mask(batch["guides"])
    video = method.contrast.embed(method.model.encoder(batch["video"], kept))
    torch.testing.assert_close(values["contrast"], match_pairs(video[[0, 2]], batch["text"][[0, 2]], 0.07).loss)
    silent = method(draw_captioned(silent=(0, 1, 2, 3)))
    assert silent["contrast"] == 0 and torch.equal(silent["loss"], silent["reconstruction"])


def test_a_learned_temperature_falls_to_a_hundredth_and_rises_again() -> None:
    method = make_method({"learnable": True, "temperature": 0.0101}, reconstruction={"weight": 0})
    branch: Any = method.contrast
    assert branch.temperature.item() == pytest.approx(0.0101)
    optimiser = torch.optim.SGD([branch.log_temperature], lr=1.0)
    for direction, expected in ((1.0, 0.01), (-1.0, 0.01 * math.exp(0.1))):
        values = method(draw_captioned())
        assert values["temperature"].item() >= 0.00999999
        optimiser.zero_grad()
        (values["loss"] * 0).backward()
        branch.log_temperature.grad.fill_(0.1 * direction)
        optimiser.step()
        assert branch.temperature.item() == pytest.approx(expected, rel=0.02)
    with torch.no_grad():
        branch.log_temperature.fill_(-9.0)
    method(draw_captioned())["loss"].backward()
    assert branch.log_temperature.grad is not None and branch.log_temperature.grad != 0
    # Not on the clamp's edge, where a device that rounds `exp` down would have no gradient.
    assert branch.log_temperature.exp().item() > 0.01


@pytest.mark.parametrize(("weight", "reconstruction"), [(0.5, 1.0), (0.0, 1.0), (0.5, 0.0)])
def test_the_forward_with_contrast_is_one_graph(weight: float, reconstruction: float) -> None:
    torch._dynamo.reset()
    method = make_method({"weight": weight, "learnable": True}, reconstruction={"weight": reconstruction})
    compiled = torch.compile(method, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for silent in ((), (1,), (0, 1, 2, 3)):
        batch = draw_captioned(silent=silent)
        batch["caption"] = [f"words {row} of {silent}" for row in range(4)]
        for name, value in method(batch).items():
            torch.testing.assert_close(compiled(batch)[name], value, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bfloat16_gives_nearly_the_same_contrast() -> None:
    method = make_method({"temperature": 0.5})
    exact = method(draw_captioned())["contrast"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(draw_captioned())["contrast"]
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.05)


def test_norms_and_temperature_are_not_decayed() -> None:
    from stm.training.optimizer import group_parameters

    method = make_method({"learnable": True})
    groups: list[dict[str, Any]] = group_parameters(method, 0.05)
    decayed = {id(p) for group in groups for p in group["params"] if group["weight_decay"] > 0}
    names = {n for n, p in method.contrast.named_parameters() if id(p) in decayed}
    assert names == {"head.0.weight", "head.3.weight"}


def test_what_is_saved_embeds_clips_as_the_method_does(tmp_path: Path) -> None:
    run = make_run(contrast={"hidden": 16, "learnable": True})
    torch.manual_seed(0)
    method = build_method(run, TEXT)
    assert isinstance(method, MAE)
    train(method)
    path = tmp_path / "weights.safetensors"
    branch = method.contrast
    zoo.save(method.model, path, extra={EXTRA: branch.state_dict()}, header={EXTRA: branch.describe()})
    method.eval()
    batch = draw_captioned()
    expected = method.embed_video(batch["video"])
    assert expected.shape == (4, TEXT) and expected.dtype == torch.float32
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(4))
    assert torch.equal(load_embedder(path)(batch["video"]), expected)
    loaded = load_method(run, path)
    assert isinstance(loaded, MAE) and torch.equal(loaded.embed_video(batch["video"]), expected)
    assert load_contrast_head(path).temperature == branch.temperature
    kept, _ = method.mask(batch["guides"])
    assert not torch.equal(method.embed_video(batch["video"], kept), expected)
    # In evaluation a clip's vector does not depend on the others of its batch.
    torch.testing.assert_close(method.embed_video(batch["video"][:1]), expected[:1], rtol=1e-4, atol=1e-6)


def test_a_run_without_contrast_has_no_vectors(tmp_path: Path) -> None:
    method = make_method()
    assert method(draw_captioned()).keys() == {"loss", "reconstruction"}
    with pytest.raises(ValueError, match=r"no contrastive head .*cannot embed clips"):
        method.embed_video(draw_captioned()["video"])
    zoo.save(method.model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no 'contrast'"):
        load_embedder(tmp_path / "a.safetensors")
    loaded = load_method(make_run(), tmp_path / "a.safetensors")
    assert isinstance(loaded, MAE) and same(loaded.model, method.model)
    with pytest.raises(ValueError, match="needs the width of the captions' vectors"):
        build_method(make_run(contrast={}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": None}, "does not describe a valid 'contrast'"),
        ({"settings": {"hidden": 16, "unknown": 1}}, "does not describe a valid 'contrast'"),
        ({"text_width": TEXT + 1}, r"head\.3\.weight \(9x16 instead of 10x16\)"),
        ({"width": 2**45}, r"head\.0\.weight"),  # no memory is taken for it
        ({"settings": {"hidden": 16, "learnable": True}}, "1 missing: log_temperature"),
    ],
)
def test_a_header_that_does_not_fit_its_weights_is_an_error_of_one_kind(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    method = make_method({})
    about = {**method.contrast.describe(), **change}
    path = tmp_path / "weights.safetensors"
    zoo.save(method.model, path, extra={EXTRA: method.contrast.state_dict()}, header={EXTRA: about})
    with pytest.raises(zoo.WeightsError, match=message):
        load_contrast_head(path)


def test_text_of_another_width_is_an_error() -> None:
    branch = ContrastHead(16, 4, Contrast(hidden=8))
    with pytest.raises(ValueError, match=r"video \(2, 4\) and text \(2, 9\)"):
        branch(torch.randn(2, 3, 16), torch.randn(2, 9), torch.ones(2, dtype=torch.bool))


class Teacher(nn.Module):
    """Brighter patches get more attention; has a weight, as a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def attend(self, video: Tensor, tubelet: int) -> Tensor:
        means = video.float().mean(dim=2).unflatten(1, (-1, tubelet)).mean(dim=2)
        return self.gain * means.unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).mean(dim=(3, 5)).flatten(2)


def test_a_teacher_guides_the_mask_and_is_no_part_of_the_method() -> None:
    model = zoo.build(make_run())
    teacher: Any = Teacher()  # it has what the method uses of a FrameTeacher
    method = MAE(model, get_strategy("motion"), 0.75, teacher=teacher)
    assert not any("teacher" in name or "gain" in name for name in method.state_dict())
    assert all(p is not teacher.gain for p in method.parameters())
    batch = draw_batch(make_run())
    guides = method.guide(batch)
    assert torch.equal(guides["attention"], teacher.attend(batch["video"], 2)) and not guides["attention"].requires_grad
    assert "attention" not in batch["guides"]
    assert method.double().teacher.gain.dtype == torch.float64  # moves along
    method.float()(batch)["loss"].backward()
    assert teacher.gain.grad is None


def test_a_data_set_must_hold_what_the_strategy_needs_but_not_what_a_teacher_makes() -> None:
    assert dataset_needs(make_run(mask={"strategy": "text_top"})) == (("similarity",), False)
    assert dataset_needs(make_run(contrast={"weight": 0})) == ((), True)
    assert dataset_needs(make_run(mask={"strategy": "attention"}, teacher={"model": "ViT-B-16"})) == ((), False)
    with pytest.raises(ValueError, match=r"mask\.strategy 'attention' needs a teacher"):
        build_method(make_run(mask={"strategy": "attention"}))
