"""What joins the parts of a step with text: which tokens meet the text, which pairs are positives, whose settings count."""

import math
from typing import Any

import pytest
import torch
from language_runs import make_batch, make_run, make_small_bert
from torch.nn.functional import normalize

from stm.config import Cluster
from stm.masking import get_strategy
from stm.masking.cluster import keep_clusters
from stm.methods import build_method
from stm.methods.video_language import VideoLanguage
from stm.models.feature_decoders import TokenDecoder
from stm.models.video_language import EXTRA
from stm.training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_small_bert(tmp_path_factory.mktemp("bert"))


def build(name: str, bert: str | None, **changes: Any) -> VideoLanguage:
    torch.manual_seed(0)
    method = build_method(make_run(name, bert, **changes), 96)
    assert isinstance(method, VideoLanguage)
    return method.eval()  # without dropout


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("umt", "alignment"),
        ("umt", None),
        ("clusterstm", "alignment"),
        ("clusterstm", "relevance"),
        ("clusterstm", None),
    ],
)
def test_the_text_meets_the_visible_tokens_as_the_student_encodes_them_alone(
    name: str, objective: str | None, bert: str
) -> None:
    method = build(name, bert, objectives={"alignment": 0, "relevance": 0} | ({objective: 1} if objective else {}))
    batch: dict[str, Any] = method.prepare(make_batch())
    seen = method.teacher(batch["video"])
    kept, masked = method.branch.mask(batch, seen)
    assert torch.cat([kept, masked], dim=1).sort(dim=1).values.tolist() == [list(range(64))] * 4
    output = method.branch(method.model.encoder, batch, seen, method.read(batch["tokens"]))
    torch.testing.assert_close(output.tokens, method.model.encoder(batch["video"], kept), rtol=1e-4, atol=1e-5)
    assert set(output.losses) == ({objective} if objective else set())


@pytest.mark.parametrize("shared", [False, True])
def test_the_contrast_of_a_step_is_that_of_pooled_visible_tokens_with_their_captions(shared: bool, bert: str) -> None:
    """The clip of the first two rows is the same, and the captions of the last two: positives, if texts are shared."""
    method = build("umt", bert, objectives={"matching": 0, "masked_language": 0, "shared_texts": shared})
    model: Any = method.model
    raw = make_batch()
    raw["clip"] = torch.tensor([7, 7, 3, 5])
    raw["caption"] = ["a red star moves", "left over the wood", "blue circle", "blue circle"]
    batch: dict[str, Any] = method.prepare(raw)
    with torch.no_grad():
        model.temperature.fill_(0.3)
        found = method(batch)["contrastive"].item()
        kept, _ = method.branch.mask(batch, method.teacher(batch["video"]))
        pooled = torch.nn.functional.layer_norm(model.encoder(batch["video"], kept).mean(1), (128,), eps=1e-6)
        video = normalize(pooled @ model.video_projection.weight.T + model.video_projection.bias, dim=1)
        states = torch.stack([model.encode_text(row[None])[0, 0] for row in batch["tokens"]])
        text = normalize(states @ model.text_projection.weight.T + model.text_projection.bias, dim=1)
    positives = [{0, 1}, {0, 1}, {2, 3} if shared else {2}, {2, 3} if shared else {3}]
    total = 0.0
    for cosines in (video @ text.T, text @ video.T):
        for row, right in enumerate(positives):
            powers = [math.exp(value / 0.3) for value in cosines[row].tolist()]
            total -= sum(math.log(powers[column] / sum(powers)) for column in right) / len(right) / 4
    assert found == pytest.approx(total / 2, rel=1e-4)


def test_hidden_words_come_at_the_run_s_share_and_from_its_lengths(bert: str) -> None:
    method = build("umt", bert, objectives={"mask_probability": 0.9}, language={**language_of(bert), "max_tokens": 6})
    tokens = method.prepare({**make_batch(), "caption": ["a red star moves left over the wood"] * 4})["tokens"]
    assert tokens.shape == (4, 6) and (tokens != method.model.language.pad_id).all()
    assert method.objectives.mask_probability == 0.9


def language_of(bert: str) -> dict[str, Any]:
    return {"model": bert, "fusion_layer": 2, "max_tokens": 8, "embedding": 32, "temperature": 0.2}


def test_language_settings_of_the_run_arrive_in_the_model(bert: str) -> None:
    model: Any = build("umt", bert, language={**language_of(bert), "fusion_layer": 1, "embedding": 24}).model
    assert (model.language.fusion_layer, len(model.language.fusion_layers)) == (1, 2)
    assert (model.video_projection.out_features, model.text_projection.out_features) == (24, 24)
    assert model.temperature.item() == pytest.approx(0.2)


def test_the_mix_of_stm_s_scores_learns_at_its_own_rate_and_nothing_else_does(bert: str) -> None:
    method = build("stm", bert, spatio_temporal={"mix_learning_rate": 40.0})
    run = make_run("stm", bert)
    scales: dict[str, float] = {}
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    for group in build_optimizer(method, run.optimisation).param_groups:
        scales |= {names[id(parameter)]: group["lr_scale"] for parameter in group["params"]}
    assert {name: scale for name, scale in scales.items() if scale != 1} == {"branch.predictor.mix": 40.0}


def test_clusters_are_those_of_the_run_s_settings(bert: str) -> None:
    settings = Cluster(density="knn", neighbours=2, cutoff=0.05)
    mask = {"strategy": "cluster", "ratio": 0.75}
    method = build("clusterstm", bert, mask=mask, cluster=settings.model_dump())
    batch: dict[str, Any] = method.prepare(make_batch())
    seen = method.teacher(batch["video"])
    kept, _ = method.branch.mask(batch, seen)
    features, noise = normalize(seen.tokens, dim=-1), batch["guides"]["noise"]
    assert torch.equal(kept, keep_clusters(features, noise, 0.75, settings))
    assert not torch.equal(kept, get_strategy("cluster")({"features": features, "noise": noise}, 0.75))


@pytest.mark.parametrize("name", ["umt", "stm", "clusterstm"])
def test_clips_and_images_have_their_own_masks(name: str, bert: str) -> None:
    images = {"datasets": ["stills"], "batch_size": 4, "mask": {"strategy": "attention_hidden", "ratio": 0.25}}
    method = build(name, bert, mask={"strategy": "attention", "ratio": 0.75}, images=images)
    for frames, strategy, ratio in ((4, "attention", 0.75), (1, "attention_hidden", 0.25)):
        batch: dict[str, Any] = method.prepare(make_batch(frames=frames))
        seen = method.teacher(batch["video"])
        guides = {"noise": batch["guides"]["noise"], "attention": seen.attention}
        assert torch.equal(method.branch.mask(batch, seen)[0], get_strategy(strategy)(guides, ratio))


@pytest.mark.parametrize("name", ["umt", "stm", "clusterstm"])
def test_all_weights_that_train_are_saved(name: str, bert: str) -> None:
    """In the encoder's file or one of the parts, under names that lead back to them."""
    method = build(name, bert)
    parts = method.parts()
    saved = {f"model.encoder.{key}" for key in method.student.state_dict()}
    saved |= {f"branch.{key}" for key in parts["branch"].state}
    saved |= {f"model.{key}" for key in parts[EXTRA].state}
    assert {key for key, _ in method.named_parameters()} <= saved


def test_relevance_is_predicted_from_the_last_block_also_where_more_blocks_are_aligned(bert: str) -> None:
    found = []
    for alignment in (0, 1):
        method = build("clusterstm", bert, objectives={"alignment": alignment})
        found.append(method(method.prepare(make_batch()))["relevance"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-5) and method.branch.layers > 1


def test_pooling_and_depth_of_relevance_are_the_run_s(bert: str) -> None:
    targets = {}
    for pooling, window in (("head", 3), ("mean", 3), ("mean", 1), ("head", 1)):
        settings = {"pooling": pooling, "window": window, "decoder_depth": 3}
        method = build("clusterstm", bert, cluster=settings)
        assert isinstance(method.branch.decoder, TokenDecoder) and len(method.branch.decoder.blocks) == 3
        seen = method.teacher(make_batch()["video"])
        pool = method.teacher.pool_windows if pooling == "head" else method.teacher.pool_means
        targets[pooling, window] = method.branch.pool(seen)
        assert torch.equal(targets[pooling, window], pool(seen, window).flatten(1, 2))
    kept = list(targets.values())
    assert not any(torch.allclose(one, other) for n, one in enumerate(kept) for other in kept[:n])
