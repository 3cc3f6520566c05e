"""The teacher's attention against the whole block's, computed by hand and by torch."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

from stm.config import Mask, PretrainRun, Teacher
from stm.masking import get_strategy, to_boolean
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.teachers.open_clip import make_tower as wrap_tower
from stm.pretrained.hub import ModelError
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

VISION: dict[str, Any] = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
NORMALISATION = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


def make_tower(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 4.0}
    tower = VisionTransformer(**{**settings, "output_dim": 16, **changes})
    with torch.no_grad():
        for parameter in tower.parameters():  # so that attention is not all but uniform
            parameter.add_(0.3 * torch.randn_like(parameter))
    return tower


def make_teacher(tower: nn.Module, side: int, **arguments: Any) -> FrameTeacher:
    return FrameTeacher(wrap_tower(tower), side, layers=0, **arguments)


def make_video(batch: int = 2, frames: int = 4, size: int = 32) -> Tensor:
    shape = (batch, frames, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def save_clip(folder: Path, **vision: Any) -> str:
    """An open_clip model as `local-dir:` wants it; the config's string for it."""
    torch.manual_seed(0)
    folder.mkdir()
    config = {"embed_dim": 16, "vision_cfg": {**VISION, **vision}, "text_cfg": TEXT}
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    written = {"model_cfg": config, "preprocess_cfg": NORMALISATION}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    return f"local-dir:{folder}"


def attend_by_hand(tower: VisionTransformer, pixels: Tensor) -> Tensor:
    """The last block's softmax(q k / sqrt(d)), class token to patches, mean over heads, in double precision."""
    caught: list[Tensor] = []
    handle = tower.transformer.resblocks[-1].register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        tower(pixels)
        handle.remove()
        block = tower.transformer.resblocks[-1]
        attention = block.attn
        x = block.ln_1(caught[0]).double()
        q, k, _ = (x @ attention.in_proj_weight.double().T + attention.in_proj_bias.double()).chunk(3, dim=-1)
        heads = [t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k)]
        weights = (heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5).softmax(dim=-1)
    return weights.mean(dim=1)[:, 0, 1:]


def normalise(video: Tensor, mean: Any = IMAGENET_MEAN, deviation: Any = IMAGENET_STD) -> Tensor:
    unit = video.flatten(0, 1).double() / 255
    return ((unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)).float()


def test_attention_is_the_last_block_s_from_the_class_token_averaged_over_heads_and_tubelet() -> None:
    tower, video = make_tower(), make_video()
    expected = attend_by_hand(tower.eval(), normalise(video)).view(2, 2, 2, 16).mean(dim=2)
    attention = make_teacher(tower, 4).attend(video, 2)
    assert attention.dtype == torch.float32 and attention.shape == (2, 2, 16)
    assert torch.allclose(attention.double(), expected, atol=1e-6)
    assert expected.amax() > 2 * expected.amin()  # it says something


def test_attention_equals_what_torch_s_attention_returns_for_all_queries() -> None:
    """UMT's own way: the whole block with its weights."""
    tower, video = make_tower(), make_video(1, 2)
    caught: list[Tensor] = []
    tower.transformer.resblocks[-1].ln_1.register_forward_hook(lambda module, inputs, output: caught.append(output))
    attention = make_teacher(tower, 4).attend(video, 1)
    tokens = caught[-1]  # of all tokens; the query is normalised by itself
    weights = tower.transformer.resblocks[-1].attn(tokens, tokens, tokens, need_weights=True)[1]
    assert torch.allclose(attention[0], weights[:, 0, 1:], atol=1e-6)


def test_frames_are_normalised_with_imagenet_s_statistics_unless_told_otherwise() -> None:
    video = make_video()
    own = make_teacher(make_tower(), 4, mean=NORMALISATION["mean"], deviation=NORMALISATION["std"])
    assert torch.allclose(own.prepare(video.flatten(0, 1)), normalise(video, *NORMALISATION.values()), atol=1e-6)
    usual = make_teacher(make_tower(), 4)
    assert torch.allclose(usual.prepare(video.flatten(0, 1)), normalise(video), atol=1e-6)


def test_frames_are_resized_so_that_each_of_its_patches_is_a_token() -> None:
    """A student of 7 x 7 tokens of 16 pixels, a teacher with patches of 8 pixels."""
    tower, video = make_tower(), make_video(size=112)
    teacher = make_teacher(tower, 7)
    assert teacher.image_size == 56
    pixels = nn.functional.interpolate(normalise(video), (56, 56), mode="bicubic", align_corners=False)
    expected = attend_by_hand(tower, pixels).view(2, 2, 2, 49).mean(dim=2)
    assert torch.allclose(teacher.attend(video, 2).double(), expected, atol=1e-6)


@pytest.mark.parametrize("side", [3, 7])
def test_the_position_embedding_is_resized_as_umt_does_when_it_loads(side: int) -> None:
    """models/backbones/vit/clip.py: the class token's row is kept, the others are resized bicubically without antialiasing."""
    small, large = make_tower(), make_tower(image_size=8 * side)
    weights = small.state_dict()
    table = weights["positional_embedding"]
    square = table[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    square = nn.functional.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    weights["positional_embedding"] = torch.cat([table[:1], square.permute(0, 2, 3, 1).flatten(0, 2)])
    large.load_state_dict(weights)
    video = make_video(size=8 * side)
    assert torch.equal(make_teacher(small, side).attend(video, 2), make_teacher(large, side).attend(video, 2))


def test_at_its_own_size_a_finer_teacher_gives_each_token_the_mean_of_its_patches() -> None:
    tower, video = make_tower(), make_video()
    expected = attend_by_hand(tower.eval(), normalise(video)).view(2, 2, 2, 2, 2, 2, 2).mean(dim=(2, 4, 6))
    attention = make_teacher(tower, 2, image_size=32).attend(video, 2)
    assert torch.allclose(attention.double(), expected.flatten(2), atol=1e-6)


def test_clips_do_not_depend_on_each_other_nor_slots_on_other_slots() -> None:
    teacher, video = make_teacher(make_tower(), 4), make_video(3)
    attention = teacher.attend(video, 2)
    assert torch.allclose(teacher.attend(video[1:2], 2)[0], attention[1], atol=1e-6)
    swapped = video.unflatten(1, (2, 2)).flip(1).flatten(1, 2)
    assert torch.allclose(teacher.attend(swapped, 2), attention.flip(1), atol=1e-6)


def test_it_is_frozen_and_stays_in_evaluation_mode() -> None:
    teacher = make_teacher(make_tower(patch_dropout=0.5), 4)
    method = nn.ModuleDict({"teacher": teacher}).train()
    assert not teacher.training and not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in method.parameters())
    attention = teacher.attend(make_video(), 2)
    assert not attention.requires_grad
    assert torch.equal(attention, teacher.attend(make_video(), 2))


def test_it_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    teacher = make_teacher(make_tower(), 4)
    compiled = torch.compile(teacher.attend, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(make_video(), 2), teacher.attend(make_video(), 2), atol=1e-6)


def test_under_autocast_the_guide_is_still_float32_and_nearly_the_same() -> None:
    teacher, video = make_teacher(make_tower(), 4), make_video()
    with torch.autocast("cpu", torch.bfloat16):
        rough = teacher.attend(video, 2)
    assert rough.dtype == torch.float32
    assert (rough - teacher.attend(video, 2)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_type": "avg"}, "'avg' pooling: it has no class token"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "an attention pooler: it has no class token"),
        ({"layers": 1}, "at least two blocks"),
        ({"block_type": "custom"}, "with standard attention in the last"),
    ],
)
def test_towers_whose_class_token_says_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_teacher(make_tower(**changes), 4)


def test_other_models_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"its image tower is a Linear, not an open_clip ViT; use a CLIP with a class token"
    ):
        make_teacher(nn.Linear(2, 2), 4)
    with pytest.raises(ModelError, match=r"image_size 36 is not a multiple of its patch size, 8 pixels"):
        make_teacher(make_tower(), 4, image_size=36)


def test_a_config_s_teacher_is_loaded_and_guides_the_mask(tmp_path: Path) -> None:
    name = save_clip(tmp_path / "clip")
    run = PretrainRun(
        model="tiny",
        image_size=64,
        frames=4,
        mask=Mask(strategy="attention", ratio=0.75),
        teacher=Teacher(model=name, normalisation="own"),
    )
    assert run.teacher is not None
    teacher = FrameTeacher.load(run.teacher, side=4)
    assert torch.allclose(teacher.mean.flatten(), torch.tensor(NORMALISATION["mean"]))
    attention = teacher.attend(make_video(size=64), 2)
    assert attention.shape == (2, 2, 16)
    noise = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(2))
    hidden = to_boolean(get_strategy("attention")({"noise": noise, "attention": attention}, 0.75), 2, 16)
    assert (hidden.sum(dim=2) == 12).all()


def test_a_teacher_that_is_not_there_is_named_by_its_own_key(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^teacher\.model 'local-dir:nowhere'"):
        FrameTeacher.load(Teacher(model="local-dir:nowhere"), side=4)
