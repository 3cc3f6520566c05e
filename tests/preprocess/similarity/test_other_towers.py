"""Similarity and text vectors with open_clip models that pool otherwise than OpenAI's: SigLIP, average pooling, CoCa, CNNs."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import make_tokenizer
from small_open_clips import CONFIGS, save_open_clip
from stage_outputs import Clip, make_stage_outputs
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision
from transformers import SiglipTextConfig, SiglipTextModel

from stm.config import BadInput, HumanCaptions, Similarity, Text
from stm.preprocess.captions.write import write_captions
from stm.preprocess.frames.table import load_frame
from stm.preprocess.similarity.dense_scorer import check_tower
from stm.preprocess.similarity.patch_scorer import PatchScorer
from stm.preprocess.similarity.score import load_scorer, write_similarity
from stm.pretrained.clip import load_clip
from stm.pretrained.hub import ModelError
from stm.pretrained.sizes import clip_image_flops, clip_tower, refused_by_dense
from stm.pretrained.text_encoder import TextEncoder
from stm.storage.tables import read_table

GRID, PATCH = 4, 8
FRAME = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)  # cells of 8 x 8 pixels
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")

    def find(kind: str) -> str:
        return f"local-dir:{folder / kind if (folder / kind).exists() else save_open_clip(folder / kind, kind)}"

    return find


@pytest.fixture(scope="module")
def scorer_of(saved: Callable[[str], str]) -> Callable[[str], PatchScorer]:
    return cache(lambda kind: load_scorer(Similarity(model=saved(kind), batch_size=7), GRID, "cpu"))


def normal(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    large = vision.resize(pixels.float(), [height, width], vision.InterpolationMode.BICUBIC, antialias=True)
    return (large.clamp(0, 255) / 255 - MEAN) / STD


def plain_head(trunk: Any, tokens: torch.Tensor) -> torch.Tensor:
    """SigLIP's pooling head, by its formula: tokens [N, D] -> [D]."""
    head = trunk.attn_pool
    heads, (count, width) = head.num_heads, tokens.shape
    query = (head.q.weight @ head.latent[0, 0] + head.q.bias).view(heads, -1)
    key, value = (tokens @ head.kv.weight.T + head.kv.bias).view(count, 2, heads, -1).unbind(1)
    attention = torch.einsum("hd,nhd->hn", query, key).div((width // heads) ** 0.5).softmax(-1)
    mixed = head.proj.weight @ torch.einsum("hn,nhd->hd", attention, value).flatten() + head.proj.bias
    hidden = functional.gelu(
        head.mlp.fc1(functional.layer_norm(mixed, (width,), head.norm.weight, head.norm.bias, 1e-6))
    )
    return mixed + head.mlp.fc2(hidden)


def plain_siglip(model: Any, pixels: torch.Tensor, alone: bool) -> torch.Tensor:
    """SigLIP's embedding of an image, [D], or those of its tokens, each of which the head sees alone: [N, D]."""
    trunk = model.visual.trunk
    rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
    table = trunk.pos_embed[0].T.reshape(1, -1, 3, 3)
    positions = functional.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
    states = functional.conv2d(pixels[None], trunk.patch_embed.proj.weight, trunk.patch_embed.proj.bias, stride=PATCH)
    states = (states + positions).flatten(2).transpose(1, 2)
    for block in trunk.blocks:
        states = block(states)
    tokens = trunk.norm(states)[0]
    return torch.stack([plain_head(trunk, token[None]) for token in tokens]) if alone else plain_head(trunk, tokens)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_patches_have_the_embeddings_of_images(kind: str, scorer_of: Callable[[str], PatchScorer]) -> None:
    scorer = scorer_of(kind)
    found = scorer.embed_frames([FRAME])[0]
    pixels, (height, width) = torch.from_numpy(FRAME).permute(2, 0, 1), scorer.clip.image_size
    assert found.shape[:2] == (4, 6) and found.std((0, 1)).max() > 0.01
    for row, column in ((0, 0), (3, 5), (2, 1)):
        cell = pixels[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
        image = normal(cell, height, width)
        expected = (
            plain_siglip(scorer.clip.model, image, False) if kind == "siglip" else scorer.clip.model.visual(image[None])
        )
        # CoCa's tower returns its tokens, too.
        expected = (expected[0] if isinstance(expected, tuple) else expected).flatten()
        np.testing.assert_allclose(found[row, column], functional.normalize(expected, dim=0), atol=2e-3)


@torch.no_grad()
def test_dense_embeddings_of_siglip_are_those_of_tokens_shown_to_its_head_alone(saved: Callable[[str], str]) -> None:
    scorer = load_scorer(Similarity(model=saved("siglip"), method="dense", batch_size=48), GRID, "cpu")
    found = scorer.embed_frames([FRAME, FRAME[::-1].copy()])
    image = normal(torch.from_numpy(FRAME).permute(2, 0, 1), 4 * PATCH, 6 * PATCH)
    expected = functional.normalize(plain_siglip(scorer.clip.model, image, True), dim=-1).reshape(4, 6, -1)
    assert found.shape == (2, 4, 6, 32)
    np.testing.assert_allclose(found[0], expected, atol=2e-3)
    assert expected.std((0, 1)).max() > 0.05  # far above the tolerance


@pytest.mark.parametrize(
    ("kind", "words"),
    [("coca", "a ViT with an attention pooler"), ("resnet", "a ModifiedResNet"), ("convnext", "timm's ConvNeXt")],
)
def test_dense_refuses_towers_whose_tokens_are_not_in_the_joint_space(
    kind: str, words: str, saved: Callable[[str], str], scorer_of: Callable[[str], PatchScorer]
) -> None:
    with pytest.raises(ModelError, match=f"similarity.model has {words}"):
        check_tower(scorer_of(kind).clip.model.visual)
    assert refused_by_dense(saved(kind))  # and so does a dry run
    assert refused_by_dense(saved("siglip")) is None and refused_by_dense("ViT-SO400M-14-SigLIP2@webli") is None


@torch.no_grad()
def test_siglip_s_texts_are_lower_case_padded_and_pooled_at_the_last_position(saved: Callable[[str], str]) -> None:
    model = load_clip(saved("siglip"), device="cpu")
    encoder = TextEncoder.load(Text(model=saved("siglip")), "cpu")
    found = encoder.encode(["A red CIRCLE, moves!", "a red circle moves", "the blue square"])
    tower = model.model.text
    ids = [model.tokenizer.tokenizer.convert_tokens_to_ids(word) for word in ("a", "red", "circle", "moves")]
    padded = torch.tensor([*ids, 1, *[0] * 7])  # </s> and padding up to the context of 12
    states = (tower.token_embedding.weight[padded] + tower.positional_embedding)[None]
    states = tower.transformer(states)  # no mask: padding is attended, as in training
    expected = tower.text_projection(tower.ln_final(states)[0, -1])
    np.testing.assert_allclose(found[0], functional.normalize(expected, dim=0), atol=1e-5)
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0] @ found[2] < 0.999


@pytest.mark.parametrize("method", ["patches", "dense"])
def test_maps_of_siglip_are_cosines_of_patches_and_captions(
    method: Any, saved: Callable[[str], str], tmp_path: Path
) -> None:
    clips = [Clip("a", frames=2, captions=["a red circle", "the blue square"]), Clip("b", captions=["a square"])]
    made, bad_input = make_stage_outputs(tmp_path, clips, GRID), BadInput()
    captions, output = tmp_path / "captions.parquet", tmp_path / "similarity.parquet"
    write_captions(made.slice, made.tar, made.index, captions, HumanCaptions(kind="human"), bad_input)
    settings = Similarity(model=saved("siglip"), method=method, batch_size=16)
    write_similarity(made.tar, made.index, captions, output, settings, GRID, bad_input, device="cpu")
    first = read_table(output).to_pylist()[0]
    maps = np.array(first["similarity"], np.float32).reshape(2, 2, 4, 5)
    texts = TextEncoder.load(Text(model=saved("siglip")), "cpu").encode(first["captions"])
    row = read_table(made.index).to_pylist()[0]
    frames = [load_frame(made.tar, row, number) for number in range(2)]
    patches = load_scorer(settings, GRID, "cpu").embed_frames(frames).astype(np.float32)
    np.testing.assert_allclose(maps, np.einsum("kd,trcd->ktrc", texts, patches), atol=2e-3)
    assert maps.std() > 0.01


def test_a_folder_without_its_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_open_clip(tmp_path / "siglip", "siglip")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"siglip has no tokenizer files, which its open_clip_config.json asks for"):
        load_clip(f"local-dir:{folder}", device="cpu")


def test_siglip_of_transformers_is_refused_as_a_text_encoder(tmp_path: Path) -> None:
    config = SiglipTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    SiglipTextModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"SigLIP's text tower.*is read by open_clip"):
        TextEncoder.load(Text(model=f"transformers:{tmp_path}", pooling="mean"), "cpu")


def test_siglip_s_size_is_known_before_its_weights_are_there() -> None:
    # Parameters of the image towers' blocks: of the papers' SO400M (428 million, with a narrower MLP) and of ViT-L (304 million).
    large, so400m = clip_tower("ViT-L-16-SigLIP2-256@webli"), clip_tower("ViT-SO400M-14-SigLIP2@webli")
    assert large is not None and so400m is not None
    assert large.weights == pytest.approx(304e6, rel=0.02) and so400m.weights == pytest.approx(428e6, rel=0.05)
    assert clip_image_flops("ViT-L-16-SigLIP2-256@webli") > 3 * clip_image_flops("ViT-B-16-SigLIP2-256@webli")
