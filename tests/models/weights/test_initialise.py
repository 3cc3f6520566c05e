"""Students started from UMT's, VideoMAE's and CLIP's weights, against these models computed by themselves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from official_peer import encode, fill, norm, pretraining_state, transform
from torch import Tensor

from stm.models.vit import Architecture, VideoEncoder
from stm.models.weights.checks import WeightsError, build_encoder
from stm.models.weights.initialise import read_initial
from stm.models.weights.zoo import save
from stm.tubelets import IMAGENET_MEAN, IMAGENET_STD

STUDENT = Architecture(32, 8, 1, 4, width=48, depth=2, heads=3, decoder_width=24, decoder_depth=1, decoder_heads=2)
DEMO = f"local-dir:{Path(__file__).parents[3] / 'stm/assets/demo-clip'}"


def make_clip(a: Architecture = STUDENT, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Frames uint8 [B, T, 3, S, S], and the same normalised as [B, 3, T, S, S]."""
    shape = (batch, a.frames, 3, a.image_size, a.image_size)
    video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return video, ((video.float() / 255 - mean) / deviation).transpose(1, 2)


def umt_state(prefix: str = "encoder.", seed: int = 0) -> dict[str, Tensor]:
    """UMT's student: VideoMAE's encoder with tubelets of one frame; its decoders are one linear map a layer."""
    state = pretraining_state(48, 2, 24, 1, 8, tubelet=1, seed=seed)
    encoder = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    decoders = {f"clip_decoder.{n}.head.weight": (16, 48) for n in range(2)}
    return {**{f"{prefix}{name}": tensor for name, tensor in encoder.items()}, **fill(decoders, 1)}


@pytest.mark.parametrize("nested", ["model", "module", None])
@torch.no_grad()
def test_umt_s_checkpoint_becomes_the_same_network(nested: str | None, tmp_path: Path) -> None:
    """Against UMT's forward written out: convolution per frame, sine table, blocks on the visible tokens, norm."""
    state = umt_state()
    torch.save({nested: state, "epoch": 200} if nested else state, tmp_path / "umt.pth")
    found = read_initial(str(tmp_path / "umt.pth"), STUDENT)
    video, clip = make_clip()
    masked = torch.rand(2, 64, generator=torch.Generator().manual_seed(2)).argsort(1) >= 20
    kept = torch.stack([(~row).nonzero().flatten() for row in masked])
    encoder = build_encoder(found.weights).eval()
    torch.testing.assert_close(encoder(video, kept), encode(clip, masked, state, 3), atol=1e-4, rtol=1e-4)
    assert found.notes == ("only the encoder's weights are used; left out: clip_decoder",)


@torch.no_grad()
def test_umt_s_second_stage_is_found_below_its_vision_encoder(tmp_path: Path) -> None:
    stage = umt_state("vision_encoder.encoder.")
    more = {
        "vision_encoder.pool_norm.weight": torch.ones(48),
        "text_encoder.bert.embeddings.word_embeddings.weight": torch.zeros(4, 4),
        "vision_proj.weight": torch.zeros(4, 48),
        "temp": torch.tensor(0.07),
        "clip_teacher.patch_embed.proj.weight": torch.zeros(4, 3, 1, 8, 8),
    }
    torch.save({"model": {**more, **stage}}, tmp_path / "stage2.pth")
    torch.save({"model": umt_state()}, tmp_path / "stage1.pth")
    second, first = (read_initial(str(tmp_path / f"stage{number}.pth"), STUDENT) for number in (2, 1))
    assert second.weights.tensors.keys() == first.weights.tensors.keys()
    assert all(torch.equal(second.weights.tensors[name], first.weights.tensors[name]) for name in first.weights.tensors)
    assert second.notes[0].endswith("clip_decoder, clip_teacher, temp, text_encoder, vision_encoder, vision_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.pos_embed": torch.zeros(1, 64, 48)}, "1 not expected: encoder.pos_embed"),
        ({"encoder.blocks.0.gamma_1": torch.zeros(48)}, "1 not expected: encoder.blocks.0.gamma_1"),
        ({"encoder.blocks.0.attn.q_bias": None}, "1 missing: encoder.blocks.0.attn.q_bias"),
        ({"other.patch_embed.proj.weight": torch.zeros(4, 3, 1, 8, 8)}, "has 2 video encoders"),
        ({"encoder.patch_embed.proj.weight": None}, "has 0 video encoders instead of one .*; it has clip_decoder"),
    ],
)
def test_what_is_no_umt_checkpoint_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in {**umt_state(), **change}.items() if tensor is not None}
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=message):
        read_initial(str(tmp_path / "odd.pth"), STUDENT)


@torch.no_grad()
def test_a_sine_table_in_the_checkpoint_is_ours_and_need_not_be_taken(tmp_path: Path) -> None:
    torch.save({"model": {**umt_state(), "encoder.pos_embed": VideoEncoder(STUDENT).positions}}, tmp_path / "table.pth")
    assert read_initial(str(tmp_path / "table.pth"), STUDENT).weights.kind == "encoder"


def test_an_encoder_of_another_shape_is_refused_with_its_name(tmp_path: Path) -> None:
    torch.save({"model": umt_state()}, tmp_path / "umt.pth")
    with pytest.raises(
        WeightsError, match=r"^init: .*umt\.pth: its architecture is not the run's: depth 2 instead of 5"
    ):
        read_initial(str(tmp_path / "umt.pth"), replace(STUDENT, depth=5))


# -------------------------------------------------------------------------------------------------------- tubelets


@pytest.mark.parametrize("kind", ["stm", "official"])
@torch.no_grad()
def test_tubelets_of_two_frames_become_one_that_sees_a_still_picture_alike(kind: str, tmp_path: Path) -> None:
    """A clip of the student's frames is to it what the clip of each frame twice is to the source."""
    torch.manual_seed(0)
    a = replace(STUDENT, tubelet=2, frames=8)
    source = VideoEncoder(a).eval()
    path = tmp_path / ("videomae.safetensors" if kind == "stm" else "videomae.pth")
    if kind == "stm":
        save(source, path)
    else:
        from stm.models.weights.checks import gather_weights
        from stm.models.weights.videomae import write_official

        write_official(gather_weights(source), path)
    found = read_initial(str(path), STUDENT)
    video = make_clip()[0]
    student = build_encoder(found.weights).eval()
    assert student.architecture.slots == source.architecture.slots
    torch.testing.assert_close(student(video), source(video.repeat_interleave(2, dim=1)), atol=1e-5, rtol=1e-5)
    assert found.notes == (
        "its tubelets have 2 frames, the student's 1: the embedding's weights are summed over the frames",
    )


def test_a_decoder_of_longer_tubelets_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    state = pretraining_state(384, 2, 192, 1, 8)  # VideoMAE's own, of a width that it has
    torch.save({"model": state}, tmp_path / "videomae.pth")
    student = replace(STUDENT, width=384, heads=6)
    found = read_initial(str(tmp_path / "videomae.pth"), student)
    assert found.weights.kind == "encoder" and found.notes[0].endswith(
        "its decoder predicts tubelets of that length and is left out"
    )
    same = read_initial(str(tmp_path / "videomae.pth"), replace(student, tubelet=2))
    assert same.weights.kind == "pretraining" and same.notes == ()


# ------------------------------------------------------------------------------------------------------------ CLIP


@torch.no_grad()
def test_a_clip_s_patches_blocks_and_norm_become_the_student_s() -> None:
    """Past the class token and positions, the student computes what CLIP's tower does."""
    tower = open_clip.create_model(DEMO, require_pretrained=True, weights_only=True).visual.eval()
    a = Architecture(48, 12, 1, 4, width=128, depth=4, heads=4, decoder_width=64, decoder_depth=1, decoder_heads=2)
    found = read_initial(f"clip:{DEMO}", a)
    student = build_encoder(found.weights).eval()
    assert student.architecture == a
    video, clip = make_clip(a)
    patches = tower.conv1(clip.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(student.embedding(video, None), patches.unflatten(0, (2, 4)).flatten(1, 2))
    states = x = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1))
    for block in student.blocks:
        x = block(x)
    expected = tower.ln_post(tower.transformer(states))
    torch.testing.assert_close(student.norm(x), expected, atol=2e-5, rtol=1e-4)
    assert len(found.notes) == 1 and "class token, positions" in found.notes[0]


def test_a_clip_with_quick_gelu_is_taken_with_a_word_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import stm.pretrained.clip as clip_model

    tower = open_clip.transformer.VisionTransformer(32, 8, 48, 2, 3, 4.0, act_layer=open_clip.transformer.QuickGELU)
    monkeypatch.setattr(clip_model, "load_clip", lambda *_, **__: SimpleNamespace(model=SimpleNamespace(visual=tower)))
    assert "QuickGELU" in read_initial("clip:any", STUDENT).notes[1]
    scaled = open_clip.transformer.VisionTransformer(32, 8, 48, 2, 3, 4.0, ls_init_value=0.1)
    monkeypatch.setattr(clip_model, "load_clip", lambda *_, **__: SimpleNamespace(model=SimpleNamespace(visual=scaled)))
    with pytest.raises(WeightsError, match="must be a plain open_clip ViT"):
        read_initial("clip:any", STUDENT)


def test_a_clip_that_does_not_fit_or_is_not_there_is_named() -> None:
    with pytest.raises(
        WeightsError, match=r"^init: clip:.*: its architecture is not the run's: patch_size 12 instead of 8"
    ):
        read_initial(f"clip:{DEMO}", STUDENT)
    with pytest.raises(WeightsError, match=r"^init 'local-dir:nowhere'"):
        read_initial("clip:local-dir:nowhere", STUDENT)


# ------------------------------------------------------------------------------------------------------------- run


@torch.no_grad()
def test_a_run_s_encoder_starts_from_it_and_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stm.models.vit import VideoMAE
    from stm.training.initialise import start_from

    state = umt_state()
    path = str(tmp_path / "umt.pth")
    torch.save({"model": state}, path)
    encoder, whole = VideoEncoder(STUDENT), VideoMAE(STUDENT)
    starts = [start_from(encoder, path), start_from(whole, path)]
    told = capsys.readouterr().err
    assert (
        told.count("left out: clip_decoder") == 2
        and told.count("it has no decoder; the run's decoder is freshly initialised") == 1
    )
    assert starts[0] == starts[1] and not starts[0].decoder
    tokens = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(1))
    expected = norm(transform(tokens, state, "encoder.", 3), state, "encoder.norm")
    for start in (encoder.eval(), whole.encoder.eval()):
        x = tokens
        for block in start.blocks:
            x = block(x)
        torch.testing.assert_close(start.norm(x), expected, atol=1e-5, rtol=1e-5)
