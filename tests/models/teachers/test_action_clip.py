"""ActionCLIP's checkpoint as STM's teacher: a small file of the released layout, against transformers' CLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from stm.config import FrameTeacher as Settings
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.teachers.temporal_fusion import TemporalFusion
from stm.pretrained.clip import load_clip
from stm.pretrained.hub import ModelError
from stm.pretrained.local_files import local_model_files
from stm.pretrained.sizes import clip_image_flops
from stm.storage.files import sha256_file
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

WIDTH, JOINT, SIDE, PATCH = 128, 64, 4, 8
# OpenAI's names of a block's tensors, and those of transformers.
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_clip() -> transformers.CLIPModel:
    torch.manual_seed(0)
    vision: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": SIDE * PATCH, "patch_size": PATCH, "hidden_act": "quick_gelu"}
    text = {"vocab_size": 20, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT)
    config._attn_implementation = "eager"  # which returns the weights of its attention
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.half())  # as the file holds most of them
    return model


def release_names(model: transformers.CLIPModel) -> dict[str, Tensor]:
    """The state dict of OpenAI's CLIP, as ActionCLIP saves it: half precision, apart from norms and embeddings."""
    old, vision = model.state_dict(), "vision_model."
    state = {
        "visual.class_embedding": old[f"{vision}embeddings.class_embedding"],
        "visual.positional_embedding": old[f"{vision}embeddings.position_embedding.weight"],
        "visual.conv1.weight": old[f"{vision}embeddings.patch_embedding.weight"].half(),
        "visual.proj": old["visual_projection.weight"].T.half().contiguous(),
        "logit_scale": old["logit_scale"],
        "text_projection": old["text_projection.weight"].T.half().contiguous(),
        "positional_embedding": torch.zeros(77, 64),
        "token_embedding.weight": torch.zeros(20, 64),
        "ln_final.weight": torch.ones(64),
        "transformer.resblocks.0.ln_1.weight": torch.ones(64),
    }
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = old[f"{vision}pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = old[f"{vision}post_layernorm.{kind}"]
        for number in range(3):
            block, start = f"visual.transformer.resblocks.{number}.", f"{vision}encoder.layers.{number}."
            joint = torch.cat([old[f"{start}self_attn.{part}_proj.{kind}"] for part in "qkv"])
            state[f"{block}attn.in_proj_{kind}"] = joint.half()
            for name, theirs in BLOCK.items():
                tensor = old[f"{start}{theirs}.{kind}"]
                state[f"{block}{name}.{kind}"] = tensor if name.startswith("ln") else tensor.half()
    return state


def make_fusion() -> TemporalFusion:
    torch.manual_seed(1)
    return TemporalFusion(JOINT, 77, layers=6)


def write_checkpoint(folder: Path, state: dict[str, Tensor] | None = None) -> Path:
    """A file like actionclip_vit-b-16-8f.pt, which the training code writes at the end of an epoch."""
    fusion = {f"module.{name}": tensor for name, tensor in make_fusion().state_dict().items()}
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()).state_dict()
    content: dict[str, Any] = {
        "epoch": 49,
        "model_state_dict": release_names(make_clip()) if state is None else state,
        "fusion_model_state_dict": fusion,
        "optimizer_state_dict": optimizer,
    }
    path = folder / "actionclip_vit-b-16-8f.pt"
    torch.save(content, path)
    return path


def load(path: Path, **more: Any) -> FrameTeacher:
    settings = {"model": f"actionclip:{path}", "layers": 2, "temporal_fusion": str(path), **more}
    return FrameTeacher.load(Settings.model_validate(settings), SIDE)


def make_video(frames: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, frames, 3, SIDE * PATCH, SIDE * PATCH), dtype=torch.uint8, generator=generator)


def normalise(video: Tensor, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> Tensor:
    return (video.flatten(0, 1) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def flat(frames: Tensor) -> Tensor:
    """[B * T, N, C] of 2 clips -> [B, T * N, C]."""
    return frames.unflatten(0, (2, -1)).flatten(1, 2)


@torch.no_grad()
def test_features_attention_and_stem_come_from_the_checkpoint_s_own_tower(tmp_path: Path) -> None:
    clip, video = make_clip(), make_video()
    output = load(write_checkpoint(tmp_path))(video)
    told = clip.vision_model(normalise(video), output_hidden_states=True, output_attentions=True)
    for layer, states in zip(output.features, told.hidden_states[-2:], strict=True):
        joint = flat(clip.visual_projection(clip.vision_model.post_layernorm(states))[:, 1:])
        fused = make_fusion()(joint[None], 4)[0]
        torch.testing.assert_close(layer, fused, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(layer, joint, atol=0.1)
    attention = told.attentions[-1].mean(dim=1)[:, 0, 1:].view(2, 4, SIDE**2)
    torch.testing.assert_close(output.attention, attention, atol=1e-6, rtol=1e-4)
    stem = clip.vision_model.embeddings.patch_embedding(normalise(video)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.stem, flat(stem), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_images_are_not_fused_and_weights_are_float32(tmp_path: Path) -> None:
    teacher, video = load(write_checkpoint(tmp_path)), make_video(frames=1)
    states = make_clip().vision_model(normalise(video)).last_hidden_state
    clip = make_clip()
    joint = clip.visual_projection(clip.vision_model.post_layernorm(states))[:, 1:]
    torch.testing.assert_close(teacher(video).features[-1], joint, atol=1e-4, rtol=1e-4)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


def test_its_identity_is_the_file_s_and_changes_with_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    digest = sha256_file(path)
    name = "actionclip:actionclip_vit-b-16-8f.pt"
    assert load(path).identity == {"model": name, "weights_sha256": digest, "temporal_fusion_sha256": digest}
    assert local_model_files(f"actionclip:{path}") == [path.as_posix()]  # an input of the jobs that use it


@torch.no_grad()
def test_its_own_normalisation_is_clip_s(tmp_path: Path) -> None:
    teacher = load(write_checkpoint(tmp_path), normalisation="own")
    video = make_video()
    torch.testing.assert_close(teacher.prepare(video.flatten(0, 1)), normalise(video, CLIP_MEAN, CLIP_STD))


@torch.no_grad()
def test_tensors_of_both_parts_in_one_safetensors_are_the_same_teacher(tmp_path: Path) -> None:
    path, other = write_checkpoint(tmp_path), tmp_path / "actionclip.safetensors"
    content = torch.load(path, weights_only=True)
    parts = ("model_state_dict", "fusion_model_state_dict")
    save_file({f"{part}.{name}": tensor for part in parts for name, tensor in content[part].items()}, other)
    video = make_video()
    for mine, theirs in zip(load(path)(video), load(other)(video), strict=True):
        assert torch.equal(mine, theirs)


def test_files_without_such_a_tower_and_files_that_run_code_are_refused(tmp_path: Path) -> None:
    state = release_names(make_clip())
    text = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    with pytest.raises(ModelError, match=r"teacher\.model: .* holds no image tower of ActionCLIP"):
        load(write_checkpoint(tmp_path, text))
    joint = {**state, "visual.time_embedding": torch.zeros(8, WIDTH)}
    with pytest.raises(ModelError, match="1 not expected: time_embedding"):
        load(write_checkpoint(tmp_path, joint))
    del state["visual.ln_post.bias"]
    with pytest.raises(ModelError, match=r"1 missing: ln_post\.bias"):
        load(write_checkpoint(tmp_path, state))
    with pytest.raises(ModelError, match="there is no such file"):
        load(tmp_path / "nowhere.pt")
    torch.save({"model_state_dict": {"visual.proj": Path("a")}}, tmp_path / "code.pt")
    with pytest.raises(ModelError, match="loading it could run code"):
        load(tmp_path / "code.pt")


def test_the_plan_counts_it_as_stm_s_vit_b_16_before_it_is_downloaded() -> None:
    assert clip_image_flops("actionclip:weights/missing.pt") == clip_image_flops("ViT-B-16-quickgelu@openai")
    assert clip_image_flops("actionclip:weights/missing.pt") > 3 * clip_image_flops("ViT-B-32@openai")


def test_the_logit_scale_is_known_for_a_clip_with_a_text_tower_alone(tmp_path: Path) -> None:
    demo = "local-dir:stm/assets/demo-clip"
    teacher = FrameTeacher.load(Settings(model=demo, layers=2), 4)
    assert teacher.logit_scale == pytest.approx(load_clip(demo, device="cpu").model.logit_scale.exp().item())
    assert load(write_checkpoint(tmp_path)).logit_scale is None
