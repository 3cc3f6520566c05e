"""The captions stage: each source of captions, killed jobs, and models that cannot be loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import save_blip2, save_language_model
from stage_outputs import Clip, StageOutputs, make_stage_outputs
from transformers import AutoModelForCausalLM, AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

from stm.config import BadInput, Blip2Captions, HumanCaptions, LabelCaptions, LanguageModelCaptions
from stm.jobs.journal import Journal
from stm.manifest import TooManyFailures
from stm.preprocess.captions.blip2 import Blip2Captioner, choose_key_frames
from stm.preprocess.captions.language_model import LanguageModel
from stm.preprocess.captions.write import read_captions, write_captions
from stm.preprocess.frames.table import load_frame
from stm.pretrained.hub import ModelError, find_model
from stm.pretrained.local_files import hash_weights
from stm.storage.tables import read_receipt, read_table

KEEP_GOING = BadInput(max_failure_rate=1.0)


def run(made: StageOutputs, source: Any, bad_input: BadInput = KEEP_GOING, name: str = "captions.parquet") -> Path:
    output = made.folder / name
    write_captions(made.slice, made.tar, made.index, output, source, bad_input, device="cpu")
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_table(path).to_pylist()


# ------------------------------------------------------------------------------------------------- without a model


def test_human_captions_keep_their_order_and_say_why_there_are_none(tmp_path: Path) -> None:
    clips = [
        Clip("b", captions=["second", "first  \n one"]),
        Clip("a", captions=None),
        Clip("c", captions=["  ", ""]),
        Clip("d", captions=[" ", "good"]),
        Clip("lost", captions=["never read"], kept=False),
    ]
    rows = rows_of(run(make_stage_outputs(tmp_path, clips), HumanCaptions(kind="human")))
    shown = [(r["key"], r["caption_index"], r["frame"], r["caption"], r["status"], r["policy"]) for r in rows]
    assert shown == [
        ("a", 0, -1, None, "caption_missing", "drop"),
        ("b", 0, -1, "second", "ok", "keep"),
        ("b", 1, -1, "first one", "ok", "keep"),
        ("c", 0, -1, None, "caption_empty", "drop"),
        ("d", 0, -1, "good", "ok", "keep"),
    ]
    assert rows[4]["detail"] == "1 of 2 captions are empty: caption 0"


def test_label_templates_speak_the_label(tmp_path: Path) -> None:
    made = make_stage_outputs(
        tmp_path, [Clip("a", label="playing_the_{}"), Clip("b", label=None), Clip("c", label=" _ ")]
    )
    source = LabelCaptions(kind="label", templates=("a video of {}.", "{}!"))
    rows = rows_of(run(made, source))
    assert [r["caption"] for r in rows] == ["a video of playing the {}.", "playing the {}!", None, None]
    assert [r["status"] for r in rows] == ["ok", "ok", "caption_missing", "caption_missing"]


def test_too_many_missing_captions_stop_the_stage(tmp_path: Path) -> None:
    made = make_stage_outputs(tmp_path, [Clip(f"clip{i}", frames=1, label=None) for i in range(8)])
    with pytest.raises(TooManyFailures, match="dropped 8 of 8"):
        run(made, LabelCaptions(kind="label"), BadInput(max_failure_rate=0.5))


def test_policy_of_the_config_is_written(tmp_path: Path) -> None:
    made = make_stage_outputs(tmp_path, [Clip("a", label=None)])
    rows = rows_of(
        run(made, LabelCaptions(kind="label"), BadInput.model_validate({"policy": {"caption_missing": "keep"}}))
    )
    assert [(r["status"], r["policy"]) for r in rows] == [("caption_missing", "keep")]


def test_read_captions_returns_what_was_written(tmp_path: Path) -> None:
    made = make_stage_outputs(tmp_path, [Clip("b", captions=["x", "y"]), Clip("a", captions=None)])
    captions = read_captions(run(made, HumanCaptions(kind="human")))
    assert captions["b"].texts == ((-1, "x"), (-1, "y"))
    assert captions["a"].texts == () and captions["a"].status == "caption_missing"


# ----------------------------------------------------------------------------------------------------------- BLIP-2


@given(st.integers(1, 500), st.integers(1, 64))
def test_key_frames_are_the_frames_at_the_centres_of_equal_segments(stored: int, count: int) -> None:
    # Computed independently: the middle of each segment, on the time axis where frame i covers [i, i + 1).
    middles = (np.arange(count) + 0.5) * (stored / count)
    frames = choose_key_frames(stored, count)
    exact = [m for m in middles if abs(m - round(m)) > 1e-9]  # a middle on a border belongs to the later frame
    assert {int(np.floor(m)) for m in exact} <= set(frames)
    assert frames == sorted(set(frames)) and frames[0] >= 0 and frames[-1] < stored
    assert len(frames) == min(stored, count)


def test_key_frames_of_a_known_clip() -> None:
    assert choose_key_frames(30, 3) == [5, 15, 25]
    assert choose_key_frames(8, 1) == [4]
    assert choose_key_frames(2, 3) == [0, 1]


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("models") / "blip2")


def blip2_source(folder: Path, **more: Any) -> Blip2Captions:
    return Blip2Captions(**{"kind": "blip2", "model": str(folder), "max_new_tokens": 5, "batch_size": 3, **more})


CLIPS = [Clip("a", frames=7), Clip("b", frames=1), Clip("c", frames=5, width=32, height=40), Clip("d", frames=2)]


def test_blip2_captions_equal_one_frame_at_a_time_through_transformers(tmp_path: Path, blip2: Path) -> None:
    made = make_stage_outputs(tmp_path, CLIPS)
    rows = rows_of(run(made, blip2_source(blip2)))
    assert [(r["key"], r["frame"]) for r in rows] == [
        *[("a", 1), ("a", 3), ("a", 5)],
        ("b", 0),
        *[("c", 0), ("c", 2), ("c", 4)],
        *[("d", 0), ("d", 1)],
    ]
    processor = Blip2Processor.from_pretrained(blip2)
    model = Blip2ForConditionalGeneration.from_pretrained(blip2, dtype=torch.float32).eval()
    index = {r["key"]: r for r in read_table(made.index).to_pylist()}
    for row in rows:
        image = load_frame(made.tar, index[row["key"]], row["frame"])
        # The processor's own captioning prompt: placeholders and start token, no words.
        inputs = processor(images=image, text="", return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=5)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert row["caption"] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_blip2_captions_depend_on_the_picture(blip2: Path) -> None:
    captioner = Blip2Captioner(blip2_source(blip2), "cpu")
    rng = np.random.default_rng(0)
    flat = [np.full((20, 30, 3), level, np.uint8) for level in (0, 128, 255)]
    noisy = [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(5)]
    assert len(set(captioner.caption(captioner.prepare(flat + noisy)))) > 1


@pytest.mark.parametrize("more", [{"batch_size": 1}, {"batch_size": 64}])
def test_blip2_captions_do_not_depend_on_the_batch_size(tmp_path: Path, blip2: Path, more: dict[str, int]) -> None:
    made = make_stage_outputs(tmp_path, CLIPS)
    some, other = (
        run(made, blip2_source(blip2), name="x.parquet"),
        run(made, blip2_source(blip2, **more), name="y.parquet"),
    )
    assert rows_of(some) == rows_of(other)


@pytest.mark.parametrize("more", [{"beams": 3}, {"precision": "bfloat16"}])
def test_blip2_options_run(tmp_path: Path, blip2: Path, more: dict[str, Any]) -> None:
    rows = rows_of(run(make_stage_outputs(tmp_path, CLIPS), blip2_source(blip2, **more)))
    assert len(rows) == 9 and all(r["status"] == "ok" for r in rows)


def test_blip2_receipt_names_the_weights_but_no_path(tmp_path: Path, blip2: Path) -> None:
    receipt = read_receipt(run(make_stage_outputs(tmp_path, CLIPS[:1]), blip2_source(blip2)))
    assert receipt["model"] == {"model": "local:blip2", "weights_sha256": hash_weights(blip2)}
    assert receipt["settings"]["key_frames"] == 3 and "transformers" in receipt["versions"]
    assert str(blip2) not in str(receipt)


class Killed(BaseException):
    """Stands in for a kill of the process."""


def test_blip2_continues_after_a_kill_with_the_same_bytes(
    tmp_path: Path, blip2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, source = make_stage_outputs(tmp_path, CLIPS), blip2_source(blip2, batch_size=2)
    expected = run(made, source, name="whole.parquet").read_bytes()
    batches: list[int] = []
    caption = Blip2Captioner.caption

    def die_at_the_third(self: Blip2Captioner, pixels: torch.Tensor) -> list[str]:
        batches.append(len(pixels))
        if len(batches) == 3:
            raise Killed
        return caption(self, pixels)

    monkeypatch.setattr(Blip2Captioner, "caption", die_at_the_third)
    with pytest.raises(Killed):
        run(made, source, name="killed.parquet")
    assert not (made.folder / "killed.parquet").exists()
    again = run(made, source, name="killed.parquet")
    # Nine frames in batches of two: clips a and b lie in batches 1 and 2, which need no second run.
    assert batches == [2, 2, 2, 2, 2, 1]
    assert again.read_bytes() == expected
    assert not list(made.folder.glob(".*.journal"))


def test_a_journal_of_other_frames_is_not_used(tmp_path: Path, blip2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, batches = blip2_source(blip2, batch_size=2), iter(range(100))

    def caption_by_colour(self: Blip2Captioner, pixels: torch.Tensor) -> list[str]:
        if next(batches) == 2:
            raise Killed
        return [f"colour {image.sum()}" for image in pixels]

    monkeypatch.setattr(Blip2Captioner, "caption", caption_by_colour)
    with pytest.raises(Killed):
        run(make_stage_outputs(tmp_path / "x", CLIPS), source)
    assert list((tmp_path / "x").glob(".captions.parquet.journal/*"))
    resumed = run(make_stage_outputs(tmp_path / "x", CLIPS, seed=1), source)
    assert resumed.read_bytes() == run(make_stage_outputs(tmp_path / "y", CLIPS, seed=1), source).read_bytes()


def test_silent_key_frames_are_reported_and_a_silent_clip_fails(
    tmp_path: Path, blip2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_stage_outputs(tmp_path, [Clip("a", frames=3), Clip("b", frames=3)])
    captions = iter(["one", " ", "three", "", "", ""])
    monkeypatch.setattr(Blip2Captioner, "caption", lambda self, images: [next(captions) for _ in images])
    rows = rows_of(run(made, blip2_source(blip2)))
    assert [(r["key"], r["caption_index"], r["frame"], r["caption"], r["status"]) for r in rows] == [
        ("a", 0, 0, "one", "ok"),
        ("a", 1, 2, "three", "ok"),
        ("b", 0, -1, None, "caption_failed"),
    ]
    assert rows[0]["detail"] == "1 of 3 captions are empty: stored frame 1"
    assert "3 of 3 captions are empty" in rows[2]["detail"]


# --------------------------------------------------------------------------------------------------- language model


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("models") / "llm")


def llm_source(folder: Path, **more: Any) -> LanguageModelCaptions:
    values = {"kind": "llm", "model": str(folder), "prompts": ("describe {}", "what is the {} a"), "max_new_tokens": 4}
    return LanguageModelCaptions(**{**values, "batch_size": 3, **more})


def alone(folder: Path, prompt: str) -> str:
    """One prompt through transformers, without any padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=4
    )
    return " ".join(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split())


def test_language_model_answers_equal_each_prompt_alone(tmp_path: Path, language_model: Path) -> None:
    clips = [Clip("a", label="red_circle"), Clip("b", label="blue"), Clip("c", label=None), Clip("d", label="blue")]
    rows = rows_of(run(make_stage_outputs(tmp_path, clips), llm_source(language_model)))
    expected = [(key, alone(language_model, prompt)) for key, prompt in [
        ("a", "describe red circle"), ("a", "what is the red circle a"),
        ("b", "describe blue"), ("b", "what is the blue a"),
    ]]  # fmt: skip
    found = [(r["key"], r["caption"]) for r in rows]
    assert [f for f in found if f[0] in "ab"] == expected
    assert [c for k, c in found if k == "d"] == [c for k, c in expected if k == "b"]
    assert [(r["status"], r["caption"]) for r in rows if r["key"] == "c"] == [("caption_missing", None)]
    assert len({caption for _, caption in expected}) > 1  # the answers depend on the prompt


def test_language_model_is_asked_once_for_each_label(tmp_path: Path, language_model: Path) -> None:
    source = llm_source(language_model)
    model = LanguageModel(source, "cpu")
    asked: list[str] = []
    answer = model.answer
    model.answer = lambda prompts: asked.extend(prompts) or answer(prompts)  # type: ignore[method-assign]
    rows = [{"key": f"k{i}", "label": "red_circle" if i % 2 else "blue"} for i in range(6)]
    model.describe_clips(rows, Journal(tmp_path / "out", {}), "test")
    assert sorted(asked) == sorted(p.replace("{}", label) for label in ("red circle", "blue") for p in source.prompts)


def test_chat_template_is_used_when_there_is_one(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<s> the {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} moves{% endif %}"
    )
    folder = save_language_model(tmp_path / "chat", chat_template=template)
    model = LanguageModel(llm_source(folder), "cpu")
    tokens = model._tokenize(["red circle", "blue"])
    texts = model._tokenizer.batch_decode(tokens["input_ids"])
    assert texts == ["<s> the red circle moves", "<pad> <s> the blue moves"]  # one start token, padding on the left
    assert tokens["attention_mask"].tolist()[1][0] == 0


# ----------------------------------------------------------------------------------------------------- finding models


def test_a_mistyped_folder_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("./missing", "a/b/c", "/missing", "owner/"):
        with pytest.raises(ModelError, match="no such folder"):
            find_model(name)
    assert find_model("owner/name").folder is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name").folder == Path("owner/name")


def test_a_model_with_weights_missing_is_refused(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*layers\.1\.fc1\.weight"):
        LanguageModel(llm_source(folder))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded from the folder"):
        Blip2Captioner(blip2_source(tmp_path / "empty"))
