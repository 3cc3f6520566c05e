"""Captions by vision-language models, compared with transformers' own pipeline and with prompts written by hand."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from small_models import save_blip2, save_clip
from small_vlms import save_vlm
from stage_outputs import Clip, StageOutputs, make_stage_outputs
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.video_utils import VideoMetadata

from stm.config import BadInput, Pack, Similarity, VisionLanguageCaptions
from stm.preprocess.captions.vision_language import Question, VisionLanguageModel, _without_reasoning
from stm.preprocess.captions.write import write_captions
from stm.preprocess.frames.table import load_frame
from stm.preprocess.packing.pack import pack_shard
from stm.preprocess.similarity.score import write_similarity
from stm.pretrained.hub import ModelError
from stm.pretrained.local_files import hash_weights
from stm.storage.tables import read_receipt, read_table

KINDS = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "idefics3")
PROMPTS = ("describe the video", "what is a red circle left of the blue square ?")
# Numbers of frames and sizes that batches must mix; frames are shown at the centres of two segments.
CLIPS = [Clip("a", frames=7), Clip("b", frames=1), Clip("c", frames=5, width=32, height=40), Clip("d", frames=2)]
SHOWN = {"a": [1, 5], "b": [0], "c": [1, 3], "d": [0, 1]}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def find(kind: str) -> Path:
        return folder / kind if (folder / kind).exists() else save_vlm(folder / kind, kind)

    return find


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StageOutputs:
    return make_stage_outputs(tmp_path_factory.mktemp("shard"), CLIPS)


def make_source(folder: Path, **more: Any) -> VisionLanguageCaptions:
    values: dict[str, Any] = {
        "kind": "vlm",
        "model": str(folder),
        "prompts": PROMPTS,
        "frames": 2,
        "batch_size": 3,
        "max_new_tokens": 5,
    }
    return VisionLanguageCaptions(**values | more)


def run(made: StageOutputs, source: VisionLanguageCaptions, output: Path) -> list[dict[str, Any]]:
    write_captions(made.slice, made.tar, made.index, output, source, BadInput(max_failure_rate=1.0), device="cpu")
    return read_table(output).to_pylist()


def read_frames(made: StageOutputs, key: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    row = next(row for row in read_table(made.index).to_pylist() if row["key"] == key)
    return [load_frame(made.tar, row, frame) for frame in SHOWN[key]], row


def captions_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], str]:
    """Captions by clip, prompt and frame (-1: the whole clip); null for empty ones is left out."""
    return {(row["key"], row["caption_index"], row["frame"]): row["caption"] for row in rows}


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_captioned_as_by_the_pipeline_one_clip_at_a_time(
    kind: str, vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path
) -> None:
    rows = run(made, make_source(vlm(kind), input="images"), tmp_path / "captions.parquet")
    generate: Any = pipeline("image-text-to-text", model=str(vlm(kind)), device="cpu")
    expected = {}
    for key in SHOWN:
        images = [{"type": "image", "image": Image.fromarray(frame)} for frame in read_frames(made, key)[0]]
        for number, prompt in enumerate(PROMPTS):
            chat = [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]
            answer = generate(
                text=chat, return_full_text=False, generate_kwargs={"do_sample": False, "max_new_tokens": 5}
            )
            expected[key, number, -1] = plain(answer[0]["generated_text"])
    assert captions_of(rows) == expected
    assert len(set(expected.values())) > 3  # they depend on frames and prompts


def greedy(model: Any, inputs: dict[str, Any], tokenizer: Any, steps: int = 5) -> str:
    """Greedy search without transformers' `generate` and without a cache."""
    tokens, start = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(steps):
        more = (
            {"mm_token_type_ids": torch.nn.functional.pad(kinds, (0, tokens.shape[1] - start))}
            if (kinds := inputs.get("mm_token_type_ids")) is not None
            else {}
        )
        fixed = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", *more)}
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **fixed, **more).logits
        best = logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
        if best.item() == tokenizer.eos_token_id:
            break
    return plain(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_videos_are_captioned_as_by_hand_with_the_times_of_their_frames(
    kind: str, vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path
) -> None:
    rows = run(made, make_source(vlm(kind)), tmp_path / "captions.parquet")
    processor = AutoProcessor.from_pretrained(vlm(kind))
    model = AutoModelForImageTextToText.from_pretrained(vlm(kind)).eval()
    mark = "<video>" if kind == "llava_onevision" else "<|vision_start|> <|video_pad|> <|vision_end|>"
    expected = {}
    for key in SHOWN:
        frames, row = read_frames(made, key)
        shown = SHOWN[key]
        if len(frames) == 1 and kind != "llava_onevision":  # Qwen's models read frames in pairs
            frames, shown = frames * 2, shown * 2
        # The interval between frames is constant, so that stored frames are the frames of a slower video.
        fps = 1 / row["pts"][1] if len(row["pts"]) > 1 else 1
        for number, prompt in enumerate(PROMPTS):
            metadata = VideoMetadata(total_num_frames=len(row["pts"]), fps=fps, frames_indices=list(shown))
            inputs = processor(
                text=[f"user {mark} {prompt} assistant "],
                videos=[[np.stack(frames)]],
                video_metadata=[metadata],
                do_sample_frames=False,
                return_tensors="pt",
            )
            expected[key, number, -1] = greedy(model, inputs, processor.tokenizer)
    assert captions_of(rows) == expected
    assert len(set(expected.values())) > 3


def test_key_frames_are_captioned_one_at_a_time(vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path) -> None:
    source = make_source(vlm("idefics3"), input="key_frames", prompts=PROMPTS[:1])
    rows = run(made, source, tmp_path / "captions.parquet")
    assert [(row["key"], row["frame"]) for row in rows] == [(key, frame) for key in SHOWN for frame in SHOWN[key]]
    # One image of each clip alone, as a source with a single frame.
    alone = run(
        made, make_source(vlm("idefics3"), input="images", prompts=PROMPTS[:1], frames=1), tmp_path / "one.parquet"
    )
    assert rows[2]["caption"] == alone[1]["caption"]  # of clip b, which has a single frame
    assert len({row["caption"] for row in rows}) > 1


@pytest.mark.parametrize(
    ("kind", "given"), [("qwen3_vl", "video"), ("llava_onevision", "images"), ("idefics3", "images")]
)
def test_captions_do_not_depend_on_the_batch(
    kind: str, given: str, vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path
) -> None:
    one, many = (
        run(made, make_source(vlm(kind), input=given, batch_size=size), tmp_path / f"{size}.parquet")
        for size in (1, 64)
    )
    assert one == many


def test_times_reach_the_prompt(vlm: Callable[[str], Path]) -> None:
    model = VisionLanguageModel(make_source(vlm("qwen3_vl")), "cpu")
    frames = [np.zeros((32, 40, 3), np.uint8)] * 4
    [group] = model.prepare([Question(frames, [0.0, 0.5, 2.04, 7.96], 8.0, "describe")])
    text = model._processor.tokenizer.decode(group.inputs["input_ids"][0])
    # Of a word-level vocabulary without numbers only their places are left.
    assert text.count("<unk>") == 2 * 2 and text.endswith("describe assistant")


def test_batches_are_padded_on_the_left_and_group_clips_with_as_many_frames(vlm: Callable[[str], Path]) -> None:
    model = VisionLanguageModel(make_source(vlm("llava_onevision")), "cpu")
    frame = np.zeros((32, 40, 3), np.uint8)
    asked = [
        Question([frame] * count, [0.0] * count, 1.0, prompt) for count, prompt in ((2, PROMPTS[0]), (1, "a"), (2, "a"))
    ]
    groups = model.prepare(asked)
    assert [group.positions for group in groups] == [[0, 2], [1]]
    mask = groups[0].inputs["attention_mask"]
    assert mask[0].all() and mask[1].tolist() == [0, 0] + [1] * (mask.shape[1] - 2)
    assert len(model.answer(groups)) == 3


def test_captions_are_scored_and_packed(vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path) -> None:
    rows = run(made, make_source(vlm("llava_onevision")), tmp_path / "captions.parquet")
    settings, maps = Similarity(model=f"local-dir:{save_clip(tmp_path / 'clip')}"), tmp_path / "maps.parquet"
    write_similarity(made.tar, made.index, tmp_path / "captions.parquet", maps, settings, 4, BadInput(), device="cpu")
    shard, pack = tmp_path / "shard.tar", Pack(captions="vlm", similarity=True, motion=False)
    captions = {"vlm": tmp_path / "captions.parquet"}
    arrays = {"similarity": {"vlm": maps}}
    parts = (made.slice, made.tar, made.index, captions, arrays)
    pack_shard(*parts, shard, tmp_path / "shard.parquet", pack, 4, BadInput())
    with tarfile.open(shard) as packed:
        files = {name: packed.extractfile(name) for name in packed.getnames()}
        described = {name: json.load(file) for name, file in files.items() if name.endswith(".json") and file}
        scores = {
            name: np.load(io.BytesIO(file.read())) for name, file in files.items() if "similarity" in name and file
        }
    assert len(described) == len(scores) == len(CLIPS)
    for clip in CLIPS:
        texts = [row["caption"] for row in rows if row["key"] == clip.key]
        assert described[f"{clip.key}.json"]["captions"] == texts and len(texts) == 2
        assert scores[f"{clip.key}.similarity.npy"].shape[:2] == (2, clip.frames)


class Killed(BaseException):
    """Stands in for a kill of the process."""


def test_a_killed_job_continues_with_the_same_bytes(
    vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(vlm("llava_onevision"), batch_size=2)
    run(made, source, tmp_path / "whole.parquet")
    answer, batches = VisionLanguageModel.answer, iter(range(100))

    def die(self: VisionLanguageModel, groups: Any) -> list[str]:
        if next(batches) == 2:
            raise Killed
        return answer(self, groups)

    monkeypatch.setattr(VisionLanguageModel, "answer", die)
    with pytest.raises(Killed):
        run(made, source, tmp_path / "killed.parquet")
    run(made, source, tmp_path / "killed.parquet")
    assert next(batches) == 3 + 2  # two clips of four are in the journal, with both prompts in one batch
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_the_receipt_names_weights_and_template_and_no_path(
    vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path
) -> None:
    folder = save_vlm(tmp_path / "model", "llava_onevision")
    run(made, make_source(folder, max_new_tokens=1), tmp_path / "one.parquet")
    receipt = read_receipt(tmp_path / "one.parquet")
    assert receipt["model"] == {"model": "local:model", "weights_sha256": hash_weights(folder)}
    assert "torchvision" in receipt["versions"] and str(tmp_path) not in str(receipt)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    run(made, make_source(folder, max_new_tokens=1), tmp_path / "two.parquet")
    assert read_receipt(tmp_path / "two.parquet")["model"] != receipt["model"]


def test_settings_of_the_template_and_the_processor_are_applied(vlm: Callable[[str], Path]) -> None:
    question = Question([np.zeros((64, 64, 3), np.uint8)], [0.0], 1.0, "describe")
    source = make_source(vlm("qwen2_5_vl"), input="images")
    more = {"template": {"thinking": True}, "processor": {"size": {"shortest_edge": 784, "longest_edge": 4 * 784}}}
    plain_text, other = (
        VisionLanguageModel(s, "cpu").prepare([question])[0].inputs["input_ids"][0]
        for s in (source, source.model_copy(update=more))
    )
    tokenizer = AutoProcessor.from_pretrained(vlm("qwen2_5_vl")).tokenizer
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tokenizer.decode(other).endswith("assistant <think>") and "<think>" not in tokenizer.decode(plain_text)
    assert ((plain_text == image).sum(), (other == image).sum()) == (4, 4)


def test_settings_that_a_model_brings_along_do_not_change_how_it_is_asked(
    vlm: Callable[[str], Path], made: StageOutputs, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(vlm("idefics3"), tmp_path / "model"))
    expected = run(made, make_source(folder, input="images"), tmp_path / "captions.parquet")
    path = folder / "generation_config.json"
    settings = {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True, "max_length": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert run(made, make_source(folder, input="images"), tmp_path / "other.parquet") == expected


@pytest.mark.parametrize(
    ("prompt", "answer", "caption"),
    [
        ("describe", "a red circle", "a red circle"),
        ("describe", "<think>what is it</think>\na red circle", "\na red circle"),
        ("describe <think>\n", "what is it</think> a red circle", " a red circle"),
        ("describe <think>\n", "what is it, and", ""),
        ("describe", "<think> what is", ""),
    ],
)
def test_reasoning_is_not_part_of_a_caption(prompt: str, answer: str, caption: str) -> None:
    assert _without_reasoning(prompt, answer) == caption


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("idefics3", {}, "takes no videos; set input to `images`"),
        (
            "idefics3",
            {"input": "images", "processor": {"max_side": 3}},
            "no setting 'max_side'; it has .*do_image_splitting",
        ),
        ("qwen2_5_vl", {"template": {"enable_thinking": False}}, "no variable 'enable_thinking'"),
        ("qwen2_5_vl", {"revision": "main"}, "a local folder, which has no revisions"),
        ("qwen2_5_vl", {"prompts": ["what <|image_pad|> is"]}, r"contains <\|image_pad\|>, which stands for an image"),
        ("llava_onevision", {"input": "images", "prompts": ["is", "a <video> ?"]}, "'a <video> [?]' contains <video>"),
    ],
)
def test_what_a_model_does_not_take_is_refused(
    kind: str, more: dict[str, Any], message: str, vlm: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        VisionLanguageModel(make_source(vlm(kind), **more), "cpu")


def test_models_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no chat template.*kind `blip2`"):
        VisionLanguageModel(make_source(save_blip2(tmp_path / "blip2"), input="images"), "cpu")


def test_a_hub_model_is_loaded_at_its_revision_and_never_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(**arguments: Any) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"'owner/model' cannot be loaded from the hub.*no network"):
        VisionLanguageModel(make_source(Path("owner/model"), revision="0a1b2c"), "cpu")
    assert asked[0]["revision"] == "0a1b2c" and asked[0]["trust_remote_code"] is False


def test_the_config_refuses_settings_of_frames() -> None:
    with pytest.raises(ValidationError, match=r"processor\.fps is set by this stage"):
        make_source(Path("owner/model"), processor={"fps": 2})
