"""The demo's temporal transformer: what ActionCLIP's is to its CLIP, to the demo's small CLIP.

STM's teacher is ActionCLIP, whose temporal transformer turns the features of frames into features of a video. Here a small one
is trained to tell how the named object of generated clips moves, which no single frame shows, on the frozen features of
the demo's CLIP. As STM applies it, it sees the frames of one place at a time; a linear classifier, which is discarded, sees all
places. ActionCLIP trains on one vector per frame: a model of this size would have to find the object in it first.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from stm.config import FrameTeacher as TeacherSettings
from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes.clip_spec import draw_clip_spec
from stm.datasets.moving_shapes.motions import MOTIONS
from stm.datasets.moving_shapes.render import render_clip
from stm.demo.frames import TRAIN_SPLIT
from stm.demo.optimizer import MuonAdamW
from stm.jobs.progress import Progress, track
from stm.models.teachers.frame_teacher import FrameTeacher
from stm.models.teachers.temporal_fusion import FOLDER_FILE, HEADS_KEY, TemporalFusion
from stm.storage.files import write_bytes

SIDE, STUDENT_PATCH = 6, 8  # tokens per side, and pixels per token, of the small studies' clips
STORED, CLIP_FRAMES = 8, 4  # stored frames per clip, and frames of a training sample
TABLE, LAYERS, HEADS = 8, 2, 2  # frames that the table of positions has; blocks; heads, for a width of 96
CLIPS_PER_STEP = 32


def make_demo_fusion(folder: Path, clip: str, seed: int = 0, clips: int = 3000, steps: int = 1500) -> float:
    """Train the transformer and write it to `folder`.

    Args:
        clip: the CLIP whose features it takes, in the syntax of `teacher.model`.
        clips: generated clips to train on, which are not those of the demo.
        steps: of 32 clips each.

    Returns:
        The accuracy of the motions in the last tenth of the steps.
    """
    torch.manual_seed(seed)
    settings = TeacherSettings(model=clip, layers=1, normalisation="own")
    teacher = FrameTeacher.load(settings, SIDE)
    features, labels = encode_clips(teacher, seed, clips)
    width = teacher.feature_width
    fusion = TemporalFusion(width, TABLE, HEADS, LAYERS)
    accuracy = train_fusion(fusion, features, labels, steps, seed)
    state = {name: tensor.contiguous() for name, tensor in fusion.state_dict().items()}
    write_bytes(folder / FOLDER_FILE, save(state, {HEADS_KEY: str(HEADS)}))
    return accuracy


@torch.no_grad()
def encode_clips(teacher: FrameTeacher, seed: int, clips: int) -> tuple[Tensor, Tensor]:
    """The frozen features of generated clips, float32 [clips, STORED, SIDE^2, C], and their motions, int64 [clips]."""
    dataset = MovingShapesDataset(source="moving-shapes", distractors=1, moving_camera=0.5)
    motions, features, labels = list(MOTIONS), [], []
    for number in track(range(clips), "encode clips", clips, "clips"):
        spec = draw_clip_spec(seed, TRAIN_SPLIT, number, dataset)
        which = torch.linspace(0, spec.frames - 1, STORED).round().int().tolist()
        frames = torch.from_numpy(render_clip(spec, which).frames).permute(0, 3, 1, 2)
        size = (SIDE * STUDENT_PATCH, SIDE * STUDENT_PATCH)
        small = functional.interpolate(frames.float(), size, mode="area").round().byte()
        features.append(teacher(small[None]).features[0, 0].unflatten(0, (STORED, -1)))
        labels.append(motions.index(spec.label))
    return torch.stack(features), torch.tensor(labels)


def train_fusion(fusion: TemporalFusion, features: Tensor, labels: Tensor, steps: int, seed: int = 0) -> float:
    """Train the transformer on features of clips, as `encode_clips` returns them; return the accuracy of the last tenth.

    Each sample is every second or every stored frame of a clip from a random start, so that the speed is not the label.
    """
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(features.shape[2] * features.shape[3], len(MOTIONS))
    optimizer = MuonAdamW([fusion, classifier], steps)
    right: list[float] = []
    with Progress("fusion", steps, "steps") as progress:
        for _ in range(steps):
            clips = torch.randint(len(features), (CLIPS_PER_STEP,), generator=generator)
            step = int(torch.randint(1, 3, (), generator=generator))
            start = int(torch.randint(STORED - step * (CLIP_FRAMES - 1), (), generator=generator))
            chosen = features[clips, start : start + step * CLIP_FRAMES : step]
            fused = fusion(chosen.flatten(1, 2)[None], CLIP_FRAMES)[0].unflatten(1, (CLIP_FRAMES, -1))
            logits = classifier(fused.mean(dim=1).flatten(1))
            optimizer.step(functional.cross_entropy(logits, labels[clips]))
            right.append((logits.argmax(dim=1) == labels[clips]).float().mean().item())
            progress.advance()
    last = right[-max(1, steps // 10) :]
    return sum(last) / len(last)
