"""Cost of the masks of STM and ClusterSTM, as a share of the pretraining step in which each is used.

    python -m benchmarks.language_masking                  # CPU: a step of 2 clips, scaled to 32; some minutes on a core
    python -m benchmarks.language_masking --step-batch 32 --precision bf16

The runs are those of config/stm.yaml and config/clusterstm.yaml: ViT-B/16 at 224 pixels, their teachers, decoders, BERT and
objectives, with random weights and with 8 frames. A step is the teacher's forward pass, the student's forward and backward
pass, and AdamW's update, which is counted once whatever the number of measured clips. A mask is for 32
clips x 8 frames x 196 tokens, from the teacher's features to kept and hidden tokens. STM's mask is learned: its cost includes
the point predictor, blobs, mixing and sampling in training mode, and the backward pass from the mask to them. Mask and step
are measured in turns, and a share is the median over rounds. On a CPU, CPU time is measured, so that other load on the
machine has little influence.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BertConfig, BertTokenizer

from benchmarks._table import compare, cpu_seconds, report, wall_seconds
from stm.config import LanguageRun, load_config
from stm.masking import complement
from stm.methods.clusterstm import ClusterWise
from stm.methods.stm import SpatioTemporalBranch
from stm.methods.video_language import VideoLanguage
from stm.models.checkpointing import set_checkpointing
from stm.models.teachers.frame_teacher import FrameTeacher, TeacherOutput
from stm.models.teachers.open_clip import make_tower
from stm.models.teachers.temporal_fusion import TemporalFusion
from stm.models.text.small_bert import SPECIAL
from stm.models.text.split_bert import SplitBert, Tokenizer
from stm.models.video_language import VideoLanguageModel
from stm.models.weights import zoo
from stm.pretrained.local_files import ACTION_CLIP
from stm.training.optimizer import build_optimizer

CONFIGS, TARGET = Path(__file__).parents[1] / "config", 0.03
FUSION_FRAMES = 77  # rows of ActionCLIP's table of positions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="clips per mask")
    parser.add_argument("--step-batch", type=int, default=2, help="clips per measured step; 2 or more")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=["stm", "clusterstm"], choices=["stm", "clusterstm"])
    return parser.parse_args()


def read_run(system: str, a: argparse.Namespace) -> LanguageRun:
    run = load_config(CONFIGS / f"{system}.yaml").pretrain[system]
    assert isinstance(run, LanguageRun)
    return run.model_copy(update={"frames": a.frames, "precision": a.precision})


def make_language(run: LanguageRun) -> SplitBert:
    """A BERT of the size of bert-base-uncased, with random weights."""
    assert run.language is not None
    config = BertConfig()
    words = [*SPECIAL, *(f"word{number}" for number in range(config.vocab_size - len(SPECIAL)))]
    backend = BertTokenizer(vocab={word: number for number, word in enumerate(words)}).backend_tokenizer
    special = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = Tokenizer(backend.to_str(), special)
    return SplitBert(config, run.language.fusion_layer, tokenizer)


def make_teacher(run: LanguageRun, side: int) -> FrameTeacher:
    """The run's teacher with random weights."""
    stm = run.teacher.model.startswith(ACTION_CLIP)  # its image tower is a CLIP's
    name = "ViT-B-16-quickgelu" if stm else run.teacher.model.partition("@")[0]
    tower = make_tower(open_clip.create_model(name, pretrained=None).visual)
    fusion = TemporalFusion(tower.feature_width, FUSION_FRAMES) if run.teacher.temporal_fusion else None
    return FrameTeacher(tower, side, run.teacher.layers, fusion=fusion)


def make_method(run: LanguageRun, device: str) -> VideoLanguage:
    torch.manual_seed(0)
    assert run.language is not None
    architecture = zoo.describe(run)
    teacher = make_teacher(run, architecture.image_size // architecture.patch_size)
    model = VideoLanguageModel(zoo.VideoEncoder(architecture), make_language(run), run.language.embedding)
    branch = SpatioTemporalBranch if run.method == "stm" else ClusterWise
    method = VideoLanguage(model, branch(run, architecture, teacher), teacher, run).to(device)
    set_checkpointing(method, run.gradient_checkpointing)
    return method.train()


def make_batch(method: VideoLanguage, run: LanguageRun, clips: int, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = (run.image_size // run.patch_size) ** 2
    shape = (clips, run.frames, 3, run.image_size, run.image_size)
    captions = torch.randint(10**4, (clips, 12), generator=generator).tolist()
    batch = {
        "video": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "noise": torch.rand(clips, run.frames, tokens, generator=generator),
        "text": normalize(torch.randn(clips, method.teacher.feature_width, generator=generator), dim=-1),
        "clip": torch.arange(clips),
        "tokens": method.encode_captions([" ".join(f"word{number}" for number in row) for row in captions]),
    }
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    return {**moved, "guides": {"noise": moved["noise"]}}


def make_teacher_output(method: VideoLanguage, run: LanguageRun, clips: int, device: str) -> TeacherOutput:
    """Random values in place of a teacher's output for `clips` clips, without the features, which masks do not read."""
    generator = torch.Generator().manual_seed(1)
    tokens, teacher = (run.image_size // run.patch_size) ** 2, method.teacher
    return TeacherOutput(
        features=torch.empty(0, device=device),
        attention=torch.rand(clips, run.frames, tokens, generator=generator).softmax(dim=-1).to(device),
        tokens=torch.randn(clips, run.frames, tokens, teacher.token_width, generator=generator).to(device),
        stem=torch.randn(clips, run.frames * tokens, teacher.stem_width, generator=generator).to(device),
    )


def make_mask(method: VideoLanguage, run: LanguageRun, clips: int, device: str) -> Callable[[], Tensor]:
    """Draws the masks of so many clips; STM's with the backward pass from the mask to what drew it."""
    branch: Any = method.branch
    teacher_output = make_teacher_output(method, run, clips, device)
    noise = torch.rand(teacher_output.attention.shape, generator=torch.Generator().manual_seed(2)).to(device)
    batch = {"video": torch.empty(clips, run.frames, device=device), "guides": {"noise": noise}}

    def build() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=run.precision == "bf16"):
            if not isinstance(branch, SpatioTemporalBranch):
                return branch.mask(batch, teacher_output)[1]
            sampled = branch.sample(batch, teacher_output)
            assert sampled is not None
            kept = branch.masks.keep(batch, teacher_output, {"spatiotemporal": sampled.score.detach()})
            hidden = complement(kept, sampled.weight[0].numel())
        sampled.weight.backward(torch.rand_like(sampled.weight))
        return hidden

    return build


def make_step(
    method: VideoLanguage, run: LanguageRun, clips: int, device: str
) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """The forward and backward pass of a step, whose time grows with the clips, and the update, whose time does not."""
    batch, optimizer = make_batch(method, run, clips, device), build_optimizer(method, run.optimisation)

    def passes() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = method(batch)["loss"]
        loss.backward()
        return loss.detach()

    return passes, optimizer.step


def measure_all(run: LanguageRun, a: argparse.Namespace, device: str) -> tuple[list[float], list[float]]:
    """Seconds of the mask and of the step for `a.batch` clips, by round."""
    method = make_method(run, device)
    measure = wall_seconds if device == "cuda" else cpu_seconds
    (passes, update), mask = make_step(method, run, a.step_batch, device), make_mask(method, run, a.batch, device)
    masks, steps = [], []
    for turn in range(a.rounds + 1):
        # The mean of a mask before and one after the step cancels a linear drift of the machine's speed.
        before = measure(mask)
        whole = measure(passes) * a.batch / a.step_batch + measure(update)
        after = measure(mask)
        if turn > 0:  # the first round warms up
            masks.append((before + after) / 2)
            steps.append(whole)
    return masks, steps


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = parse_arguments()
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"base, {a.frames}x224^2, batch {a.batch}, {a.precision}, {where}, {a.rounds} rounds")
    if a.step_batch != a.batch:
        print(f"steps are measured with {a.step_batch} clips and scaled, except for AdamW")
    print(f"\n{'':12}{'mask s':>10}{'step s':>10}{'share':>10}{'min':>9}{'max':>9}")
    rows, worst = [], 0.0
    for system in a.systems:
        masks, steps = measure_all(read_run(system, a), a, device)
        speed, step = f"{statistics.median(masks):.2f} s", f"its ViT-B step, {statistics.median(steps):.1f} s"
        row = compare(f"mask of {system}, {a.batch} clips", speed, masks, steps, step, f"at most {TARGET:g}")
        rows.append(row)
        assert row.ratio is not None
        worst = max(worst, row.ratio)
        print(
            f"{system:12}{statistics.median(masks):10.2f}{statistics.median(steps):10.1f}{row.ratio:10.2%}"
            f"{row.low:9.2%}{row.high:9.2%}",
            flush=True,
        )
    print(f"\nthe most expensive mask: {worst:.2%} of a step; target: at most {TARGET:.0%}")
    report(rows)


if __name__ == "__main__":
    main()
