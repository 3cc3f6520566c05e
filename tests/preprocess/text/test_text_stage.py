"""The text stage: the same vectors as open_clip and transformers, and one pooling only for CLIP."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from small_models import CLIP_CONFIG, save_clip, save_text_encoder
from stage_outputs import Clip, StageOutputs, make_stage_outputs
from transformers import AutoTokenizer, BertModel, CLIPTextModelWithProjection, T5EncoderModel

from stm.config import BadInput, HumanCaptions, Text
from stm.manifest import TooManyFailures
from stm.preprocess.captions.write import CAPTIONS_SCHEMA, write_captions
from stm.preprocess.similarity.patch_scorer import PatchScorer
from stm.preprocess.text.encode import TEXT_SCHEMA, write_text
from stm.pretrained.clip import load_clip
from stm.pretrained.hub import ModelError
from stm.pretrained.local_files import hash_weights, local_model_files
from stm.pretrained.text_encoder import TextEncoder, TransformersText
from stm.storage.tables import read_receipt, read_table, write_rows

KEEP_GOING = BadInput(max_failure_rate=1.0)
# Of different lengths, so that a batch has padding.
TEXTS = ["a red circle", "blue square moves left the right what is the square", "right", "a blue circle moves"]
CLIPS = [
    Clip("a", captions=TEXTS[:2]),
    Clip("b", captions=[TEXTS[2], TEXTS[0]]),  # one of them occurs twice
    Clip("c/with.dots", captions=None),
    Clip("d", captions=[TEXTS[3]]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models: `open_clip`, and `clip`, `bert`, `t5` and `two-towers` of transformers."""
    folder = tmp_path_factory.mktemp("encoders")
    save_clip(folder / "open_clip")
    for kind in ("clip", "bert", "t5", "two-towers"):
        save_text_encoder(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StageOutputs:
    made = make_stage_outputs(tmp_path_factory.mktemp("shard"), CLIPS)
    source = HumanCaptions(kind="human")
    write_captions(made.slice, made.tar, made.index, made.folder / "captions.parquet", source, KEEP_GOING)
    return made


def choose(folder: Path, name: str, **more: Any) -> Text:
    prefix = "local-dir:" if name == "open_clip" else "transformers:"
    return Text(**{"model": f"{prefix}{folder / name}", "batch_size": 3, **more})


def encode(settings: Text, texts: list[str] = TEXTS) -> np.ndarray:
    return TextEncoder.load(settings, device="cpu").encode(texts)


def of_length_one(vector: torch.Tensor) -> np.ndarray:
    return (vector / vector.pow(2).sum().sqrt()).numpy()


# ----------------------------------------------------------------------------------------------------------- open_clip


@pytest.mark.parametrize("batch_size", [1, 3, 64, 300])
def test_clip_vectors_are_open_clips_own(folder: Path, batch_size: int) -> None:
    model = open_clip.CLIP(**CLIP_CONFIG).eval()
    model.load_state_dict(load_file(folder / "open_clip/open_clip_model.safetensors"))
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    found = encode(choose(folder, "open_clip", batch_size=batch_size))
    assert found.shape == (4, 16) and found.dtype == np.float32
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(vector, of_length_one(model.encode_text(tokenizer([text]))[0]), atol=2e-6)


def test_the_similarity_stage_has_the_same_vectors(folder: Path) -> None:
    scorer = PatchScorer(load_clip(f"local-dir:{folder / 'open_clip'}", device="cpu"), 4, 8)
    many = [f"{text} {number}" for number in range(40) for text in TEXTS]
    assert np.array_equal(encode(choose(folder, "open_clip", batch_size=64), many), scorer.embed_texts(many))
    np.testing.assert_allclose(encode(choose(folder, "open_clip"), many), scorer.embed_texts(many), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- transformers


def plain(folder: Path, name: str, pooling: str, text: str) -> np.ndarray:
    """One text by itself, without padding and without a mask."""
    kinds: dict[str, Any] = {"clip": CLIPTextModelWithProjection, "bert": BertModel, "t5": T5EncoderModel}
    model = kinds[name].from_pretrained(folder / name).eval()
    tokens = AutoTokenizer.from_pretrained(folder / name)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(tokens)
    if pooling == "projected":
        return of_length_one(found.text_embeds[0])
    hidden = found.last_hidden_state[0]
    return of_length_one(hidden[0] if pooling == "cls" else hidden.mean(dim=0))


@pytest.mark.parametrize(
    ("name", "pooling"), [("clip", "projected"), ("bert", "cls"), ("bert", "mean"), ("t5", "cls"), ("t5", "mean")]
)
def test_transformers_vectors_are_its_own_whatever_stands_beside_them(folder: Path, name: str, pooling: str) -> None:
    found = encode(choose(folder, name, pooling=pooling))
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(vector, plain(folder, name, pooling, text), atol=1e-5)
    assert np.std(found, axis=0).max() > 0.01  # texts differ by far more than the tolerance


def test_a_text_tower_in_a_whole_clip_is_found(folder: Path) -> None:
    found = encode(choose(folder, "two-towers"))
    model = CLIPTextModelWithProjection.from_pretrained(folder / "two-towers").eval()
    tokens = AutoTokenizer.from_pretrained(folder / "two-towers")(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        np.testing.assert_allclose(found[0], of_length_one(model(tokens).text_embeds[0]), atol=1e-5)


@pytest.mark.parametrize(("name", "pooling"), [("open_clip", "projected"), ("clip", "projected"), ("bert", "mean")])
def test_texts_longer_than_the_context_are_cut(folder: Path, name: str, pooling: str) -> None:
    long = " ".join(["red", "circle"] * 40)
    found = encode(choose(folder, name, pooling=pooling), [long, f"{long} blue"])
    assert np.array_equal(found[0], found[1])


def test_half_precision_stays_close(folder: Path) -> None:
    for name, pooling in (("open_clip", "projected"), ("clip", "projected"), ("bert", "mean")):
        full = encode(choose(folder, name, pooling=pooling))
        half = encode(choose(folder, name, pooling=pooling, precision="bfloat16"))
        assert half.dtype == np.float32 and 0 < np.abs(full - half).max() < 0.05


def test_no_texts_have_no_vectors_of_the_right_width(folder: Path) -> None:
    assert encode(choose(folder, "open_clip"), []).shape == (0, 16)
    assert encode(choose(folder, "clip"), []).shape == (0, 6)


def test_encoders_that_cannot_be_loaded_are_named(folder: Path, tmp_path: Path) -> None:
    for settings, message in (
        (choose(folder, "open_clip", pooling="mean"), "text.pooling 'mean' is for `transformers:` models"),
        (choose(folder, "bert"), "pooling `projected` is CLIP's, and this is a bert model; .* `cls` or `mean`"),
        (choose(folder, "two-towers", pooling="mean"), "is a clip model, not a text encoder; .*`projected`"),
        (Text(model="ViT-B32@openai"), "text.model 'ViT-B32@openai': open_clip has no architecture"),
        (Text(model="local-dir:nowhere"), "text.model 'local-dir:nowhere': nowhere has no open_clip_config"),
        (Text(model=f"transformers:{tmp_path}/none"), "no such folder"),
        (Text(model=f"transformers:{tmp_path}"), "cannot be loaded from the folder"),
    ):
        with pytest.raises(ModelError, match=message):
            TextEncoder.load(settings, device="cpu")


def test_vectors_that_are_not_finite_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder.load(choose(folder, "open_clip"), device="cpu")
    monkeypatch.setattr(encoder, "_encode", lambda texts: np.full((len(texts), 2), np.nan, np.float32))
    with pytest.raises(ModelError, match=r"set text\.precision to float32"):
        encoder.encode(["a"])


# ----------------------------------------------------------------------------------------------------------- the stage


@pytest.mark.parametrize(("name", "pooling"), [("open_clip", "projected"), ("bert", "mean")])
def test_each_clip_has_the_vectors_of_its_captions(
    made: StageOutputs, folder: Path, tmp_path: Path, name: str, pooling: str
) -> None:
    settings = choose(folder, name, pooling=pooling)
    write_text(made.folder / "captions.parquet", tmp_path / "text.parquet", settings, KEEP_GOING, device="cpu")
    table = read_table(tmp_path / "text.parquet")
    rows = {row["video_id"]: row for row in table.to_pylist()}
    assert table.schema.names == TEXT_SCHEMA.names and list(rows) == sorted(clip.video_id for clip in CLIPS)
    for clip in CLIPS:
        row = rows[clip.video_id]
        assert (row["key"], row["captions"], row["width"]) == (clip.key, clip.captions or [], 16)
        if clip.captions is None:
            assert (row["text"], row["status"], row["policy"]) == (None, "caption_missing", "drop")
            continue
        assert (row["status"], row["policy"], row["detail"]) == ("ok", "keep", "")
        found = np.array(row["text"], np.float32).reshape(-1, 16)
        np.testing.assert_allclose(found, encode(settings, clip.captions), atol=6e-4)  # half precision on the disk
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)


def test_a_caption_that_is_said_twice_is_encoded_once_and_the_bytes_are_the_same_again(
    made: StageOutputs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    kind = type(TextEncoder.load(choose(folder, "open_clip"), device="cpu"))
    inner = kind._encode
    monkeypatch.setattr(kind, "_encode", lambda self, texts: seen.append(texts) or inner(self, texts))
    for name in "xy":
        settings = choose(folder, "open_clip")
        write_text(made.folder / "captions.parquet", tmp_path / f"{name}.parquet", settings, KEEP_GOING, device="cpu")
    assert seen == 2 * [TEXTS[:3], TEXTS[3:]]  # batches are filled across clips
    assert (tmp_path / "x.parquet").read_bytes() == (tmp_path / "y.parquet").read_bytes()
    receipt = read_receipt(tmp_path / "x.parquet")
    assert receipt["model"] == {"model": "local-dir:open_clip", "weights_sha256": hash_weights(folder / "open_clip")}
    assert receipt["stage"] == "text" and str(folder) not in str(receipt)


def test_a_killed_job_goes_on_with_the_same_bytes(
    made: StageOutputs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, settings = made.folder / "captions.parquet", choose(folder, "bert", pooling="mean", batch_size=2)
    write_text(captions, tmp_path / "whole.parquet", settings, KEEP_GOING, device="cpu")
    calls, inner = [], TransformersText._encode

    def die_at_the_second(self: TransformersText, texts: list[str]) -> np.ndarray:
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, texts)

    monkeypatch.setattr(TransformersText, "_encode", die_at_the_second)
    output = tmp_path / "killed.parquet"
    with pytest.raises(KeyboardInterrupt):
        write_text(captions, output, settings, KEEP_GOING, device="cpu")
    assert not output.exists()
    write_text(captions, output, settings, KEEP_GOING, device="cpu")
    assert calls == [TEXTS[:2], TEXTS[2:], TEXTS[2:]]  # the first batch is not encoded again
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not list(tmp_path.glob(".*.journal"))


def test_a_transformers_model_is_named_by_its_hash(made: StageOutputs, folder: Path, tmp_path: Path) -> None:
    captions = made.folder / "captions.parquet"
    write_text(captions, tmp_path / "text.parquet", choose(folder, "clip"), KEEP_GOING, device="cpu")
    receipt = read_receipt(tmp_path / "text.parquet")
    expected = {"model": "transformers:local:clip", "weights_sha256": hash_weights(folder / "clip")}
    assert receipt["model"] == expected and str(folder) not in str(receipt)
    named = local_model_files(f"transformers:{folder / 'clip'}")
    assert named == local_model_files(str(folder / "clip")) != []


def test_too_many_clips_without_a_caption_stop_the_stage_after_the_table_is_written(
    folder: Path, tmp_path: Path
) -> None:
    made = make_stage_outputs(tmp_path, [Clip(f"c{n}", captions=None) for n in range(9)])
    captions, output = tmp_path / "captions.parquet", tmp_path / "text.parquet"
    write_captions(made.slice, made.tar, made.index, captions, HumanCaptions(kind="human"), KEEP_GOING)
    with pytest.raises(TooManyFailures, match="caption_missing"):
        write_text(captions, output, choose(folder, "open_clip"), BadInput(), device="cpu")
    rows = read_table(output).to_pylist()
    assert len(rows) == 9 and all(row["text"] is None and row["width"] == 16 for row in rows)


def test_damaged_captions_give_a_message(made: StageOutputs, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions.parquet"
    path.write_bytes((made.folder / "captions.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"captions\.parquet: cannot be read"):
        write_text(path, tmp_path / "text.parquet", choose(folder, "open_clip"), KEEP_GOING, device="cpu")
    with pytest.raises(ValueError, match="has 0 columns `caption_index`"):
        write_text(made.motion, tmp_path / "text.parquet", choose(folder, "open_clip"), KEEP_GOING, device="cpu")
    names = {"key": "a", "video_id": "a", "caption_index": 0, "frame": -1, "caption": None}
    odd = {**names, "status": "ok", "policy": "keep", "detail": ""}
    write_rows(path, CAPTIONS_SCHEMA, [odd], {}, group=1)
    with pytest.raises(ValueError, match="clip 'a' is `ok` without a caption"):
        write_text(path, tmp_path / "text.parquet", choose(folder, "open_clip"), KEEP_GOING, device="cpu")


def test_an_encoder_that_tells_no_caption_from_another_is_refused(
    made: StageOutputs, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the first token of a causal model, which attends to nothing of the text."""
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: np.ones((len(texts), 4), np.float32) / 2)
    captions = made.folder / "captions.parquet"
    with pytest.raises(ModelError, match="all 4 captions get the same vector"):
        write_text(captions, tmp_path / "t.parquet", choose(folder, "open_clip"), KEEP_GOING, device="cpu")
