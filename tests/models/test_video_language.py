"""Encoder and BERT together: pooling and embedding by loops, matching by hand, files there and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_bert import CLIPS, TEXTS, WIDTH, ask, look, write_bert
from model_parts import disturb
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig

from stm.models.text.split_bert import SplitBert
from stm.models.video_language import EXTRA, VideoLanguageModel, load_video_language
from stm.models.vit import VideoEncoder
from stm.models.weights import zoo
from stm.pretrained.hub import ModelError


def make(folder: Path) -> VideoLanguageModel:
    """A small model with weights far from their initial ones, in eval mode."""
    write_bert(folder / "bert")
    torch.manual_seed(0)
    model = VideoLanguageModel(VideoEncoder(CLIPS), SplitBert.load(ask(folder / "bert")), embedding=16)
    disturb(model)
    return model


def save(model: VideoLanguageModel, path: Path) -> Path:
    zoo.save(model.encoder, path, extra={EXTRA: model.language_state()}, header={EXTRA: model.describe()})
    return path


def draw_clips(batch: int, frames: int = CLIPS.frames) -> Tensor:
    shape = (batch, frames, 3, CLIPS.image_size, CLIPS.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def project(values: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    """A linear layer and a division by the length, in numpy."""
    weight, bias = (parameter.detach().numpy() for parameter in (layer.weight, layer.bias))
    found = values @ weight.T + bias
    return found / np.linalg.norm(found)


def pool(tokens: np.ndarray, model: VideoLanguageModel) -> np.ndarray:
    mean = tokens.mean(axis=0)
    normed = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-6)
    return normed * model.pool_norm.weight.detach().numpy() + model.pool_norm.bias.detach().numpy()


def test_clips_frames_and_captions_become_unit_vectors_of_one_space(tmp_path: Path) -> None:
    model = make(tmp_path).double()
    seen, states = look(3, tokens=4 * 5), look(3, tokens=12)
    with torch.no_grad():
        video, frames, text = model.embed_video(seen), model.embed_frames(seen, 4), model.embed_text(states)
        alone = model.embed_frames(seen, 1)
    for row in range(3):
        tokens = seen[row].numpy()
        np.testing.assert_allclose(video[row], project(pool(tokens, model), model.video_projection), atol=1e-12)
        single = [project(pool(part, model), model.video_projection) for part in np.split(tokens, 4)]
        np.testing.assert_allclose(frames[row], np.mean(single, axis=0), atol=1e-12)
        np.testing.assert_allclose(text[row], project(states[row, 0].numpy(), model.text_projection), atol=1e-12)
        # UMT's similarity: the mean over frames of each frame's.
        similarity = np.mean([one @ text[row].numpy() for one in single])
        assert (frames[row] @ text[row]).item() == pytest.approx(similarity, abs=1e-12)
    torch.testing.assert_close(alone, video)
    assert (frames.norm(dim=1) < 1).all()
    with pytest.raises(ValueError, match="20 tokens are not divisible by 3 frames"):
        model.embed_frames(seen, 3)


def test_a_match_is_read_from_the_fused_first_token_and_hangs_on_both_sides(tmp_path: Path) -> None:
    model = make(tmp_path)
    tokens = model.language.tokenizer.encode(TEXTS, 12)
    with torch.no_grad():
        seen = model.encoder(draw_clips(len(TEXTS)))
        states = model.encode_text(tokens)
        logits = model.match(states, tokens, seen)
        fused = model.fuse(states, tokens, seen)
        by_hand = fused[:, 0] @ model.matching_head.weight.T + model.matching_head.bias
        torch.testing.assert_close(logits, by_hand)
        assert logits.shape == (4, 2) and model.predict_words(fused).shape == (4, 12, model.language.vocabulary)
        for order in (model.match(states, tokens, seen.flip(0)), model.match(states.flip(0), tokens.flip(0), seen)):
            assert ((order - logits).abs().amax(dim=1) > 1e-5).all()


def test_embeddings_are_float32_under_autocast(tmp_path: Path) -> None:
    model = make(tmp_path)
    tokens = model.language.tokenizer.encode(TEXTS, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen, states = model.encoder(draw_clips(4)), model.encode_text(tokens)
        for vectors in (model.embed_video(seen), model.embed_text(states), model.embed_frames(seen, 4)):
            assert vectors.dtype == torch.float32 and vectors.isfinite().all()
        assert model.match(states, tokens, seen).isfinite().all()


@pytest.mark.parametrize(("before", "after"), [(0.07, 0.07), (-3.0, 0.001), (0.9, 0.5)])
def test_the_temperature_is_held_between_its_bounds_and_keeps_its_gradient(
    tmp_path: Path, before: float, after: float
) -> None:
    model = VideoLanguageModel(VideoEncoder(CLIPS), tiny_bert(), 8, temperature=before)
    model.clamp_temperature()
    assert model.temperature.item() == pytest.approx(after)
    (1 / model.temperature).backward()
    assert model.temperature.grad is not None and model.temperature.grad.item() < 0


def tiny_bert(width: int = WIDTH) -> SplitBert:
    config = BertConfig(
        vocab_size=40, hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    return SplitBert(config, 1)


def test_a_bert_of_another_width_is_refused() -> None:
    with pytest.raises(ModelError, match=r"encoder is 48 wide and the BERT 64: .* bert-base-uncased, 768"):
        VideoLanguageModel(VideoEncoder(CLIPS), tiny_bert(64))


def run(model: VideoLanguageModel, frames: int = CLIPS.frames) -> list[Tensor]:
    """All that a model computes of a batch; tokens by its own tokenizer."""
    tokens = model.language.tokenizer.encode(TEXTS, 12)
    with torch.no_grad():
        seen, states = model.encoder(draw_clips(4, frames)), model.encode_text(tokens)
        fused = model.fuse(states, tokens, seen)
        embedded = [model.embed_video(seen), model.embed_frames(seen, frames), model.embed_text(states)]
        return [tokens, model.temperature, *embedded, model.match(states, tokens, seen), model.predict_words(fused)]


def test_a_file_gives_back_the_same_model(tmp_path: Path) -> None:
    model = make(tmp_path)
    path = save(model, tmp_path / "weights.safetensors")
    again = load_video_language(path)
    assert not again.training
    for found, expected in zip(run(again), run(model), strict=True):
        assert torch.equal(found, expected)
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert save(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert json.loads(json.dumps(model.describe())) == model.describe() == again.describe()
    # The encoder in it is one for all that reads encoders.
    assert torch.equal(zoo.load_encoder(path).norm.weight, model.encoder.norm.weight)


def test_a_file_is_read_for_clips_of_another_length(tmp_path: Path) -> None:
    model = make(tmp_path)
    path = save(model, tmp_path / "weights.safetensors")
    longer = load_video_language(path, drop_path=0.2, architecture=replace(CLIPS, frames=8))
    assert longer.encoder.architecture.frames == 8 and longer.encoder.positions.shape[1] == 8 * CLIPS.slot_tokens
    fresh = VideoEncoder(replace(CLIPS, frames=8)).eval()
    fresh.load_state_dict(model.encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(longer.encoder(draw_clips(2, 8)), fresh(draw_clips(2, 8)))
    assert run(longer, 8)[2].shape == (4, 16)


def test_a_model_without_a_tokenizer_comes_back_without_one(tmp_path: Path) -> None:
    model = VideoLanguageModel(VideoEncoder(CLIPS), tiny_bert(), 8)
    again = load_video_language(save(model, tmp_path / "weights.safetensors"))
    assert again.language.pad_id == 0
    with pytest.raises(ModelError, match="has no tokenizer"):
        _ = again.language.tokenizer


def rewrite(path: Path, target: Path, **changes: Any) -> Path:
    """The file with other words about the text side in its header; a dotted key reaches into a part."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[zoo.HEADER_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["sha256"]  # it is the header that is tested, not the sum over the file
    about = header["extra"][EXTRA]
    for key, value in changes.items():
        *parts, last = key.split("__")
        place = about
        for part in parts:
            place = place[part]
        place[last] = value
    save_file(tensors, target, {zoo.HEADER_KEY: json.dumps(header)})
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": 8}, r"has a 'language', but its weights do not fit: .* of the wrong shape: .*_projection"),
        ({"embedding": "wide"}, "does not describe a valid 'language' .*invalid embedding 'wide'"),
        ({"embedding": 2**40}, "invalid embedding 1099511627776"),
        ({"bert": None}, "does not describe a valid 'language'"),
        ({"bert__num_hidden_layers": 10**9}, "invalid num_hidden_layers"),
        ({"bert__vocab_size": 99}, "do not fit: .* of the wrong shape: .*word_bias"),
        ({"bert__hidden_act": "nothing"}, "does not describe a valid 'language'"),
        ({"bert__num_attention_heads": 5}, "does not describe a valid 'language'"),
        ({"fusion_layer": 4}, "do not fit: .*missing"),
        ({"fusion_layer": "x"}, "does not describe a valid 'language'"),
        ({"tokenizer__text": "{"}, "the tokenizer cannot be read"),
        ({"tokenizer": 3}, "does not describe a valid 'language'"),
    ],
)
def test_headers_that_do_not_fit_are_errors_that_name_the_file(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = rewrite(save(make(tmp_path), tmp_path / "good.safetensors"), tmp_path / "bad.safetensors", **changes)
    with pytest.raises(zoo.WeightsError, match=rf"bad\.safetensors.*{message}"):
        load_video_language(path)


def test_files_without_a_text_side_are_errors(tmp_path: Path) -> None:
    zoo.save(VideoEncoder(CLIPS), tmp_path / "encoder.safetensors")
    with pytest.raises(zoo.WeightsError, match=r"encoder\.safetensors holds no 'language'"):
        load_video_language(tmp_path / "encoder.safetensors")


@pytest.mark.slow
def test_clips_and_captions_are_one_graph(tmp_path: Path) -> None:
    model = make(tmp_path)
    tokens = model.language.tokenizer.encode(TEXTS, 12)

    def step(video: Tensor, kept: Tensor, tokens: Tensor) -> list[Tensor]:
        seen, states = model.encoder(video, kept), model.encode_text(tokens)
        words = model.predict_words(model.fuse(states, tokens, seen))
        return [model.embed_video(seen), model.embed_text(states), model.match(states, tokens, seen), words]

    kept = torch.arange(0, 4 * CLIPS.slot_tokens, 3).expand(4, -1)
    with torch.no_grad():
        found = torch.compile(step, fullgraph=True, backend="eager", dynamic=False)(draw_clips(4), kept, tokens)
        torch.testing.assert_close(found, step(draw_clips(4), kept, tokens))
