"""The demo's temporal transformer learns what no frame shows, and is read like ActionCLIP's."""

from pathlib import Path

import torch

from stm.config import FrameTeacher as TeacherSettings
from stm.demo.fusion import HEADS, STORED, TABLE, make_demo_fusion, train_fusion
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.teachers.temporal_fusion import FOLDER_FILE, TemporalFusion
from stm.storage.shipped import model_path

CLIP = "package:demo-clip"


def test_it_learns_the_order_of_frames() -> None:
    """Two classes: the same features in this order, and backwards. A frame alone says nothing."""
    torch.manual_seed(0)
    forward = torch.linspace(-1, 1, STORED)[None, :, None, None] * torch.randn(16)
    features = torch.cat([forward, -forward]).expand(2, STORED, 4, 16) + 0.05 * torch.randn(2, STORED, 4, 16)
    fusion = TemporalFusion(16, TABLE, 2, 1)
    assert train_fusion(fusion, features, torch.tensor([0, 1]), steps=300) > 0.95


def test_its_file_is_read_as_action_clips(tmp_path: Path) -> None:
    accuracy = make_demo_fusion(tmp_path, CLIP, clips=4, steps=2)
    assert 0 <= accuracy <= 1
    settings = TeacherSettings(model=CLIP, layers=2, temporal_fusion=str(tmp_path), normalisation="own")
    video = torch.randint(0, 256, (1, 4, 3, 48, 48), dtype=torch.uint8)
    fused = FrameTeacher.load(settings, 6)(video)
    plain = FrameTeacher.load(settings.model_copy(update={"temporal_fusion": None}), 6)(video)
    assert fused.features.shape == plain.features.shape == (2, 1, 144, 96)
    assert not torch.allclose(fused.features, plain.features)
    torch.testing.assert_close(fused.attention, plain.attention)  # masks are made from the same attention


def test_it_is_read_with_the_heads_that_it_was_trained_with(tmp_path: Path) -> None:
    make_demo_fusion(tmp_path, CLIP, clips=4, steps=1)
    for folder in (tmp_path, model_path("package:demo-fusion")):
        blocks = TemporalFusion.load(folder / FOLDER_FILE).transformer.resblocks
        assert {block.attn.num_heads for block in blocks} == {HEADS}
