"""Retrieval, questions, multiple choice and captions from shards to metrics, with a small model, fine-tuned for a few steps."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clip_metrics import check_clip_values
from language_runs import make_run, make_small_bert
from training_shards import make_shard

from stm.config import (
    Captioning,
    LanguageAugmentation,
    LanguageOptimisation,
    MultipleChoice,
    QuestionAnswering,
    VideoTextRetrieval,
)
from stm.data.dataset import ClipDataset
from stm.distributed.process import Process
from stm.evaluation import EvaluationInputs, evaluate
from stm.evaluation.captioning.generate import share_exact
from stm.evaluation.captioning.scores import NAMES, CaptionScoreError, CaptionScores, find_programs
from stm.evaluation.language_clips import CaptionPairs, encode_clips, load_model, open_clips
from stm.evaluation.questions.multiple_choice import _Scorer
from stm.evaluation.retrieval.video_text import gather_queries
from stm.models.text.decoder import TextDecoder
from stm.storage.files import read_json, sha256_file
from stm.storage.tables import read_receipt, read_table, write_table
from stm.training.pretraining import pretrain

ALONE = Process(0, 1, torch.device("cpu"))
COLORS = ["red", "blue", "green"]
TUNING = LanguageOptimisation(epochs=2, batch_size=6, learning_rate=1e-3, warmup_epochs=0)


def make_captioned_shard(index: Path, clips: int, seed: int, prefix: str) -> Path:
    """A shard whose captions and questions say a clip's color."""
    labels = [COLORS[number % 3] for number in range(clips)]
    make_shard(index, labels, seed, prefix)
    rows = read_table(index).to_pylist()
    for row, color in zip(rows, labels, strict=True):
        row["captions"] = [f"a {color} circle moves", f"{color} {row['key'][-1]}"]
        others = [c for c in COLORS if c != color]
        row["questions"] = [
            {"question": "what color is it", "answer": color, "choices": None},
            {
                "question": "which",
                "answer": f"a {color} star",
                "choices": [f"a {c} star" for c in (others[0], color, others[1])],
            },
        ]
    schema = pq.read_schema(index).remove_metadata()
    write_table(index, type(read_table(index)).from_pylist(rows, schema=schema), read_receipt(index))
    return index


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    splits = {
        name: [make_captioned_shard(folder / name / f"{name}-00000.parquet", clips, seed, name)]
        for seed, (name, clips) in enumerate((("train", 12), ("val", 6), ("test", 9)))
    }
    run = make_run("umt", make_small_bert(folder / "bert"), image_size=32, patch_size=8)
    pretrain(run, splits["train"], folder / "run", 0, "cpu")
    return folder, splits, run


def do(task, world, output: Path, **more) -> dict:
    folder, splits, run = world
    held = splits["val"] if task.validation_split else []
    weights = folder / "run" / "weights.safetensors"
    inputs = EvaluationInputs(
        weights, splits["test"], output, 0, train=splits["train"], validation=held, device="cpu", **more
    )
    evaluate(task, run, inputs)
    if task.task != "captioning":  # whose scores are made up by most tests
        check_clip_values(output)
    return read_json(output / "metrics.json")


def test_zero_shot_retrieval_asks_with_every_caption(world, tmp_path):
    found = do(VideoTextRetrieval(task="video_text_retrieval"), world, tmp_path)
    assert found["checkpoint"] == {"chosen": "pretrained"}
    assert found["dual_encoder"]["queries"] == 18 and found["reranked"]["clips"] == 9
    table = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert found["headline"]["name"] == "reranked.text_to_video.r1"
    assert found["headline"]["value"] == pytest.approx(np.mean([row["reranked"] <= 1 for row in table]))
    assert found["headline"]["chance"] == pytest.approx(1 / 9)
    ranks = np.array([row["rank"] for row in table])
    assert len(ranks) == 18 and ranks.min() >= 1 and ranks.max() <= 9
    assert found["dual_encoder"]["text_to_video"]["r5"] == pytest.approx((ranks <= 5).mean())
    assert found["dual_encoder"]["text_to_video"]["mean_rank"] == pytest.approx(ranks.mean())


def test_where_clips_share_captions_a_text_asks_once_and_any_of_its_clips_is_right(world, tmp_path):
    task = VideoTextRetrieval(task="video_text_retrieval")
    alone = do(task, world, tmp_path / "alone")
    found = do(task, world, tmp_path / "shared", shared_texts=True)
    assert (alone["shared_texts"], found["shared_texts"]) == (False, True)
    # Three colors of three clips each, and a caption of each clip's own.
    assert found["dual_encoder"]["queries"] == 3 + 9 and found["reranked"]["clips"] == 9
    rows = pq.read_table(tmp_path / "shared" / "predictions.parquet").to_pylist()
    single = pq.read_table(tmp_path / "alone" / "predictions.parquet").to_pylist()
    keys = {color: [f"test-{n:03d}" for n in range(k, 9, 3)] for k, color in enumerate(COLORS)}
    for row in rows:
        assert row["keys"] == next(
            (own for color, own in keys.items() if row["caption"].startswith(f"a {color}")), row["keys"]
        )
    for name in ("rank", "reranked"):  # of three right ones the best leaves at most six wrong ones before it
        own = {row["caption"]: row[name] for row in rows}
        assert all(1 <= own[f"a {color} circle moves"] <= 7 for color in COLORS)
        for row in single:  # its own clip is one of those that are right, and equals are as good as the best of them
            assert own[row["caption"]] <= row[name]
    ranks = [row["rank"] for row in rows]
    assert found["dual_encoder"]["text_to_video"]["mean_rank"] == pytest.approx(np.mean(ranks))
    assert found["chance"]["r1"] == pytest.approx((3 * 3 / 9 + 9 * 1 / 9) / 12)
    assert alone["chance"] == pytest.approx({"r1": 1 / 9, "r5": 5 / 9, "r10": 1})


def test_queries_are_captions_or_texts_that_clips_share():
    captions = [["opening"], ["closing", "opening"], ["closing"], ["closing", "closing"]]
    texts, right = gather_queries(captions, shared=True)
    assert texts == ["opening", "closing"] and [own.tolist() for own in right] == [[0, 1], [1, 2, 3]]
    texts, right = gather_queries(captions, shared=False)
    assert texts == ["opening", "closing", "opening", "closing", "closing", "closing"]
    assert [own.tolist() for own in right] == [[0], [1], [1], [2], [3], [3]]


def test_an_epoch_of_fine_tuning_sees_every_caption_of_every_clip_once(world):
    """12 clips of two captions: the protocols' `explode`."""
    _, splits, run = world
    task = VideoTextRetrieval(
        task="video_text_retrieval", optimisation=TUNING, augmentation=LanguageAugmentation(crop="random_resized")
    )
    pairs = open_clips(task, run, splits["train"], 0, True, None, CaptionPairs)
    assert len(pairs) == 24
    epochs = [[pairs[epoch, number][0] for number in range(24)] for epoch in range(2)]
    for samples in epochs:
        told = [(sample["clip"], sample["caption"]) for sample in samples]
        assert told == [(clip, text) for clip in range(12) for text in pairs.index[clip].captions]
    # Neither two captions of a clip nor two epochs share their crop.
    videos = [samples[number]["video"].tobytes() for samples in epochs for number in (0, 1)]
    assert len(set(videos)) == 4
    assert pairs[1, 0][0]["video"].tobytes() == videos[2]  # and all of it comes again


def test_an_evaluation_s_positions_are_computed_for_its_frames_and_stretched_only_on_request(world):
    folder, _, run = world
    weights = folder / "run" / "weights.safetensors"
    assert run.position_frames is None and run.positions == "joint"

    def load(run, frames):
        return load_model(
            weights, run, VideoTextRetrieval(task="video_text_retrieval", frames=frames)
        ).encoder.positions

    same, longer = load(run, None)[0], load(run, 3 * run.frames)[0]
    width, columns = same.shape[1], np.arange(same.shape[1])
    angle = np.arange(len(longer))[:, None] / 10000 ** (2 * (columns // 2) / width)
    table = np.where(columns % 2 == 0, np.sin(angle), np.cos(angle))
    np.testing.assert_allclose(longer.numpy(), table, atol=1e-6)
    assert torch.equal(same, longer[: len(same)])
    stretched = load(run.model_copy(update={"position_frames": run.frames}), 3 * run.frames)[0]
    thirds = stretched.unflatten(0, (3 * run.frames, -1))[
        1::3
    ]  # the middle one of three new frames is where an old one was
    assert torch.allclose(thirds, same.unflatten(0, (run.frames, -1)), atol=1e-6)


def test_validation_and_test_see_the_whole_frame_unless_told_otherwise(world):
    """Frames of 64 x 80 pixels: squashed, or the centred square."""
    _, splits, run = world
    videos = {}
    for name in ("whole", "center"):
        task = VideoTextRetrieval(task="video_text_retrieval", test_crop=name)
        data = open_clips(task, run, splits["test"], 0, False)
        videos[name] = data[0][0]["video"]
        height, width = data.index[0].height, data.index[0].width
        left = (width - height) // 2 if name == "center" else 0
        positions = data.samples.windows(data.index[0], 0)[0].tolist()
        frames = [frame.copy() for _, frame in data._reader.frames(data.index[0], positions)]
        expected = torch.from_numpy(np.stack(frames))[:, :, left : width - left].permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(
            expected.float(), (run.image_size, run.image_size), mode="bicubic", align_corners=False
        )
        assert width > height
        assert np.abs(videos[name].astype(float) - expected.clamp(0, 255).numpy()).max() <= 1.51
    assert not np.array_equal(videos["whole"], videos["center"])


TASKS = {
    "retrieval.video_text": VideoTextRetrieval(
        task="video_text_retrieval", optimisation=TUNING, validation_split="val"
    ),
    "questions.open_ended": QuestionAnswering(task="question_answering", optimisation=TUNING, validation_split="val"),
    "questions.multiple_choice": MultipleChoice(task="multiple_choice", optimisation=TUNING, validation_split="val"),
    "captioning.generate": Captioning(task="captioning", optimisation=TUNING, validation_split="val", beams=1),
}


@pytest.mark.parametrize("module", list(TASKS))
def test_checkpoints_are_scored_on_the_validation_clips_and_results_on_the_test_clips(
    module, world, tmp_path, monkeypatch
):
    """Which split each sample is read from, with a training that only scores its first weights."""
    read = []
    take = ClipDataset.__getitem__

    def note(self, item):
        read.append(self.index.tars[0].parent.name)
        return take(self, item)

    def score_first_weights(module, batches, plan, output, process, measure):
        read.clear()
        assert np.isfinite(measure(module))
        assert set(read) == {"val"}
        read.clear()
        return {"chosen": "validation"}, lambda: None

    monkeypatch.setattr(ClipDataset, "__getitem__", note)
    monkeypatch.setattr(f"stm.evaluation.{module}.tune", score_first_weights)
    if module == "captioning.generate":
        scores = CaptionScores(dict.fromkeys(NAMES, 0.5), {name: np.full(9, 0.5) for name in NAMES})
        monkeypatch.setattr("stm.evaluation.captioning.generate.find_programs", lambda: None)
        monkeypatch.setattr("stm.evaluation.captioning.generate.score_captions", lambda *_: scores)
    found = do(TASKS[module], world, tmp_path)
    assert set(read) == {"test"}
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    keys = [key for row in rows for key in row.get("keys", [row.get("key")])]
    assert all(key.startswith("test-") for key in keys) and len(set(keys)) == 9
    assert found["checkpoint"] == {"chosen": "validation"}
    weights = world[0] / "run" / "weights.safetensors"
    assert found["receipt"]["weights"] == sha256_file(weights)


def test_references_and_scores_stand_beside_their_own_clip(world, tmp_path, monkeypatch):
    scores = CaptionScores(dict.fromkeys(NAMES, 0.5), {name: np.arange(9.0) for name in NAMES})
    monkeypatch.setattr("stm.evaluation.captioning.generate.find_programs", lambda: None)
    monkeypatch.setattr("stm.evaluation.captioning.generate.score_captions", lambda *_: scores)
    monkeypatch.setattr("stm.evaluation.captioning.generate.tune", lambda *_: ({"chosen": "last"}, lambda: None))
    do(Captioning(task="captioning", optimisation=TUNING, beams=1), world, tmp_path)
    for number, row in enumerate(pq.read_table(tmp_path / "predictions.parquet").to_pylist()):
        color = COLORS[number % 3]
        assert row["key"] == f"test-{number:03d}" and row["cider"] == number
        assert row["references"] == [f"a {color} circle moves", f"{color} {number}"]


@pytest.mark.slow
def test_the_checkpoint_is_chosen_on_validation_or_is_the_last(world, tmp_path):
    chosen = do(
        VideoTextRetrieval(task="video_text_retrieval", optimisation=TUNING, validation_split="val", depth=4),
        world,
        tmp_path / "chosen",
    )
    assert chosen["checkpoint"]["chosen"] == "validation" and chosen["checkpoint"]["epoch"] in (1, 2)
    last = do(VideoTextRetrieval(task="video_text_retrieval", optimisation=TUNING), world, tmp_path / "last")
    assert last["checkpoint"]["chosen"] == "last"
    assert not list((tmp_path / "chosen").glob("best.*")) and not (tmp_path / "chosen" / "checkpoints").exists()


@pytest.mark.slow
def test_questions_are_answered_from_the_training_split_s_answers(world, tmp_path):
    task = QuestionAnswering(task="question_answering", optimisation=TUNING, validation_split="val", depth=3)
    found = do(task, world, tmp_path)
    assert found["questions"] == 18 and found["answers"] == 6 and found["answers_from"] == "training split"
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert {row["answer"] for row in rows} <= {*COLORS, *(f"a {color} star" for color in COLORS)}
    assert found["accuracy"] == pytest.approx(np.mean([row["answer"] == row["right"] for row in rows]))
    assert found["reachable"] == 1
    # Of 24 training answers each color is 4 and each star another 4.
    assert found["headline"]["value"] == found["accuracy"] and found["headline"]["chance"] == pytest.approx(1 / 6)


def skip_training(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(f"stm.evaluation.{module}.tune", lambda *_: ({"chosen": "last"}, lambda: None))


def test_a_benchmark_s_questions_are_answered_from_its_own_list(world, tmp_path, monkeypatch):
    """Neither from the training answers, nor limited in number by `answers`, which is for those."""
    skip_training(monkeypatch, "questions.open_ended")
    task = QuestionAnswering(task="question_answering", optimisation=TUNING, answers=1)
    found = do(task, world, tmp_path, answers=("circle", "red", "moves"))
    assert (found["answers"], found["answers_from"]) == (3, "benchmark")
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert {row["answer"] for row in rows} <= {"circle", "red", "moves"}
    assert found["reachable"] == pytest.approx(3 / 18)  # of nine clips, three are red; no star is in the list


def test_equal_questions_of_a_clip_count_one_by_one(world, tmp_path, monkeypatch):
    """As by question id in UMT's release: three questions with two answers, of which one alone can be given."""
    skip_training(monkeypatch, "questions.open_ended")
    folder, splits, run = world
    index = tmp_path / "test" / "test-00000.parquet"
    index.parent.mkdir()
    index.with_suffix(".tar").symlink_to(splits["test"][0].with_suffix(".tar"))
    table = read_table(splits["test"][0])
    rows = table.to_pylist()
    for row in rows:
        row["questions"] = [{"question": "which", "answer": a, "choices": None} for a in ("red", "red", "blue")]
    schema = pq.read_schema(splits["test"][0]).remove_metadata()
    write_table(index, type(table).from_pylist(rows, schema=schema), read_receipt(splits["test"][0]))
    task = QuestionAnswering(task="question_answering", optimisation=TUNING)
    found = do(task, (folder, {**splits, "test": [index]}, run), tmp_path / "out", answers=("red",))
    assert found["questions"] == 27 and found["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("ranking", ["sum", "albef"])
def test_the_configured_ranking_decides(ranking, world, tmp_path, monkeypatch):
    skip_training(monkeypatch, "questions.open_ended")
    rankings = []
    rank = TextDecoder.rank

    def note(self, memory, candidates, depth, ranking, present):
        rankings.append((depth, ranking))
        return rank(self, memory, candidates, depth, ranking, present)

    monkeypatch.setattr(TextDecoder, "rank", note)
    do(
        QuestionAnswering(task="question_answering", optimisation=TUNING, ranking=ranking, depth=2),
        world,
        tmp_path,
    )
    assert set(rankings) == {(2, ranking)}


@pytest.mark.parametrize(("parts", "sides"), [("none", (0, 0)), ("video", (1, 0)), ("text", (0, 1)), ("all", (1, 1))])
def test_a_task_says_whose_activations_are_computed_again(world, parts, sides):
    folder, _, run = world
    task = VideoTextRetrieval(task="video_text_retrieval", gradient_checkpointing=parts)
    model = load_model(folder / "run" / "weights.safetensors", run, task)
    assert (model.encoder.gradient_checkpointing, model.language.gradient_checkpointing) == sides


def test_choices_are_scored_with_the_model_s_temperature_and_the_task_s_weight(world):
    folder, splits, run = world
    task = MultipleChoice(task="multiple_choice", matching_weight=0.4)
    model = load_model(folder / "run" / "weights.safetensors", run, task).eval()
    with torch.no_grad():
        model.temperature.fill_(0.02)
    test = open_clips(task, run, splits["test"], 0, False)
    scores, _, rows = _Scorer(model, task, run, ALONE).score(test)
    features = encode_clips(model, test, ALONE, 0).features
    for number, (_, choices) in enumerate(rows):
        tokens = model.language.tokenizer.encode(list(choices), run.language.max_tokens)
        with torch.no_grad():
            states = model.encode_text(tokens)
            clip = features[number : number + 1]
            cosines = (model.embed_text(states) @ model.embed_frames(clip, run.frames).T)[:, 0].tolist()
            no_yes = model.match(states, tokens, clip).exp().tolist()
        powers = [math.exp(cosine / 0.02) for cosine in cosines]
        expected = [
            0.4 * yes / (no + yes) + 0.6 * power / sum(powers) for (no, yes), power in zip(no_yes, powers, strict=True)
        ]
        assert scores[number].tolist() == pytest.approx(expected, abs=1e-5)


def test_fine_tuning_keys_pairs_by_text_and_groups_negatives_as_the_task_and_its_protocol_say(
    world, tmp_path, monkeypatch
):
    """Retrieval and multiple choice hand the task's settings and the protocol's shared texts to their training."""
    for module, section, name in (
        ("retrieval.video_text", VideoTextRetrieval, "video_text_retrieval"),
        ("questions.multiple_choice", MultipleChoice, "multiple_choice"),
    ):
        tuned: list[tuple[Any, Any]] = []

        def note(module, batches, *_, tuned=tuned):
            tuned.append((module.objectives, next(batches(0))))
            return {"chosen": "last"}, lambda: None

        monkeypatch.setattr(f"stm.evaluation.{module}.tune", note)
        settings = {"task": name, "optimisation": TUNING, "contrastive_divisor": 8, "negatives_among": 3}
        task = section.model_validate(settings)
        do(task, world, tmp_path / name, shared_texts=True)
        objectives, batch = tuned[0]
        assert objectives.shared_texts and (objectives.contrastive_divisor, objectives.negatives_among) == (8, 3)
        assert (objectives.contrastive, objectives.matching, objectives.masked_language) == (1, 1, 0)
        equal = batch["caption_hash"][:, None] == batch["caption_hash"]
        assert equal.tolist() == [[one == other for other in batch["caption"]] for one in batch["caption"]]


@pytest.mark.slow
def test_multiple_choice_takes_questions_with_choices_only(world, tmp_path):
    for number, tuning in enumerate((None, TUNING)):
        found = do(MultipleChoice(task="multiple_choice", optimisation=tuning), world, tmp_path / str(number))
        assert found["questions"] == 9 and found["headline"]["chance"] == pytest.approx(1 / 3)
        rows = pq.read_table(tmp_path / str(number) / "predictions.parquet").to_pylist()
        assert found["accuracy"] == pytest.approx(np.mean([row["choice"] == row["right"] for row in rows]))


def test_a_caption_is_exact_where_it_is_what_the_model_read_of_a_reference():
    """Models read "two-tone" as two words, and no full stop: they cannot write it otherwise."""
    references = [["a red star", "A two-tone star."], ["a star"], ["a star"]]
    assert share_exact(["a two tone star", "a star", "star"], references) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_captions_are_written_and_scored(world, tmp_path):
    try:
        find_programs()
    except CaptionScoreError as error:
        pytest.skip(str(error))
    found = do(Captioning(task="captioning", optimisation=TUNING, beams=2, max_caption_tokens=8), world, tmp_path)
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert found["clips"] == len(rows) == 9
    assert all(row["references"][0].startswith("a ") for row in rows)
    assert {"bleu4", "meteor", "rouge_l", "cider"} <= set(found)
    assert found["cider"] == pytest.approx(np.mean([row["cider"] for row in rows])) == found["headline"]["value"]
    assert (found["headline"]["chance"], found["headline"]["unit"]) == (None, "")
