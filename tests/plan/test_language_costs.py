"""The planned cost of evaluations with text equals sums written out by hand."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from stm.config import (
    Captioning,
    FrameTeacher,
    Language,
    LanguageOptimisation,
    LanguageRun,
    MovingShapesDataset,
    MultipleChoice,
    QuestionAnswering,
    VideoTextRetrieval,
    parse_config,
)
from stm.datasets.moving_shapes.clip_spec import draw_clip_spec
from stm.datasets.moving_shapes.sentences import questions_of
from stm.layout import Layout
from stm.manifest import MANIFEST_SCHEMA
from stm.plan.clips import QUESTIONS_PER_CLIP, Clips, Texts, count_clips
from stm.plan.language_costs import count_pairs, language_work
from stm.storage.tables import write_table

RUN = LanguageRun(
    method="umt",
    model="tiny",  # 4 blocks of width 128, like the four layers of its BERT
    image_size=32,
    patch_size=16,  # 4 tokens per frame
    frames=2,
    teacher=FrameTeacher(model="ViT-B-16"),
    language=Language(model="nowhere/bert", fusion_layer=3, max_tokens=10),
)
W, WORDS = 128, 30522


def block(tokens: int) -> int:
    """A transformer block: 12 W^2 multiply-adds per token, and 2 W per pair of tokens; two FLOPs each."""
    return 2 * (12 * W * W * tokens + 2 * tokens * tokens * W)


def crossing(text: int, memory: int) -> int:
    """Cross-attention: query and output maps of the text, key and value maps of the memory, scores and weighted mean."""
    return 2 * (2 * W * W * text + 2 * W * W * memory + 2 * text * memory * W)


def encode(tokens: int) -> int:
    return 2 * tokens * (3 * 16 * 16) * W + 4 * block(tokens)


def decode(tokens: int, memory: int) -> int:
    return block(tokens) + crossing(tokens, memory) + 2 * tokens * (W * W + W * WORDS)


READ, FUSE = 3 * block(10), block(10) + crossing(10, 8)
CLIPS = Clips(
    {"train": 50, "val": 10, "test": 20},
    100,
    340,
    256,
    "here",
    {"train": Texts(100, 200, 0), "val": Texts(20, 40, 30), "test": Texts(40, 80, 100)},
)
TUNED: dict[str, Any] = {"optimisation": {"epochs": 2, "batch_size": 4}, "validation_split": "val"}


def test_pairs_are_those_of_both_directions_and_never_more_than_there_are():
    assert count_pairs(1000, 1000, 128) == 2 * 128 * 1000
    assert count_pairs(40, 20, 5) == 40 * 5 + 20 * 5
    assert count_pairs(40, 20, 128) == 40 * 20
    assert count_pairs(174, 2088, 128) == 174 * 128 + 2088 * 128


def test_retrieval_reads_every_caption_and_fuses_the_pairs_of_both_directions():
    task = VideoTextRetrieval(task="video_text_retrieval", depth=5)
    assert language_work(task, RUN, CLIPS) == (20 * encode(8) + 40 * READ + (40 * 5 + 20 * 5) * FUSE, 20, 0)
    deep = language_work(task.model_copy(update={"depth": 128}), RUN, CLIPS)
    assert deep.flops == 20 * encode(8) + 40 * READ + 800 * FUSE


def test_fine_tuning_retrieval_fuses_three_pairs_a_caption_and_validates_by_the_dual_encoder():
    tested = language_work(VideoTextRetrieval(task="video_text_retrieval", depth=5), RUN, CLIPS)
    tuned = language_work(VideoTextRetrieval(task="video_text_retrieval", depth=5, **TUNED), RUN, CLIPS)
    training = 3 * 2 * 100 * (encode(8) + READ + 3 * FUSE)
    assert tuned.flops - tested.flops == training + 2 * (10 * encode(8) + 20 * READ)
    assert tuned.clips == 20 + 2 * 100 + 2 * 10


def test_question_answering_is_counted_by_questions():
    task = QuestionAnswering(task="question_answering", max_tokens=10, max_answer_tokens=5, depth=16, **TUNED)
    training = 3 * 2 * 200 * (encode(8) + READ + FUSE + decode(4, 10))
    asking = READ + FUSE + decode(1, 10) + 16 * decode(4, 10)
    tests = (20 * encode(8) + 80 * asking) + 2 * (10 * encode(8) + 40 * asking)
    assert language_work(task, RUN, CLIPS) == (training + tests, 2 * 200 + 20 + 2 * 10, 2 * 200)
    few = language_work(task.model_copy(update={"answers": 3}), RUN, CLIPS)
    assert training + tests - few.flops == (80 + 2 * 40) * 13 * decode(4, 10)


def test_multiple_choice_fuses_every_choice():
    work = language_work(MultipleChoice(task="multiple_choice"), RUN, CLIPS)
    assert work == (20 * encode(8) + 100 * (READ + FUSE), 20, 0)


def test_captions_are_written_by_every_beam():
    task = Captioning(task="captioning", max_caption_tokens=6, beams=3, optimisation=LanguageOptimisation(epochs=1))
    training = 3 * 100 * (encode(8) + decode(5, 8))
    assert language_work(task, RUN, CLIPS).flops == training + 20 * (encode(8) + 3 * decode(6, 8))


def test_the_task_s_own_frames_and_lengths_count():
    task = VideoTextRetrieval(task="video_text_retrieval", depth=5, frames=4, max_tokens=6)
    fuse = block(6) + crossing(6, 16)
    assert language_work(task, RUN, CLIPS).flops == 20 * encode(16) + 40 * 3 * block(6) + 300 * fuse


def test_a_local_bert_says_its_layers_and_words(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 5, "vocab_size": 91}')
    run = RUN.model_copy(update={"language": RUN.language.model_copy(update={"model": str(tmp_path)})})
    task = Captioning(task="captioning", max_caption_tokens=6, beams=1, optimisation=LanguageOptimisation(epochs=1))
    one = 2 * (block(6) + crossing(6, 8)) + 2 * 6 * (W * W + W * 91)
    train = 2 * (block(5) + crossing(5, 8)) + 2 * 5 * (W * W + W * 91)
    expected = 3 * 100 * (encode(8) + train) + 20 * (encode(8) + one)
    assert language_work(task, run, CLIPS).flops == expected


def plan(source: str, folder: Path) -> Clips:
    dataset = {"source": source, "root": "videos", "annotations": "lists"}
    return count_clips(parse_config({"name": "x", "results": str(folder), "dataset": dataset}))


def test_texts_are_counted_before_there_is_any_data(tmp_path):
    assert plan("msrvtt-qa", tmp_path).texts["test"] == Texts(0, 72821, 0)
    assert plan("msrvtt-mc", tmp_path).texts["test"] == Texts(2990, 2990, 5 * 2990)
    assert plan("msrvtt", tmp_path).texts["test"] == Texts(1000, 0, 0)
    assert plan("msvd", tmp_path).texts["test"] == Texts(670, 0, 0), "unknown: one text per clip"


def test_generated_clips_have_as_many_questions_as_the_plan_says(tmp_path):
    data = MovingShapesDataset(source="moving-shapes", clips={"test": 4})
    assert len(questions_of(draw_clip_spec(0, "test", 0, data))) == QUESTIONS_PER_CLIP
    values = {"name": "x", "results": str(tmp_path), "dataset": data.model_dump(mode="json")}
    assert count_clips(parse_config(values)).texts == {"test": Texts(4, 28, 0)}


def test_texts_of_a_manifest_are_counted(tmp_path):
    def row(key: str, captions: list[str] | None, questions: list[dict] | None) -> dict:
        known = {"video_id": key, "key": key, "path": f"{key}.mp4", "split": "test"}
        return dict.fromkeys(MANIFEST_SCHEMA.names) | known | {"captions": captions, "questions": questions}

    asked: list[dict] = [
        {"question": "q", "answer": "a", "choices": None},
        {"question": "", "answer": "a", "choices": ["a", "b", "c"]},
    ]
    rows = [row("a", ["one", "two"], asked), row("b", None, None)]
    config = parse_config(
        {"name": "x", "results": str(tmp_path), "dataset": {"source": "moving-shapes", "clips": {"test": 9}}}
    )
    write_table(Layout.of(config).manifest, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), {})
    assert count_clips(config).texts == {"test": Texts(2, 2, 3)}


def test_texts_of_a_folder_are_those_of_its_annotations(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in "ab":
        (tmp_path / f"videos/{name}.mp4").write_bytes(b"")
    choose = {"question": "which", "answer": "x", "choices": ["x", "y", "z"]}
    rows = [
        {"path": "a.mp4", "split": "test", "captions": ["one", "two"], "questions": [choose]},
        {"path": "b.mp4", "split": "test", "caption": "three", "questions": [{"question": "q", "answer": "r"}]},
    ]
    (tmp_path / "clips.json").write_text(json.dumps(rows))
    dataset = {"source": "folder", "root": str(tmp_path / "videos"), "annotations": str(tmp_path / "clips.json")}
    clips = count_clips(parse_config({"name": "x", "results": str(tmp_path), "dataset": dataset}))
    assert clips.texts == {"test": Texts(3, 2, 3)}
