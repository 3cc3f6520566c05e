"""The frame teacher's features, attention and pooling against the models' own, and against loops over tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from stm.config import FrameTeacher as Settings
from stm.models.teachers.frame_teacher import FrameTeacher, TeacherOutput
from stm.models.teachers.open_clip import make_tower
from stm.models.teachers.temporal_fusion import TemporalFusion
from stm.models.teachers.tower import ClassTokenTower
from stm.models.teachers.transformers import make_tower as make_transformers_tower
from stm.pretrained.hub import ModelError
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

DEMO = f"local-dir:{Path(__file__).parents[3] / 'stm/assets/demo-clip'}"
SIDE = 4
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def make_video(batch: int = 2, frames: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames, 3, size, size), dtype=torch.uint8, generator=generator)


def normalise(video: Tensor, mean: Any = IMAGENET_MEAN, deviation: Any = IMAGENET_STD) -> Tensor:
    unit = video.flatten(0, 1).double() / 255
    return ((unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)).float()


def stir(model: nn.Module) -> Any:
    """Away from weights with which attention is all but uniform and norms do nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def make_open_clip(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0}
    return stir(VisionTransformer(**{**settings, "output_dim": 16, **changes}))


def make_siglip_in_timm() -> Any:
    """As open_clip builds ViT-B-16-SigLIP, small."""
    import timm
    from open_clip.timm_model import TimmModel

    torch.manual_seed(0)
    with torch.device("meta"):  # its trunk is replaced by a small one, and beside it there are no weights
        model = TimmModel("vit_base_patch16_siglip_224", 32, 224, pool="map", proj="none")
    model.trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=2,
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    return stir(model)


def make_clip() -> transformers.CLIPModel:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return stir(transformers.CLIPModel(config))


def make_siglip() -> transformers.SiglipModel:
    torch.manual_seed(0)
    return stir(transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)))


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]] = {
    # model, its own embedding of images, the tower around it
    "open_clip": (make_open_clip, lambda model, pixels: model(pixels), make_tower),
    "open_clip with quick_gelu": (
        lambda: make_open_clip(act_layer=QuickGELU),
        lambda model, pixels: model(pixels),
        make_tower,
    ),
    "open_clip without ln_pre": (
        lambda: make_open_clip(no_ln_pre=True, ls_init_value=0.5),
        lambda model, pixels: model(pixels),
        make_tower,
    ),
    "siglip in open_clip": (make_siglip_in_timm, lambda model, pixels: model(pixels), make_tower),
    "clip": (make_clip, lambda m, pixels: m.get_image_features(pixels).pooler_output, make_transformers_tower),
    "siglip": (make_siglip, lambda m, pixels: m.get_image_features(pixels).pooler_output, make_transformers_tower),
}


def make_teacher(family: str, layers: int = 2, **arguments: Any) -> FrameTeacher:
    make, _, wrap = FAMILIES[family]
    return FrameTeacher(wrap(make()), SIDE, layers, **arguments)


def flat(frames: Tensor) -> Tensor:
    """[F, N, C] of frames of 2 clips -> [B, T * N, C]."""
    return frames.unflatten(0, (2, -1)).flatten(1, 2)


# ------------------------------------------------------------------------------------------------------- features


def test_clip_s_features_are_its_last_blocks_patches_through_norm_and_projection() -> None:
    model, video = make_open_clip(), make_video()
    with torch.no_grad():
        told = model.forward_intermediates(normalise(video), indices=2, normalize_intermediates=True, output_fmt="NLC")
        expected = [layer @ model.proj for layer in told["image_intermediates"]]
    seen = FrameTeacher(make_tower(model), SIDE, layers=2)(video)
    assert seen.features.shape == (2, 2, 3 * 16, 16) and seen.features.dtype == torch.float32
    for layer, wanted in zip(seen.features, expected, strict=True):
        torch.testing.assert_close(layer, flat(wanted), atol=1e-5, rtol=1e-5)


def test_transformers_clip_s_features_are_its_hidden_states_through_norm_and_projection() -> None:
    model, video = make_clip(), make_video()
    with torch.no_grad():
        states = model.vision_model(normalise(video), output_hidden_states=True).hidden_states
        expected = [model.visual_projection(model.vision_model.post_layernorm(x))[:, 1:] for x in states[-3:]]
    seen = make_teacher("clip", layers=3)(video)
    torch.testing.assert_close(seen.features, torch.stack([flat(x) for x in expected]), atol=1e-5, rtol=1e-5)


def test_siglip_s_features_are_its_hidden_states_through_the_last_norm() -> None:
    model, video = make_siglip(), make_video()
    with torch.no_grad():
        out = model.vision_model(normalise(video), output_hidden_states=True)
        expected = [model.vision_model.post_layernorm(x) for x in out.hidden_states[-2:]]
    seen = make_teacher("siglip")(video)
    torch.testing.assert_close(seen.features, torch.stack([flat(x) for x in expected]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.tokens.flatten(0, 1), out.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert seen.class_token is None


def test_siglip_in_open_clip_has_the_features_that_timm_says() -> None:
    model, video = make_siglip_in_timm(), make_video()
    with torch.no_grad():
        layers = model.trunk.forward_intermediates(
            normalise(video), 2, norm=True, output_fmt="NLC", intermediates_only=True
        )
    seen = make_teacher("siglip in open_clip")(video)
    torch.testing.assert_close(seen.features, torch.stack([flat(x) for x in layers]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "convolution"),
    [
        ("open_clip", "conv1"),
        ("clip", "vision_model.embeddings.patch_embedding"),
        ("siglip", "vision_model.embeddings.patch_embedding"),
        ("siglip in open_clip", "trunk.patch_embed.proj"),
    ],
)
def test_the_stem_is_the_patch_convolution_before_positions(family: str, convolution: str) -> None:
    video = make_video()
    with torch.no_grad():
        stem = FAMILIES[family][0]().get_submodule(convolution)(normalise(video)).flatten(2).transpose(1, 2)
    teacher = make_teacher(family)
    torch.testing.assert_close(teacher(video).stem, flat(stem), atol=1e-5, rtol=1e-5)
    assert teacher.stem_width == stem.shape[-1]


# ------------------------------------------------------------------------------------------------------ attention


def test_clip_s_attention_is_what_torch_s_attention_returns_with_its_weights() -> None:
    model, video = make_open_clip(), make_video()
    block = model.transformer.resblocks[-1]
    with torch.no_grad():
        found = model.forward_intermediates(
            normalise(video), indices=[1], output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
        )
        states = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
        states = block.ln_1(states)
        weights = block.attn(states, states, states, need_weights=True)[1]
    attention = make_teacher("open_clip")(video).attention
    torch.testing.assert_close(attention.flatten(0, 1), weights[:, 0, 1:], atol=1e-6, rtol=1e-5)
    assert attention.max() > 2 * attention.min()  # it says something


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_alone_is_the_whole_output_s_averaged_over_the_tubelet(family: str) -> None:
    make, _, wrap = FAMILIES[family]
    video, alone = make_video(frames=4), FrameTeacher(wrap(make()), SIDE, layers=0)
    expected = make_teacher(family)(video).attention.unflatten(1, (2, 2)).mean(dim=2)
    assert torch.equal(alone.attend(video, 2), expected)


def test_transformers_clip_s_attention_is_what_it_returns_itself() -> None:
    model, video = make_clip(), make_video()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model.vision_model(normalise(video), output_attentions=True).attentions[-1]
    expected = weights.mean(dim=1)[:, 0, 1:].unflatten(0, (2, 3))
    torch.testing.assert_close(make_teacher("clip")(video).attention, expected, atol=1e-6, rtol=1e-5)


def test_siglip_s_attention_is_its_pooling_head_s() -> None:
    model, video = make_siglip(), make_video()
    head = model.vision_model.head
    with torch.no_grad():
        tokens = model.vision_model(normalise(video)).last_hidden_state
        weights = head.attention(head.probe.expand(len(tokens), -1, -1), tokens, tokens)[1]  # mean of the heads
    attention = make_teacher("siglip")(video).attention
    torch.testing.assert_close(attention, weights[:, 0].unflatten(0, (2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(2, 3))
    # timm's head of the same kind has no weights to compare with; they sum to 1 as well.
    torch.testing.assert_close(make_teacher("siglip in open_clip")(video).attention.sum(dim=2), torch.ones(2, 3))


# -------------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_over_the_whole_frame_is_the_model_s_own_embedding_of_the_image(family: str) -> None:
    make, embed, _ = FAMILIES[family]
    video, teacher = make_video(), make_teacher(family)
    with torch.no_grad():
        expected = embed(make(), normalise(video)).unflatten(0, (2, 3))
    pooled = teacher.pool_windows(teacher(video), 2 * SIDE + 1)
    assert pooled.shape == (2, 3, 16, teacher.feature_width) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected[:, :, None].expand_as(pooled), atol=1e-5, rtol=1e-5)


def window_of(token: int, window: int) -> list[int]:
    row, column = divmod(token, SIDE)
    half = window // 2
    return [
        r * SIDE + c
        for r in range(max(0, row - half), min(SIDE, row + half + 1))
        for c in range(max(0, column - half), min(SIDE, column + half + 1))
    ]


@pytest.mark.parametrize("window", [1, 3])
def test_siglip_s_window_is_its_head_on_the_neighbours_alone(window: int) -> None:
    model, teacher = make_siglip(), make_teacher("siglip")
    seen = teacher(make_video())
    tokens = seen.tokens.flatten(0, 1)
    with torch.no_grad():
        each = [model.vision_model.head(tokens[:, window_of(token, window)]) for token in range(16)]
    expected = torch.stack(each, dim=1).unflatten(0, (2, 3))
    torch.testing.assert_close(teacher.pool_windows(seen, window), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected[:, :, 0], expected[:, :, 5], atol=1e-2)


@pytest.mark.parametrize("window", [1, 3])
def test_clip_s_window_is_its_last_block_on_class_token_and_neighbours_alone(window: int) -> None:
    model, teacher = make_open_clip(), make_teacher("open_clip")
    seen = teacher(make_video())
    assert seen.class_token is not None
    tokens, token_before = seen.tokens.flatten(0, 1), seen.class_token.flatten(0, 1)[:, None]
    each = []
    with torch.no_grad():
        for token in range(16):
            alone = torch.cat([token_before, tokens[:, window_of(token, window)]], dim=1)
            each.append(model.ln_post(model.transformer.resblocks[-1](alone))[:, 0] @ model.proj)
    expected = torch.stack(each, dim=1).unflatten(0, (2, 3))
    torch.testing.assert_close(teacher.pool_windows(seen, window), expected, atol=1e-5, rtol=1e-5)


def test_tokens_that_a_head_would_never_look_at_do_not_upset_their_window() -> None:
    """A window whose logits lie far below the frame's highest: its softmax is of its own tokens."""
    model, teacher = make_siglip(), make_teacher("siglip")
    seen = teacher(make_video())
    far = seen._replace(tokens=torch.cat([1000 * seen.tokens[:, :, :1], seen.tokens[:, :, 1:]], dim=2))
    with torch.no_grad():
        expected = model.vision_model.head(far.tokens.flatten(0, 1)[:, window_of(15, 3)]).unflatten(0, (2, 3))
    torch.testing.assert_close(teacher.pool_windows(far, 3)[:, :, 15], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["open_clip", "clip", "siglip", "siglip in open_clip"])
def test_pooled_means_are_means_of_the_neighbours_in_the_joint_space(family: str) -> None:
    """With a window of one token they are the last layer's features; else the mean comes before norm and projection."""
    teacher = make_teacher(family)
    seen = teacher(make_video())
    alone = teacher.pool_means(seen, 1)
    torch.testing.assert_close(alone.flatten(1, 2), seen.features[-1], atol=1e-5, rtol=1e-5)
    tokens = seen.tokens.flatten(0, 1)
    if seen.class_token is not None:
        states = torch.cat([seen.class_token.flatten(0, 1)[:, None], tokens], dim=1)
        with torch.no_grad():
            tokens = teacher.tower.run_last(states)[:, 1:]
    means = torch.stack([tokens[:, window_of(token, 3)].mean(dim=1) for token in range(16)], dim=1)
    expected = teacher.tower.to_joint(means) if seen.class_token is not None else means
    torch.testing.assert_close(teacher.pool_means(seen, 3).flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 2])
def test_even_windows_are_refused(window: int) -> None:
    teacher = make_teacher("siglip")
    with pytest.raises(ValueError, match=f"window {window} must be odd"):
        teacher.pool_windows(teacher(make_video(1, 1)), window)


# --------------------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("family", ["open_clip", "siglip"])
def test_it_is_frozen_and_stays_in_evaluation_mode(family: str) -> None:
    teacher = make_teacher(family, fusion=TemporalFusion(16 if family == "open_clip" else 32, 4))
    method = nn.ModuleDict({"teacher": teacher}).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in method.parameters())
    seen = teacher(make_video())
    parts = [*seen, teacher.pool_windows(seen, 3), teacher.pool_means(seen, 3)]
    assert not any(part.requires_grad for part in parts if part is not None)
    assert all(part.dtype == torch.float32 for part in parts if part is not None)
    assert torch.equal(seen.features, teacher(make_video()).features)


@pytest.mark.parametrize("family", ["open_clip", "siglip"])
def test_it_compiles_to_one_graph(family: str) -> None:
    torch._dynamo.reset()
    teacher, video = make_teacher(family), make_video(1, 2)
    seen = torch.compile(teacher, fullgraph=True, backend="eager")(video)
    torch.testing.assert_close(seen.features, teacher(video).features)


def test_under_autocast_everything_is_still_float32_and_nearly_the_same() -> None:
    for family in ("open_clip", "siglip"):
        teacher, video = make_teacher(family), make_video()
        exact = teacher(video)
        with torch.autocast("cpu", torch.bfloat16):
            rough = teacher(video)
            pooled = teacher.pool_windows(rough, 3)
        assert pooled.dtype == torch.float32
        for a, b in zip(rough, exact, strict=True):
            if a is not None and b is not None:
                assert a.dtype == torch.float32
                assert (a - b).norm() < 0.05 * b.norm()


def test_frames_do_not_depend_on_each_other_without_fusion_and_do_with_it() -> None:
    video = make_video()
    plain = make_teacher("open_clip")
    alone = plain(video[:, 1:2]).features
    torch.testing.assert_close(plain(video).features[:, :, 16:32], alone, atol=1e-5, rtol=1e-5)
    torch.manual_seed(3)
    fused = make_teacher("open_clip", fusion=TemporalFusion(16, 4, heads=2))
    assert not torch.allclose(fused(video).features[:, :, 16:32], alone, atol=1e-2)
    torch.testing.assert_close(fused(video[:, 1:2]).features, alone)  # an image is not fused
    assert fused.fusion is not None
    expected = fused.fusion(plain(video).features, 3)
    torch.testing.assert_close(fused(video).features, expected)


# ------------------------------------------------------------------------------------------------- grids and sizes


@pytest.mark.parametrize("family", ["open_clip", "clip", "siglip", "siglip in open_clip"])
def test_frames_and_positions_are_resized_to_the_student_s_grid(family: str) -> None:
    """A student of 3 x 3 tokens: the same model, built for 24 pixels with positions resized by torch, without antialiasing."""
    make, _, wrap = FAMILIES[family]
    video = make_video(size=48)
    teacher = FrameTeacher(wrap(make()), 3, 2)
    assert teacher.image_size == 24
    pixels = nn.functional.interpolate(normalise(video), (24, 24), mode="bicubic", align_corners=False)
    torch.testing.assert_close(teacher.prepare(video.flatten(0, 1)), pixels, atol=1e-4, rtol=1e-4)
    tower, stem = wrap(make()), teacher.tower.embed(pixels)
    prefix = int(isinstance(tower, ClassTokenTower))
    tables = {"open_clip": "model.positional_embedding", "siglip in open_clip": "trunk.pos_embed"}
    table = tower.get_parameter(tables.get(family, "vision.embeddings.position_embedding.weight")).detach()
    rows = table.reshape(16 + prefix, 32)
    square = rows[prefix:].T.reshape(1, 32, 4, 4)
    square = nn.functional.interpolate(square, (3, 3), mode="bicubic", align_corners=False)
    resized = torch.cat([rows[:prefix], square[0].flatten(1).T])
    own = teacher.tower.get_parameter(tables.get(family, "vision.embeddings.position_embedding.weight"))
    torch.testing.assert_close(own.reshape(-1, 32), resized)
    assert teacher(video).features.shape == (2, 2, 27, teacher.feature_width)
    torch.testing.assert_close(teacher(video).stem, flat(stem), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FrameTeacher(make_tower(make_open_clip()), SIDE, 4),
            "layers 4 is more than the teacher's 3 blocks; .* 3 or less",
        ),
        (lambda: FrameTeacher(make_tower(make_open_clip()), SIDE, 2, 64), "8 patches per side .* or set it to 32"),
        (lambda: FrameTeacher(make_tower(make_open_clip()), SIDE, 2, 36), "36 is not a multiple of its patch size, 8"),
        (lambda: FrameTeacher(make_tower(make_open_clip(pool_type="avg")), SIDE, 2), "'avg' pooling"),
        (lambda: make_teacher("open_clip", fusion=TemporalFusion(32, 4)), "fusion is 32 wide, .* features are 16"),
        (lambda: make_tower(nn.Linear(2, 2)), "its image tower is a Linear, not an open_clip ViT"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


# -------------------------------------------------------------------------------------------------------- loading


def test_the_repository_s_small_clip_is_loaded_and_embeds_images_as_open_clip_does() -> None:
    teacher = FrameTeacher.load(Settings(model=DEMO, layers=2, normalisation="own"), SIDE)
    assert (teacher.feature_width, teacher.token_width, teacher.stem_width, teacher.layers) == (96, 128, 128, 2)
    assert teacher.identity is not None and teacher.identity["model"] == "local-dir:demo-clip"
    model = open_clip.create_model(DEMO, require_pretrained=True, weights_only=True).eval()
    video = make_video(size=48)
    half = (0.5, 0.5, 0.5)
    with torch.no_grad():
        expected = model.encode_image(normalise(video, half, half)).unflatten(0, (2, 3))
    pooled = teacher.pool_windows(teacher(video), 7)
    torch.testing.assert_close(pooled, expected[:, :, None].expand_as(pooled), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel", "SiglipVisionModel"])
def test_transformers_folders_are_loaded(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    configs = {
        "CLIPModel": lambda: transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16),
        "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionConfig(**VISION, projection_dim=16),
        "SiglipModel": lambda: transformers.SiglipConfig(text_config=TEXT, vision_config=VISION),
        "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(**VISION),
    }
    model = stir(getattr(transformers, kind)(configs[kind]()))
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]).save_pretrained(tmp_path)
    settings = Settings(model=f"transformers:{tmp_path}", layers=3, normalisation="own")
    teacher, video = FrameTeacher.load(settings, SIDE), make_video()
    pixels = normalise(video, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    with torch.no_grad():
        if kind in ("CLIPModel", "SiglipModel"):
            embedded = model.get_image_features(pixels).pooler_output
        else:
            embedded = model(pixels).image_embeds if "CLIP" in kind else model(pixels).pooler_output
    pooled = teacher.pool_windows(teacher(video), 9)
    torch.testing.assert_close(pooled[:, :, 3], embedded.unflatten(0, (2, 3)), atol=1e-5, rtol=1e-5)
    assert teacher.identity is not None and teacher.identity["model"] == f"local:{tmp_path.name}"
    assert len(str(teacher.identity["weights_sha256"])) == 64


def test_a_folder_without_statistics_has_no_normalisation_of_its_own(tmp_path: Path) -> None:
    make_siglip().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"normalisation `own`: .* has no preprocessor_config\.json"):
        FrameTeacher.load(Settings(model=f"transformers:{tmp_path}", layers=2, normalisation="own"), SIDE)
    assert isinstance(FrameTeacher.load(Settings(model=f"transformers:{tmp_path}", layers=2), SIDE), FrameTeacher)


def test_a_model_of_another_kind_or_a_clip_without_projection_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="is of type 'bert'; a teacher is one of CLIPModel"):
        FrameTeacher.load(Settings(model=f"transformers:{tmp_path / 'bert'}"), SIDE)
    torch.manual_seed(0)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ModelError, match=r"not a complete CLIPVisionModelWithProjection: .* missing"):
        FrameTeacher.load(Settings(model=f"transformers:{tmp_path / 'clip'}"), SIDE)


def test_a_fusion_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^teacher\.temporal_fusion: .*nowhere\.pth: cannot be read"):
        FrameTeacher.load(Settings(model=DEMO, layers=2, temporal_fusion=str(tmp_path / "nowhere.pth")), SIDE)


def test_a_fusion_is_loaded_with_its_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fusion = TemporalFusion(96, 8)
    torch.save({"fusion_model_state_dict": fusion.state_dict()}, tmp_path / "fusion.pth")
    teacher = FrameTeacher.load(Settings(model=DEMO, layers=2, temporal_fusion=str(tmp_path / "fusion.pth")), SIDE)
    plain = FrameTeacher.load(Settings(model=DEMO, layers=2), SIDE)
    assert teacher.identity is not None and len(teacher.identity["temporal_fusion_sha256"]) == 64
    video = make_video(1, 2, 48)
    with torch.no_grad():
        expected = fusion(plain(video).features, 2)
    torch.testing.assert_close(teacher(video).features, expected)
    assert isinstance(teacher(video), TeacherOutput)
