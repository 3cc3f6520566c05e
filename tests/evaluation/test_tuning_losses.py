"""The losses of fine-tuning on pairs, answers and captions against plain loops, and the choice of checkpoints."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from language_runs import make_run, make_small_bert
from torch import Tensor, nn

from stm.config import PairSettings
from stm.distributed.process import Process
from stm.evaluation.checkpoint_selection import Best, tune
from stm.evaluation.tuning import AnswerTuning, CaptionTuning, PairTuning, encode_pairs
from stm.models.text.decoder import TextDecoder
from stm.models.text.split_bert import SplitBert
from stm.models.video_language import VideoLanguageModel
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.training.loop import TrainingPlan

TEXTS = ["a red circle moves left", "star", "the blue square", "over"]
ANSWERS = ["red", "blue circle", "a", "left right"]
CPU = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VideoLanguageModel:
    """With weights strong enough for each word's loss to depend on the others and on the clip."""
    run = make_run("umt", make_small_bert(tmp_path_factory.mktemp("bert")), image_size=32, patch_size=8)
    assert run.language is not None
    torch.manual_seed(0)
    model = VideoLanguageModel(VideoEncoder(zoo.describe(run)), SplitBert.load(run.language), 32)
    with torch.no_grad():
        for name, parameter in model.language.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def draw_video() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)


def word_losses(decoder: TextDecoder, tokens: Tensor, memory: Tensor) -> Tensor:
    """Of one text's words and [SEP], without any padding."""
    words = tokens[tokens != decoder.pad_id][None]
    logits = decoder.bert(input_ids=words[:, :-1], encoder_hidden_states=memory, use_cache=False).logits
    return -logits.log_softmax(-1)[0].gather(1, words[0, 1:, None])[:, 0]


def test_the_loss_of_captions_is_the_mean_over_all_their_words(model: VideoLanguageModel) -> None:
    tuning, tokens, video = CaptionTuning(model).eval(), model.language.tokenizer.encode(TEXTS, 8), draw_video()
    with torch.no_grad():
        loss = tuning({"tokens": tokens, "video": video})["loss"]
        words = [word_losses(tuning.decoder, tokens[n], model.encoder(video[n : n + 1])) for n in range(4)]
    assert [len(own) for own in words] == [6, 2, 4, 2]
    torch.testing.assert_close(loss, torch.cat(words).mean(), rtol=1e-4, atol=1e-4)


def test_the_loss_of_answers_is_the_mean_over_questions_of_the_sum_over_words(model: VideoLanguageModel) -> None:
    tuning, video, tokenizer = AnswerTuning(model).eval(), draw_video(), model.language.tokenizer
    questions, answers = tokenizer.encode(TEXTS, 8), tokenizer.encode(ANSWERS, 5)
    with torch.no_grad():
        loss = tuning({"tokens": questions, "answers": answers, "video": video})["loss"]
        sums = []
        for number in range(4):
            alone = questions[number : number + 1][:, questions[number] != model.language.pad_id]
            memory = model.fuse(model.encode_text(alone), alone, model.encoder(video[number : number + 1]))
            sums.append(word_losses(tuning.decoder, answers[number], memory).sum())
    torch.testing.assert_close(loss, torch.stack(sums).mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_of_pairs_is_contrast_of_the_frames_mean_plus_matching(
    shared: bool, model: VideoLanguageModel
) -> None:
    """Rows 1 and 2 are captions of one clip; rows 0 and 3 are clips with one caption, which the protocol may share."""
    tuning = PairTuning(model, PairSettings(), shared).eval()
    texts = ["a red circle", "star", "the blue square", "a red circle"]
    batch: dict[str, Any] = {"video": draw_video(), "clip": torch.tensor([4, 6, 6, 9]), "caption": texts}
    batch |= encode_pairs(model.language.tokenizer, 8)(batch)
    with torch.no_grad():
        model.temperature.fill_(0.3)
        losses = tuning(batch)
        frames = model.encoder(batch["video"]).unflatten(1, (4, -1)).mean(2)
        projected = model.video_projection(model.pool_norm(frames))
        video = (projected / projected.norm(dim=2, keepdim=True)).mean(1)
        text = model.text_projection(model.encode_text(batch["tokens"])[:, 0])
        text = text / text.norm(dim=1, keepdim=True)
    assert (video.norm(dim=1) < 0.99999).all()
    positives = [{0, 3} if shared else {0}, {1, 2}, {1, 2}, {0, 3} if shared else {3}]
    total = 0.0
    for cosines in (video @ text.T, text @ video.T):
        for row, right in enumerate(positives):
            powers = [math.exp(value / 0.3) for value in cosines[row].tolist()]
            total -= sum(math.log(powers[column] / sum(powers)) for column in right) / len(right) / 8
    assert losses["contrastive"].item() == pytest.approx(total, rel=1e-4)
    assert losses["matching"] > 0
    torch.testing.assert_close(losses["loss"], losses["contrastive"] + losses["matching"])


@pytest.mark.parametrize("kind", [PairTuning, AnswerTuning, CaptionTuning])
def test_dropout_inside_the_bert_differs_between_processes(
    kind: Callable[..., nn.Module], model: VideoLanguageModel
) -> None:
    """Given equal rows and without stochastic depth, all else that is random is equal."""
    tokens = model.language.tokenizer.encode(TEXTS, 8)
    batch = {"video": draw_video(), "tokens": tokens, "answers": tokens[:, :5], "clip": torch.arange(4)}
    losses, states = [], []
    for rank in (0, 1, 1):
        module = kind(deepcopy(model), process=Process(rank, 2, torch.device("cpu"))).train()
        torch.manual_seed(1)
        losses.append(module(batch)["loss"].item())
        states.append(torch.get_rng_state())
    assert losses[0] != losses[1] == losses[2]
    assert torch.equal(states[0], states[1])


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


def score_epochs(monkeypatch: pytest.MonkeyPatch, folder: Path, scores: list[float], epochs: list[int], **plan: Any):
    """Train such that the weight is the number of the epoch, whose score is that of the list."""
    module = Weight()

    def fit(module: Weight, batches: Any, plan: Any, output: Path, process: Process, after_epoch: Any) -> Any:
        for epoch in epochs:
            with torch.no_grad():
                module.value.fill_(epoch)
            after_epoch(epoch)
            assert module.training
        return type("Checkpoints", (), {"discard": lambda self: None, "resumed": lambda self: {}})()

    def measure(measured: nn.Module) -> float:
        assert not measured.training and not torch.is_grad_enabled()
        return scores[int(module.value) - 1]

    monkeypatch.setattr("stm.evaluation.checkpoint_selection.fit_to_test", fit)
    settings = TrainingPlan("any", None, 1, 0, **plan)  # type: ignore[arg-type]
    which, discard = tune(module, lambda step: iter(()), settings, folder, CPU, measure)
    assert not module.training
    return which, int(module.value), discard


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.3, 0.2], 2), ([0.3, 0.3, 0.2], 1), ([0.1, 0.2, 0.3], 3), ([-3.0, -2.0, -2.0], 2)]
)
def test_the_first_of_the_best_epochs_is_loaded(
    scores: list[float], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which, loaded, discard = score_epochs(monkeypatch, tmp_path, scores, [1, 2, 3])
    assert which == {"chosen": "validation", "epoch": best, "score": scores[best - 1]} and loaded == best
    assert list(tmp_path.glob("best.*"))
    discard()
    assert not list(tmp_path.glob("best.*"))


def test_a_resumed_run_remembers_its_best_epoch_and_another_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_epochs(monkeypatch, tmp_path, [0.9, 0.3], [1, 2])
    # It repeats the second epoch, whose score would now be better: it has been scored, and is not again.
    which, loaded, _ = score_epochs(monkeypatch, tmp_path, [0.0, 1.0, 0.5], [2, 3])
    assert (which["epoch"], which["score"], loaded) == (1, 0.9, 1)
    which, loaded, _ = score_epochs(monkeypatch, tmp_path, [0.0, 0.1, 0.5], [1, 2, 3], origin={"seed": 1})
    assert (which["epoch"], which["score"], loaded) == (3, 0.5, 3)


def test_without_a_measure_nothing_is_stored_and_the_last_weights_stay(tmp_path: Path) -> None:
    best, module = Best(tmp_path, None, "any", CPU), Weight()
    best.update(module, 1)
    assert best.load(module)["chosen"] == "last" and not list(tmp_path.iterdir())
