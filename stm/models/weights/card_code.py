"""The code of a model card, by format: loading, features or classes of a clip, and fine-tuning."""

from collections.abc import Sequence

from stm.models.sizes import SIZES
from stm.models.weights.checks import Weights

_NAME = "`{name}` is this folder; once it is on the hub, give `owner/{name}` instead."
_FRAMES = "frames = torch.zeros({frames}, 3, {size}, {size}, dtype=torch.uint8)  # {frames} RGB frames of a video"

_TRANSFORMERS = (
    (
        "Loading",
        _NAME,
        """\
import torch
from transformers import {model}, AutoVideoProcessor

processor = AutoVideoProcessor.from_pretrained("{name}")
model = {model}.from_pretrained("{name}").eval()
""",
    ),
    (
        "{features}",
        "",
        """\
{clip}
with torch.inference_mode():
    output = model(**processor(frames, return_tensors="pt"))
{result}
""",
    ),
    (
        "Fine-tuning",
        "A classifier of your own classes, to be trained with transformers' `Trainer` or a loop of yours:",
        """\
from transformers import AutoModelForVideoClassification

classifier = AutoModelForVideoClassification.from_pretrained(
    "{name}", num_labels=10, use_mean_pooling=True, ignore_mismatched_sizes=True
)
""",
    ),
)
_TIMM = (
    (
        "Loading",
        "Needs timm only. `local-dir:{name}` is this folder; once it is on the hub, give `hf-hub:owner/{name}` instead.",
        """\
import timm
import torch

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
""",
    ),
    (
        "{features}",
        "timm's ViT is for images, so a clip is arranged as one: each tubelet's frames along the channels, the time slots below "
        "each other.",
        """\
{clip}
mean, std = (torch.tensor(model.pretrained_cfg[key][::{tubelet}]).view(3, 1, 1, 1) for key in ("mean", "std"))
pixels = (frames.transpose(0, 1) / 255 - mean) / std  # [3, {frames}, {size}, {size}]
image = pixels.unflatten(1, ({slots}, {tubelet})).transpose(1, 2).flatten(2, 3).flatten(0, 1)
with torch.inference_mode():
    output = model(image[None])
{result}
""",
    ),
    (
        "Fine-tuning",
        "A classifier of your own classes, to be trained like any timm model:",
        """\
classifier = timm.create_model("local-dir:{name}", pretrained=True, num_classes=10, drop_path_rate=0.1)
""",
    ),
)
_STM = (
    (
        "Loading",
        _NAME,
        """\
import torch
from stm.models.weights import zoo

model = zoo.{loader}("{name}").eval()
""",
    ),
    (
        "{features}",
        "Pixels are normalised inside.",
        """\
{clip}
with torch.inference_mode():
    output = model(frames[None])
{result}
""",
    ),
)
_VIDEOMAE = (
    (
        "Loading",
        "For VideoMAE's own scripts: `--finetune {name}/checkpoint.pth`. With stm:",
        _STM[0][2],
    ),
    _STM[1],
)
_FINE_TUNING = """\
name: mine
dataset: {{source: folder, root: videos, annotations: videos/annotations.csv}}
pack: {{similarity: false, motion: false}}
pretrain:
  given: {{init: {name}, {geometry}, optimisation: {{epochs: 0, warmup_epochs: 0}}}}
evaluate:
  actions: {{task: finetune, optimisation: {{epochs: 30, warmup_epochs: 5, batch_size: 32}}}}
"""
_FINE_TUNING_TEXT = (
    "On your own videos, with a CSV of the columns `path`, `label` and `split` (`train` or `test`): a config for `snakemake "
    "--configfile mine.yaml`, with 0 epochs of pretraining. The classifier is then in `results/mine/evaluate/given/actions`."
)


def loading_blocks(weights: Weights, name: str, format: str) -> list[tuple[str, str]]:
    """Title and Markdown of each section with code; `name` is the folder's."""
    a = weights.architecture
    values = {
        "name": name,
        "frames": a.frames,
        "size": a.image_size,
        "tubelet": a.tubelet,
        "slots": a.slots,
        "tokens": a.tokens,
        "width": a.width,
        "features": "Classes" if weights.kind == "classifier" else "Features",
        "loader": "load_classifier" if weights.kind == "classifier" else "load_encoder",
        "model": "AutoModelForVideoClassification" if weights.kind == "classifier" else "AutoModel",
        "clip": _FRAMES.format(frames=a.frames, size=a.image_size),
        "result": _result(weights, format),
    }
    templates: Sequence[tuple[str, str, str]]
    templates = {"transformers": _TRANSFORMERS, "timm": _TIMM, "stm": _STM, "videomae": _VIDEOMAE}[format]
    blocks = [
        (title.format(**values), _fence(text.format(**values), "python", code.format(**values)))
        for title, text, code in templates
    ]
    geometry = _geometry(weights)
    if format in ("stm", "videomae") and geometry is not None:
        code = _FINE_TUNING.format(name=name, geometry=geometry)
        blocks.append(("Fine-tuning", _fence(_FINE_TUNING_TEXT, "yaml", code)))
    return blocks


def _result(weights: Weights, format: str) -> str:
    if weights.kind == "classifier":
        logits = "output.logits" if format == "transformers" else "output"
        return f"probabilities = {logits}.softmax(dim=-1)  # [1, {weights.classes}]"
    features = {
        "transformers": "output.last_hidden_state.mean(dim=1)  # the mean of the tokens, ",
        "timm": "output  # the mean of the tokens, which `forward_features` returns, ",
    }.get(format, "output.mean(dim=1)  # the mean of the tokens, ")
    return f"features = {features}[1, {weights.architecture.width}]"


def _geometry(weights: Weights) -> str | None:
    """The keys of a run whose student has this architecture, where they differ from the defaults; None if no run has it."""
    a = weights.architecture
    shape = (a.width, a.depth, a.heads)
    size = next((name for name, size in SIZES.items() if (size.width, size.depth, size.heads) == shape), None)
    if size is None or a.position_frames is not None:
        return None
    values = {
        "model": (size, "base"),
        "image_size": (a.image_size, 224),
        "patch_size": (a.patch_size, 16),
        "tubelet": (a.tubelet, 2),
        "frames": (a.frames, 16),
        "positions": (a.positions, "joint"),
        "position_period": (f"{a.position_period:g}", "10000"),
    }
    return ", ".join(
        f"{key}: {value}" for key, (value, default) in values.items() if value != default or key == "model"
    )


def _fence(text: str, language: str, code: str) -> str:
    return f"{text}\n\n```{language}\n{code}```\n".lstrip("\n")
