"""`similarity.method: dense`, against the formulas of MaskCLIP written out token by token."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from small_models import CLIP_CONFIG, NORMALISATION, save_clip
from stage_outputs import Clip, StageOutputs, make_stage_outputs
from torchvision.transforms.v2 import functional as vision

from stm.config import BadInput, ConfigError, HumanCaptions, Similarity, parse_config
from stm.preprocess.captions.write import write_captions
from stm.preprocess.similarity.dense_scorer import DenseScorer, check_tower
from stm.preprocess.similarity.patch_scorer import PatchScorer
from stm.preprocess.similarity.score import load_scorer, write_embeddings, write_similarity
from stm.pretrained.clip import LoadedClip
from stm.pretrained.hub import ModelError
from stm.storage.tables import DamagedError, read_receipt

GRID = 4
PATCH = 8
FRAMES = list(np.random.default_rng(0).integers(0, 256, (5, 37, 53, 3), dtype=np.uint8))  # maps of 4 x 6


def made_clip(seed: int = 0, **vision_cfg: Any) -> LoadedClip:
    """A small CLIP with random weights, some of whose features are switched on."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**{**CLIP_CONFIG, "vision_cfg": {**CLIP_CONFIG["vision_cfg"], **vision_cfg}}).eval()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mean, std = ((values[0], values[1], values[2]) for values in (NORMALISATION["mean"], NORMALISATION["std"]))
    return LoadedClip(model, None, (24, 24), mean, std, torch.float32, torch.device("cpu"), {})


def plain_norm(norm: Any, token: torch.Tensor) -> torch.Tensor:
    spread = ((token - token.mean()) ** 2).mean()
    return norm.weight * (token - token.mean()) / (spread + norm.eps) ** 0.5 + norm.bias


def plain_value(block: Any, token: torch.Tensor) -> torch.Tensor:
    """The value of one token, through the output projection, with whatever the block's kind has on the way."""
    attention, width = block.attn, len(token)
    value = attention.in_proj_weight[2 * width :] @ plain_norm(block.ln_1, token) + attention.in_proj_bias[2 * width :]
    if getattr(attention, "head_scale", None) is not None:
        heads = value.reshape(len(attention.head_scale), -1)
        value = torch.stack([scale * head for scale, head in zip(attention.head_scale, heads, strict=True)]).flatten()
    if isinstance(getattr(attention, "ln_inner", None), torch.nn.LayerNorm):
        value = plain_norm(attention.ln_inner, value)
    value = attention.out_proj.weight @ value + attention.out_proj.bias
    if isinstance(getattr(block, "ln_attn", None), torch.nn.LayerNorm):
        value = plain_norm(block.ln_attn, value)
    return value * getattr(block.ls_1, "gamma", 1.0)


def plain_embeddings(clip: LoadedClip, frame: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[rows, columns, D] of one frame, token by token."""
    tower = clip.model.visual
    large = vision.resize(
        torch.from_numpy(frame).permute(2, 0, 1).float(),
        [rows * PATCH, columns * PATCH],
        vision.InterpolationMode.BICUBIC,
        antialias=True,
    ).clamp(0, 255)
    mean, std = (torch.tensor(NORMALISATION[name]).view(3, 1, 1) for name in ("mean", "std"))
    normal = (large / 255 - mean) / std
    own = tower.positional_embedding[1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    positions = torch.nn.functional.interpolate(own, size=(rows, columns), mode="bicubic", align_corners=False)[0]
    tokens = [tower.class_embedding + tower.positional_embedding[0]]
    for r, c in np.ndindex(rows, columns):
        pixels = normal[:, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)]
        tokens.append((tower.conv1.weight * pixels).sum((1, 2, 3)) + positions[:, r, c])
    states = torch.stack([plain_norm(tower.ln_pre, token) for token in tokens])
    for block in tower.transformer.resblocks[:-1]:  # unchanged, as open_clip runs them
        states = block(states[None])[0]
    found = []
    for token in states[1:]:
        value = plain_norm(tower.ln_post, plain_value(tower.transformer.resblocks[-1], token)) @ tower.proj
        found.append((value / (value**2).sum() ** 0.5).numpy())
    return np.stack(found).reshape(rows, columns, -1)


KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "layer scale": {"ls_init_value": 0.5},
    "custom blocks": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_are_those_of_maskclip_token_by_token(kind: str) -> None:
    clip = made_clip(**KINDS[kind])
    found = DenseScorer(clip, GRID, 48).embed_frames(FRAMES[:2])  # two frames per pass
    assert found.shape == (2, 4, 6, 16) and found.dtype == np.float16
    expected = np.stack([plain_embeddings(clip, frame, 4, 6) for frame in FRAMES[:2]])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert expected.std((1, 2)).max() > 0.05  # far above the tolerance


@torch.no_grad()
def test_frames_of_one_color_have_the_embeddings_of_their_patches() -> None:
    """If all tokens are equal, attention returns their value; large values drown what else the last block adds."""
    clip = made_clip()
    tower = clip.model.visual
    frame = np.full((32, 40, 3), (200, 30, 90), np.uint8)
    color = (torch.tensor([200, 30, 90]) / 255 - torch.tensor(NORMALISATION["mean"])) / torch.tensor(
        NORMALISATION["std"]
    )
    tower.class_embedding.copy_((tower.conv1.weight * color.view(1, 3, 1, 1)).sum((1, 2, 3)))
    tower.positional_embedding.copy_(tower.positional_embedding[:1].expand(10, -1).clone())
    attention = tower.transformer.resblocks[-1].attn
    attention.out_proj.weight.mul_(1e4)
    attention.out_proj.bias.mul_(1e4)
    dense, patches = (kind(clip, GRID, 20).embed_frames([frame]) for kind in (DenseScorer, PatchScorer))
    assert dense.shape == patches.shape == (1, 4, 5, 16)
    np.testing.assert_allclose(dense, patches, atol=2e-3)


@pytest.mark.parametrize("batch_size", [1, 24, 100, 10_000])
def test_a_frames_embeddings_do_not_depend_on_its_batch(batch_size: int) -> None:
    clip = made_clip()
    alone = np.concatenate([DenseScorer(clip, GRID, 24).embed_frames([frame]) for frame in FRAMES])
    np.testing.assert_allclose(DenseScorer(clip, GRID, batch_size).embed_frames(FRAMES), alone, atol=1e-3)


def test_a_batch_has_whole_frames_with_maps_of_one_size() -> None:
    shapes = [(4, 6)] * 3 + [(4, 4)] * 2 + [(4, 6)]
    batches = DenseScorer(made_clip(), GRID, 50).cut(shapes)
    assert batches == [[(0, 0, 24), (1, 0, 24)], [(2, 0, 24)], [(3, 0, 16), (4, 0, 16)], [(5, 0, 24)]]


def test_half_precision_differs_by_rounding_only() -> None:
    clip = made_clip()
    exact = DenseScorer(clip, GRID, 48).embed_frames(FRAMES)
    clip.model.visual.to(torch.bfloat16)
    half = LoadedClip(clip.model, None, (24, 24), clip.mean, clip.std, torch.bfloat16, clip.device, {})
    rough = DenseScorer(half, GRID, 48).embed_frames(FRAMES)
    assert (rough.astype(np.float32) * exact.astype(np.float32)).sum(-1).min() > 0.99


def test_other_towers_are_refused_by_name() -> None:
    pooled = made_clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    with pytest.raises(ModelError, match=r"a ViT with an attention pooler .* `method: patches` takes any model"):
        check_tower(pooled.model.visual)
    resnet = made_clip(layers=[1, 1, 1, 1], width=16, image_size=64, head_width=16)
    with pytest.raises(ModelError, match=r"similarity\.model has a ModifiedResNet as its image tower"):
        check_tower(resnet.model.visual)


def test_windows_belong_to_patches() -> None:
    values = {"name": "x", "dataset": {"source": "moving-shapes", "clips": {"train": 2}}}
    with pytest.raises(ConfigError, match="window is 3, but the patches of method `dense` are single cells"):
        parse_config(values | {"similarity": {"method": "dense", "window": 3}})


# ----------------------------------------------------------------------------------------------------------- the stage

CLIPS = [
    Clip("a", frames=3, width=40, height=32, captions=["a red circle", "two dogs"]),
    Clip("b", frames=2, width=32, height=40, captions=["rain"]),
    Clip("d", frames=4, width=53, height=37, captions=["a red circle"]),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("dense")
    made = make_stage_outputs(folder / "shard", CLIPS, GRID)
    captions = folder / "captions.parquet"
    write_captions(made.slice, made.tar, made.index, captions, HumanCaptions(kind="human"), BadInput())
    return SimpleNamespace(made=made, captions=captions, model=save_clip(folder / "clip"))


def score(files: SimpleNamespace, output: Path, embeddings: Path | None = None, method: str = "dense") -> bytes:
    made: StageOutputs = files.made
    write_similarity(
        *(made.tar, made.index, files.captions, output, settings(files, method), GRID, BadInput()),
        embeddings=embeddings,
        device="cpu",
    )
    return output.read_bytes()


def settings(files: SimpleNamespace, method: str) -> Similarity:
    values = {"model": f"local-dir:{files.model}", "batch_size": 50, "method": method}
    return Similarity.model_validate(values)


def test_a_killed_job_continues_with_the_same_bytes(
    files: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, encode, calls = score(files, tmp_path / "whole.parquet"), DenseScorer.encode, []

    class Killed(BaseException):
        """Stands in for a kill of the process."""

    def die_at_the_fourth(self: DenseScorer, batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        if len(calls) == 4:
            raise Killed
        return encode(self, batch)

    monkeypatch.setattr(DenseScorer, "encode", die_at_the_fourth)
    with pytest.raises(Killed):
        score(files, tmp_path / "killed.parquet")
    assert score(files, tmp_path / "killed.parquet") == expected
    assert len(calls) == 4 + 3  # of five batches, clip a's two are not computed again
    assert read_receipt(tmp_path / "killed.parquet")["settings"]["method"] == "dense"


def test_kept_embeddings_give_the_same_bytes_and_belong_to_one_method(files: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "embeddings.parquet"
    write_embeddings(files.made.tar, files.made.index, path, settings(files, "dense"), GRID, device="cpu")
    assert score(files, tmp_path / "kept.parquet", path) == score(files, tmp_path / "fresh.parquet")
    with pytest.raises(DamagedError, match="was made with a different method"):
        score(files, tmp_path / "other.parquet", path, method="patches")


def test_the_method_chooses_the_scorer(files: SimpleNamespace) -> None:
    assert isinstance(load_scorer(settings(files, "dense"), GRID, "cpu"), DenseScorer)
    assert type(load_scorer(settings(files, "patches"), GRID, "cpu")) is PatchScorer
