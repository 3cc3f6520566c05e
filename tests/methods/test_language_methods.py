"""UMT, STM and ClusterSTM as whole steps: their losses against the formulas, where gradients go, clips and images in turn."""

import math

import open_clip
import pytest
import torch
from language_runs import TEACHER, make_batch, make_run, make_small_bert
from torch.nn.functional import cosine_similarity, normalize

from stm.masking import get_strategy
from stm.methods import build_method, dataset_needs
from stm.methods.video_language import VideoLanguage
from stm.models.sizes import SIZES
from stm.models.teachers.frame_teacher import FrameTeacher

METHODS = ("umt", "stm", "clusterstm")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return make_small_bert(tmp_path_factory.mktemp("bert"))


def build(method: str, bert: str | None, **changes) -> VideoLanguage:
    torch.manual_seed(0)
    built = build_method(make_run(method, bert, **changes), 96)
    assert isinstance(built, VideoLanguage)
    return built.train()


def batch_for(method: VideoLanguage, **shape) -> dict:
    batch = make_batch(**shape)
    return {**batch, "tokens": method.encode_captions(batch["caption"])} if method.text else batch


def images_of(strategy: str) -> dict:
    return {"images": {"datasets": ["stills"], "batch_size": 4, "mask": {"strategy": strategy, "ratio": 0.5}}}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_the_weighted_sum_and_every_weight_learns(name, bert):
    weights = {"alignment": 2.0, "relevance": 3.0, "contrastive": 0.5, "matching": 0.25, "masked_language": 0.125}
    method = build(name, bert, objectives=weights)
    values = method(batch_for(method))
    expected = sum(weights[key] * value for key, value in values.items() if key in weights)
    torch.testing.assert_close(values["loss"], expected)
    values["loss"].backward()
    still = [name for name, parameter in method.named_parameters() if parameter.grad is None]
    assert still == []


@pytest.mark.parametrize("name", METHODS)
def test_images_take_their_own_mask_and_leave_out_what_compares_frames(name, bert):
    method = build(name, bert, **images_of("attention_hidden"))
    batch = batch_for(method, frames=1)
    kept, masked = method.branch.mask(batch, method.teacher(batch["video"]))
    assert kept.shape == (4, 8) and masked.shape == (4, 8)
    method(batch)["loss"].backward()
    still = {
        name.split(".")[1] for name, p in method.named_parameters() if p.grad is None and name.startswith("branch")
    }
    assert still == ({"predictor", "decoder"} if name == "stm" else set())


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_is_frozen_moves_along_and_is_not_saved(name, bert):
    method = build(name, bert)
    assert not any(key.startswith("teacher") for key in method.state_dict())
    assert not any(p.requires_grad for p in method.teacher.parameters()) and not method.teacher.training
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    method(batch_for(method))["loss"].backward()
    assert all(torch.equal(value, before[key]) for key, value in method.teacher.state_dict().items())
    assert next(method.double().teacher.parameters()).dtype == torch.float64


def test_umt_equals_its_formulas(bert):
    method = build("umt", bert)
    batch = batch_for(method)
    seen = method.teacher(batch["video"])
    kept = get_strategy("attention")({"noise": batch["guides"]["noise"], "attention": seen.attention}, 0.8)
    assert kept.shape == (4, 4 * (16 - int(0.8 * 16)))
    layers = method.model.encoder.forward_layers(batch["video"], kept, 2)
    decoded = method.branch.decoders(layers, kept)
    # Mean over layers, clips and visible tokens of 2 - 2 cos.
    terms = [
        2 - 2 * cosine_similarity(decoded[layer, clip, place], seen.features[layer, clip, kept[clip, place]], dim=0)
        for layer in range(2)
        for clip in range(4)
        for place in range(kept.shape[1])
    ]
    torch.testing.assert_close(method(batch)["alignment"], torch.stack(terms).mean())


def test_umt_s_decoders_have_the_epsilon_of_their_stage(bert):
    """The first stage passes 1e-6 (modeling_pretrain_umt.py), the second keeps torch's 1e-5 (multi_modality's vit.py)."""
    for text, eps in ((None, 1e-6), (bert, 1e-5)):
        assert {norm.eps for norm in build("umt", text).branch.decoders.norms} == {eps}
    aligned = build("clusterstm", bert, objectives={"alignment": 1.0})
    assert {norm.eps for norm in aligned.branch.alignment.norms} == {1e-5}  # "as UMT"
    assert {layer.norm.eps for layer in build("stm", bert).branch.decoder.layers} == {1e-5}


@pytest.mark.parametrize("name", METHODS)
def test_stochastic_depth_of_pretraining_rises_linearly_to_its_rate(name, bert):
    method = build(name, bert, drop_path=0.9)
    depth = len(method.student.blocks)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in method.student.blocks]
    assert rates == pytest.approx([0.9 * block / (depth - 1) for block in range(depth)])
    video = make_batch()["video"]
    assert not torch.equal(method.student(video), method.student(video))
    method.eval()
    assert torch.equal(method.student(video), method.student(video))
    plain = build(name, bert)
    assert torch.equal(plain.student(video), plain.student(video))  # off by default


def test_umt_s_first_stage_needs_no_text():
    method = build("umt", None)
    values = method(make_batch())
    assert set(values) == {"loss", "alignment"}
    torch.testing.assert_close(values["loss"], values["alignment"])
    assert dataset_needs(make_run("umt", None)).text is False


def test_clusterstm_equals_its_formulas(bert):
    settings = {"window": 3, "scaling": "cosine"}
    method = build("clusterstm", bert, mask={"strategy": "cluster", "ratio": 0.75}, cluster=settings)
    batch = batch_for(method)
    seen = method.teacher(batch["video"])
    kept, masked = method.branch.mask(batch, seen)
    assert kept.shape == (4, 4 * 4)
    pooled = method.teacher.pool_windows(seen, 3).flatten(1, 2)
    decoded = method.branch.decoder(method.model.encoder(batch["video"], kept), kept, masked)
    terms = [
        (
            cosine_similarity(decoded[clip, place], batch["text"][clip], dim=0)
            - cosine_similarity(pooled[clip, masked[clip, place]], batch["text"][clip], dim=0)
        )
        ** 2
        for clip in range(4)
        for place in range(masked.shape[1])
    ]
    torch.testing.assert_close(method(batch)["relevance"], torch.stack(terms).mean())
    assert dataset_needs(make_run("clusterstm", bert)).text is True


@pytest.mark.parametrize("texts", ["paired", "batch"])
@pytest.mark.parametrize("scaling", ["logit_scale", "frame", "texts"])
def test_clusterstm_scales_target_and_prediction_alike(scaling, texts, bert):
    method = build("clusterstm", bert, cluster={"scaling": scaling, "texts": texts})
    batch = batch_for(method)
    seen = method.teacher(batch["video"])
    kept, masked = method.branch.mask(batch, seen)
    decoded = method.branch.decoder(method.model.encoder(batch["video"], kept), kept, masked)
    pooled = method.teacher.pool_windows(seen, 3).flatten(1, 2)
    logits = open_clip.create_model(TEACHER["model"]).logit_scale.exp()

    def scaled(tokens):  # [4, M, C] -> [4, M, 4]
        cosines = cosine_similarity(tokens[:, :, None], batch["text"][None, None], dim=-1)
        if scaling == "logit_scale":
            return logits * cosines
        if scaling == "texts":
            return (cosines - cosines.mean(2, True)) / (cosines.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        frames = cosines.unflatten(1, (4, -1))  # as many hidden tokens in each of 4 frames
        deviation = (frames.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        return ((frames - frames.mean(2, True)) / deviation).flatten(1, 2)

    index = masked[..., None].expand(-1, -1, pooled.shape[-1])
    difference = (scaled(decoded) - scaled(pooled.gather(1, index))).square()
    expected = difference.mean() if texts == "batch" else difference[torch.arange(4), :, torch.arange(4)].mean()
    torch.testing.assert_close(method(batch)["relevance"], expected, atol=1e-4, rtol=1e-4)


def test_clusterstm_aligns_the_visible_tokens_as_umt_does_where_asked(bert):
    plain = build("clusterstm", bert)
    assert plain.branch.alignment is None and "alignment" not in plain(batch_for(plain))
    method = build("clusterstm", bert, objectives={"alignment": 0.5})
    batch = batch_for(method)
    seen = method.teacher(batch["video"])
    kept, _ = method.branch.mask(batch, seen)
    decoded = method.branch.alignment(method.model.encoder.forward_layers(batch["video"], kept, 2), kept)
    terms = [
        2 - 2 * cosine_similarity(decoded[layer, clip], seen.features[layer, clip, kept[clip]], dim=-1)
        for layer in range(2)
        for clip in range(4)
    ]
    values = method(batch)
    torch.testing.assert_close(values["alignment"], torch.stack(terms).mean())
    assert values["relevance"] > 0
    alone = build("clusterstm", bert, objectives={"alignment": 1.0, "relevance": 0.0})
    assert alone.branch.decoder is None and "relevance" not in alone(batch_for(alone))


def test_clusterstm_logs_the_deviation_of_its_target_over_tokens(bert):
    method = build("clusterstm", bert, cluster={"scaling": "cosine"})
    batch = batch_for(method)
    seen = method.teacher(batch["video"])
    _, masked = method.branch.mask(batch, seen)
    pooled = method.teacher.pool_windows(seen, 3).flatten(1, 2)
    cosines = cosine_similarity(pooled, batch["text"][:, None], dim=-1).gather(1, masked)
    torch.testing.assert_close(method(batch)["relevance_deviation"], cosines.std(dim=1, correction=0).mean())


def test_clusterstm_refuses_a_logit_scale_that_its_teacher_does_not_have(bert, monkeypatch):
    load = FrameTeacher.load

    def without(settings, side):
        teacher = load(settings, side)
        teacher.logit_scale = None
        return teacher

    monkeypatch.setattr(FrameTeacher, "load", without)
    with pytest.raises(ValueError, match=r"cluster\.scaling `logit_scale`: the teacher has no logit scale"):
        build("clusterstm", bert, cluster={"scaling": "logit_scale"})


def test_stm_predicts_all_tokens_and_its_text_meets_the_hidden_ones(bert):
    method = build("stm", bert)
    batch = batch_for(method)
    seen = method.teacher(batch["video"])
    kept, hidden = method.branch.mask(batch, seen)
    assert hidden.shape == (4, 4 * int(0.7 * 16))
    text = method.read(batch["tokens"])
    output = method.branch(method.model.encoder, batch, seen, text)
    torch.testing.assert_close(output.tokens, method.model.encoder(batch["video"], hidden))
    predicted = method.branch.decoder(
        method.model.encoder.forward_layers(batch["video"], kept, 2), kept, text.states[:, 0], 4
    )
    cosine = (normalize(predicted, dim=-1) * normalize(seen.features, dim=-1)).sum(-1)
    torch.testing.assert_close(output.losses["alignment"], (2 - 2 * cosine).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["tube", "attention_hidden"])
def test_stm_s_decoder_compares_frames_under_any_mask_where_asked(strategy, bert):
    """Otherwise it is a linear head under other masks, which sees no text: as in the release."""
    losses = {}
    for compares in ("learned_mask", "always"):
        settings = {"compares": compares, "decoder": "as_released"}  # which does not start as a linear head
        method = build("stm", bert, mask={"strategy": strategy, "ratio": 0.7}, spatio_temporal=settings)
        batch = batch_for(method)
        seen = method.teacher(batch["video"])
        kept, _ = method.branch.mask(batch, seen)
        text = method.read(batch["tokens"])
        layers = method.model.encoder.forward_layers(batch["video"], kept, 2)
        sentence = text.states[:, 0] if compares == "always" else None
        predicted = method.branch.decoder(layers, kept, sentence, 4)
        cosine = (normalize(predicted, dim=-1) * normalize(seen.features, dim=-1)).sum(-1)
        losses[compares] = method.branch(method.model.encoder, batch, seen, text).losses["alignment"]
        torch.testing.assert_close(losses[compares], (2 - 2 * cosine).mean(), atol=1e-5, rtol=1e-5)
    assert abs(losses["always"] - losses["learned_mask"]) > 1e-3


@pytest.mark.parametrize("name", ["umt", "stm"])
def test_decoders_have_the_positions_of_the_run(name, bert):
    """Entry by entry: a third of the width, rounded down to an even number, each for row and column, the rest for time."""
    branch = build(name, bert, positions="separable", position_period=50).branch
    (table,) = {id(b): b[0] for n, b in branch.named_buffers() if n.endswith("positions")}.values()
    width = table.shape[1]
    space = width // 3 // 2 * 2
    expected = []
    for token in range(4 * 16):
        places = ((token // 16, width - 2 * space), (token % 16 // 4, space), (token % 4, space))
        expected.append(
            [
                (math.cos if j % 2 else math.sin)(place / 50 ** (2 * (j // 2) / entries))
                for place, entries in places
                for j in range(entries)
            ]
        )
    torch.testing.assert_close(table, torch.tensor(expected))


@pytest.mark.parametrize(("text", "tokens"), [("invisible", 44), ("visible", 20), ("all", 64)])
def test_which_tokens_the_text_meets_is_a_choice(text, tokens, bert):
    method = build("stm", bert, spatio_temporal={"text": text})
    batch = batch_for(method)
    output = method.branch(method.model.encoder, batch, method.teacher(batch["video"]), method.read(batch["tokens"]))
    assert output.tokens.shape[1] == tokens


@pytest.mark.slow
def test_only_the_log_probability_form_moves_the_mask_away_from_uniform(bert):
    """The released form starts uniform and stays so; the other starts away from it, and training moves it further."""
    found = {}
    for sampling in ("as_released", "log_probability"):
        method = build("stm", bert, spatio_temporal={"sampling": sampling})
        batch = batch_for(method)
        optimizer = torch.optim.AdamW(
            [
                {"params": [method.branch.predictor.mix], "lr": 5e-2},
                {"params": [p for n, p in method.named_parameters() if n != "branch.predictor.mix"], "lr": 1e-3},
            ]
        )
        divergence = []
        for _ in range(30):
            values = method(batch)
            optimizer.zero_grad()
            values["loss"].backward()
            optimizer.step()
            divergence.append(values["divergence"].item())
        found[sampling] = divergence
        assert method.branch.predictor.mix.item() != 0.5
    assert max(found["as_released"]) < 1e-2 * min(found["log_probability"])
    assert abs(found["log_probability"][-1] - found["log_probability"][0]) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast_gives_about_the_same_losses(name, bert):
    method = build(name, bert).eval()
    batch = batch_for(method)
    torch.manual_seed(1)
    exact = method(batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(batch)
    assert all(value.dtype == torch.float32 for value in rough.values())
    for key in ("alignment", "relevance", "contrastive"):
        if key in exact:
            assert abs(rough[key] - exact[key]) < 0.1 + 0.1 * abs(exact[key])


def test_clusterstm_refuses_vectors_of_another_model_than_its_teacher(bert):
    method = build("clusterstm", bert)
    teacher = method.teacher.identity
    method.accept_text_model({"model": "another name of it", "weights_sha256": teacher["weights_sha256"]})
    method.accept_text_model(None)  # shards that do not say
    with pytest.raises(
        ValueError, match=r"made by other, and the teacher is .*demo-clip.*Set text\.model to the teacher"
    ):
        method.accept_text_model({"model": "other", "weights_sha256": "2"})
    method.teacher.identity = None  # a teacher made by hand
    method.accept_text_model({"model": "other", "weights_sha256": "2"})
    build("umt", bert).accept_text_model({"model": "other", "weights_sha256": "2"})  # compares nothing with them


def test_clusterstm_refuses_vectors_of_another_width(bert):
    with pytest.raises(ValueError, match="own text tower"):
        build_method(make_run("clusterstm", bert), 512)


@pytest.mark.parametrize("name", METHODS)
def test_a_student_with_fewer_blocks_than_layers_to_align_is_refused_with_both_numbers(name, monkeypatch, bert):
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"]._replace(depth=1))
    if name == "clusterstm":  # aligns nothing unless asked to
        build(name, bert)
    with pytest.raises(ValueError, match=r"teacher\.layers 2 is more than the 1 blocks of the student .* set it to 1"):
        build(name, bert, objectives={"alignment": 1.0})
