"""What captions add to a step: which pairs are compared, which words are hidden, and the temperature's bounds."""

from typing import Any

import pytest
import torch
from language_runs import make_batch, make_run, make_small_bert
from torch import Tensor
from torch.nn.functional import cross_entropy

from stm.evaluation.tuning import PairTuning, encode_pairs
from stm.methods import build_method
from stm.methods.video_language import VideoLanguage, compare_pairs
from stm.objectives.masked_language import mask_words
from stm.objectives.matching import sample_negatives

IGNORED = -100
WRONG_TEXT = torch.tensor([2, 3, 1, 0])  # of each clip
WRONG_VIDEO = torch.tensor([2, 0, 1, 2])  # of each caption
# [PAD] 0, [CLS] 2 and [SEP] 3 of the small BERT; captions of different lengths.
LENGTHS = [5, 3, 4, 1]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_small_bert(tmp_path_factory.mktemp("bert"))


def build(bert: str, **objectives: Any) -> VideoLanguage:
    torch.manual_seed(0)
    weights = {"alignment": 0.0, "contrastive": 0.0, "matching": 0.0, "masked_language": 0.0, **objectives}
    method = build_method(make_run("umt", bert, objectives=weights), 96)
    assert isinstance(method, VideoLanguage)
    return method.train()


def draw(method: VideoLanguage) -> tuple[Tensor, Tensor]:
    """Captions int64 [4, 8], and the student's features that they meet, [4, 6, W]."""
    words = [caption.split()[:length] for caption, length in zip(make_batch()["caption"], LENGTHS, strict=True)]
    # Each clip's tokens lie around a point of their own, far off: a fresh BERT hardly tells near ones apart.
    generator, width = torch.Generator().manual_seed(1), method.student.architecture.width
    features = 50 * torch.randn(4, 1, width, generator=generator) + torch.randn(4, 6, width, generator=generator)
    return method.encode_captions([" ".join(caption) for caption in words]), features


@pytest.mark.parametrize("hard", [True, False])
def test_negatives_of_matching_are_hard_ones_or_all_equally_often(
    bert: str, monkeypatch: pytest.MonkeyPatch, hard: bool
) -> None:
    method = build(bert, matching=1.0, hard_negatives=hard).eval()
    model: Any = method.model
    drawn: list[Tensor] = []

    def remember(*arguments: Any) -> Tensor:
        drawn.append(sample_negatives(*arguments))
        return drawn[-1]

    monkeypatch.setattr("stm.methods.video_language.sample_negatives", remember)
    tokens, features = draw(method)
    # Of caption 0's wrong clips, 3 is by far the most similar one.
    video = -model.embed_text(method.read(tokens).states).detach()
    video[3] = -video[0]
    for _ in range(100):
        compare_pairs(model, video, features, method.read(tokens), torch.arange(4), method.objectives)
    of_caption_0 = torch.stack(drawn[1::2])[:, 0].bincount(minlength=4).tolist()  # wrong clips follow wrong texts
    assert of_caption_0[0] == 0
    if hard:
        assert of_caption_0[3] > 95
    else:
        assert min(of_caption_0[1:]) > 15  # 33 expected, with a deviation of 4.7


def test_matching_asks_about_the_pairs_each_caption_with_a_wrong_clip_and_each_clip_with_a_wrong_caption(
    bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(bert, matching=1.0, negatives_among=2).eval()  # without dropout
    model: Any = method.model
    tokens, features = draw(method)
    video = model.embed_video(features)
    similarity = video @ model.embed_text(model.encode_text(tokens)).T  # clips in rows
    clips = torch.tensor([4, 5, 6, 7])
    temperatures = []

    def sample_negatives(
        scores: Tensor, ids: Tensor, temperature: float | Tensor, noise: Tensor | None, among: int | None
    ) -> Tensor:
        assert torch.equal(ids, clips) and noise is None and among == 2
        temperatures.append(float(temperature))
        if torch.allclose(scores, similarity):
            return WRONG_TEXT
        assert torch.allclose(scores, similarity.T)
        return WRONG_VIDEO

    monkeypatch.setattr("stm.methods.video_language.sample_negatives", sample_negatives)
    text = method.read(tokens)
    loss = compare_pairs(model, video, features, text, clips, method.objectives)["matching"]
    pairs = [(i, i, 1) for i in range(4)]
    pairs += [(i, int(WRONG_VIDEO[i]), 0) for i in range(4)] + [(int(WRONG_TEXT[i]), i, 0) for i in range(4)]
    losses = []
    for caption, clip, right in pairs:
        one = tokens[caption : caption + 1]
        logits = model.match(model.encode_text(one), one, features[clip : clip + 1])
        losses.append(cross_entropy(logits, torch.tensor([right])))
    assert len({round(one.item(), 4) for one in losses}) == len(pairs)  # no pair can stand for another
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert temperatures == pytest.approx([0.07, 0.07])  # `language.temperature`, at the start of training


@pytest.mark.parametrize(("settings", "expected"), [({}, ("batch", None)), ({"word_average": "group"}, ("group", 3))])
def test_hidden_words_are_averaged_as_the_settings_say(
    settings: dict[str, Any], expected: tuple[str, int | None], bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(bert, masked_language=1.0, negatives_among=expected[1], **settings)
    given = []

    def note(logits: Tensor, targets: Tensor, average: str, among: int | None) -> Tensor:
        given.append((average, among))
        return logits.sum() * 0

    monkeypatch.setattr("stm.methods.video_language.masked_language_loss", note)
    tokens, features = draw(method)
    method.compare(features, method.read(tokens), torch.tensor([4, 5, 6, 7]))
    assert given == [expected]


@pytest.mark.parametrize("shared", [False, True])
def test_clips_with_the_same_caption_are_no_negatives_where_texts_are_shared(
    shared: bool, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pretraining and in fine-tuning. The loss of the contrast is the same either way, as equal texts have equal logits."""
    method = build(bert, contrastive=1.0, matching=1.0, shared_texts=shared)
    batch: dict[str, Any] = make_batch()
    batch["caption"] = ["a red star", "a blue star", "a red star", "a red star"]
    drawn: list[tuple[int, int]] = []
    sample = sample_negatives

    def note(*arguments: Any, **options: Any) -> Tensor:
        columns = sample(*arguments, **options)
        drawn.extend(enumerate(columns.tolist()))
        return columns

    monkeypatch.setattr("stm.methods.video_language.sample_negatives", note)
    tuning = PairTuning(method.model, None, shared).train()  # type: ignore[arg-type]
    encoded = encode_pairs(method.model.language.tokenizer, 8)  # type: ignore[arg-type]
    for step, made in ((method, method.prepare(batch)), (tuning, {**batch, **encoded(batch)})):
        drawn.clear()
        with torch.no_grad():
            for _ in range(10):
                step(made)
        assert len(drawn) == 80
        assert any(batch["caption"][row] == batch["caption"][column] for row, column in drawn) != shared
        assert all(row != column for row, column in drawn)


def test_the_contrast_s_divisor_divides_what_the_encoders_get_but_not_the_temperature_s_gradient(bert: str) -> None:
    found = []
    for divisor in (1, 8):
        method = build(bert, contrastive=1.0, contrastive_divisor=divisor).eval()
        model: Any = method.model
        method({**make_batch(), "tokens": draw(method)[0]})["loss"].backward()
        found.append([model.video_projection.weight.grad, model.text_projection.weight.grad, model.temperature.grad])
    (video, text, temperature), (less_video, less_text, same) = found
    torch.testing.assert_close(less_video, video / 8)
    torch.testing.assert_close(less_text, text / 8)
    torch.testing.assert_close(same, temperature)


def test_hidden_words_are_predicted_from_what_is_left_of_the_caption_and_the_clip(bert: str) -> None:
    method = build(bert, masked_language=1.0).eval()  # without dropout
    model: Any = method.model
    tokens, features = draw(method)
    torch.manual_seed(5)
    loss = method.compare(features, method.read(tokens), torch.arange(4))["masked_language"]
    torch.manual_seed(5)
    language = model.language
    special = (language.pad_id, language.cls_id)
    masked, targets = mask_words(tokens, 0.5, language.mask_id, special, language.vocabulary)
    assert (masked != tokens).any()
    logits = language.predict_words(language.fuse(language(masked), masked, features))
    torch.testing.assert_close(loss, cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED))


def test_all_words_and_sep_may_be_hidden_but_neither_cls_nor_padding(
    bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(bert, masked_language=1.0, mask_probability=1.0)
    tokens, features = draw(method)
    seen: list[Tensor] = []

    def masked_language_loss(logits: Tensor, targets: Tensor, *_: Any) -> Tensor:
        seen.append(targets)
        return logits.sum()

    monkeypatch.setattr("stm.methods.video_language.masked_language_loss", masked_language_loss)
    method.compare(features, method.read(tokens), torch.arange(4))
    for row, length in enumerate(LENGTHS):  # [CLS], the words, [SEP], [PAD] ...
        expected = [False] + [True] * (length + 1) + [False] * (tokens.shape[1] - length - 2)
        assert (seen[0][row] != IGNORED).tolist() == expected


@pytest.mark.parametrize(("before", "after"), [(1e-5, 0.001), (-3.0, 0.001), (0.2, 0.2), (0.9, 0.5)])
def test_training_holds_the_temperature_between_umt_s_bounds(bert: str, before: float, after: float) -> None:
    method = build(bert, contrastive=1.0)
    model: Any = method.model
    for training, expected in ((False, before), (True, after)):
        method.train(training)
        with torch.no_grad():
            model.temperature.fill_(before)
        values = method({**make_batch(), "tokens": draw(method)[0]})
        assert model.temperature.item() == pytest.approx(expected)
        assert values["temperature"].item() == pytest.approx(expected)
