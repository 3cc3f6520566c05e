"""Model cards: the README.md of an exported folder, with the hub's metadata, from what is known about the weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

import stm
from stm.models.weights.card_code import loading_blocks
from stm.models.weights.checks import Weights
from stm.models.weights.provenance import Provenance, get_nested

Format = Literal["stm", "videomae", "transformers", "timm"]
UNKNOWN = "unknown"
_METRICS = {
    "linear": "accuracy",
    "finetune": "accuracy",
    "zero_shot": "accuracy",
    "question_answering": "accuracy",
    "multiple_choice": "accuracy",
    "retrieval": "recall",
    "video_retrieval": "recall",
    "video_text_retrieval": "recall",
    "captioning": "cider",
}
_OBJECTIVES = {
    "alignment": "alignment with the teacher",
    "contrastive": "video-text contrast",
    "masked_language": "masked language modelling",
    "matching": "video-text matching",
    "relevance": "video-text relevance",
}
_FEW_CLIPS = 10_000
_MEASURED = """\
Measured by stm before the export, with all parts of the model. For a task with training, such as a probe or fine-tuning, the
number is that of the model trained from these weights.

"""
_CITATION = """\
```bibtex
@software{{stm,
  title = {{stm: masked video and video-language pretraining, from raw videos to published tables}},
  author = {{{{The stm developers}}}},
  version = {{{version}}},
  license = {{Apache-2.0}}
}}
```
"""


def write_card(
    weights: Weights, facts: Provenance, name: str, format: Format, license: str, omitted: Sequence[str] = ()
) -> str:
    """The text of a model card.

    Args:
        weights: the exported weights.
        facts: what is known about them; the card says of everything else that it is unknown.
        name: the folder's name.
        license: the weights' licence, as the hub abbreviates it, such as `apache-2.0` or `unknown`.
        omitted: what the export differs in from its source, in sentences without a full stop.
    """
    front = yaml.safe_dump(_metadata(weights, facts, format, license), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---\n",
        f"# {name}\n\n{_summary(weights, facts)}\n",
        *(f"## {title}\n\n{text}" for title, text in loading_blocks(weights, name, format)),
        f"## Training\n\n{_table(('', ''), _training(weights, facts, license))}",
        f"## Numbers\n\n{_numbers(facts)}",
        f"## Limits\n\n{_bullets(_limits(weights, facts, omitted))}",
        f"## Citation\n\nCite the method's paper, and the software:\n\n{_CITATION.format(version=stm.__version__)}",
    ]
    return "\n".join(sections)


def _metadata(weights: Weights, facts: Provenance, format: Format, license: str) -> dict[str, Any]:
    """The YAML header that the hub reads."""
    method = facts.setting("method")
    tags = ["video", "videomae", "stm", *([str(method)] if method else [])]
    data: dict[str, Any] = {
        "license": license,
        "library_name": format,
        "pipeline_tag": "video-classification" if weights.kind == "classifier" else "feature-extraction",
        "tags": list(dict.fromkeys(tags)),
    }
    if facts.dataset:
        data["datasets"] = [facts.dataset]
    tasks = (str(e.get("task")) for e in facts.evaluations.values())
    metrics = dict.fromkeys(_METRICS[task] for task in tasks if task in _METRICS)
    return data | ({"metrics": list(metrics)} if metrics else {})


def _summary(weights: Weights, facts: Provenance) -> str:
    a = weights.architecture
    millions = sum(tensor.numel() for name, tensor in weights.tensors.items() if name.startswith("encoder.")) / 1e6
    extra = {
        "encoder": "",
        "pretraining": ", with the decoder of its pretraining",
        "classifier": f", fine-tuned to classify {weights.classes} classes",
    }
    origin = "trained" if facts.receipt else f"converted from `{facts.source}`"
    return (
        f"A video encoder (ViT, {a.depth} blocks of width {a.width}, {millions:.1f} million parameters){extra[weights.kind]}, "
        f"{origin} with stm. It takes clips of {a.frames} RGB frames of {a.image_size} x {a.image_size} pixels, in tubelets of "
        f"{a.tubelet} x {a.patch_size} x {a.patch_size}."
    )


# -------------------------------------------------------------------------------------------------------
# training


def _training(weights: Weights, facts: Provenance, license: str) -> Iterator[tuple[str, str]]:
    yield "Licence of the weights", license
    yield "Pretraining data", _data(facts)
    yield from _method(facts)
    if facts.tuning:
        tuned = get_nested(facts.tuning, "optimisation") or {}
        length = f"epochs: {tuned.get('epochs', UNKNOWN)}, batch: {tuned.get('batch_size', UNKNOWN)} clips"
        yield "Fine-tuning", f"on the classes below, {length}"
    if weights.labels:
        yield "Classes", ", ".join(weights.labels[:20]) + (", …" if len(weights.labels) > 20 else "")
    versions = get_nested(facts.receipt, "versions") or {}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or UNKNOWN


def _method(facts: Provenance) -> Iterator[tuple[str, str]]:
    """How the run trained; every row is unknown for weights that no run of stm made."""
    optimisation = facts.setting("optimisation") or {}
    step = facts.receipt.get("step")
    release = facts.setting("release")
    if release:
        yield "Training", f"none here: published weights, taken from `{release}`"
        return
    if facts.setting("optimisation", "epochs") == 0:
        yield "Training", "none here: 0 epochs"
        yield from _start(facts)
        return
    yield "Method", f"`{facts.setting('method')}`" if facts.setting("method") else UNKNOWN
    yield "Mask", _mask(facts.setting("mask")) + _image_mask(facts)
    yield "Objectives", _objectives(facts) or UNKNOWN
    yield "Teacher", _teacher(facts)
    yield from _start(facts)
    if facts.receipt:
        images = facts.setting("images", "batch_size")
        batch = f"{optimisation.get('batch_size', UNKNOWN)} clips" + (f" and {images} images" if images else "")
        yield "Steps", str(step if step is not None else UNKNOWN)
        yield "Epochs", str(optimisation.get("epochs", UNKNOWN))
        yield "Batch", batch
        yield "Precision", str(facts.setting("precision") or UNKNOWN)
    else:
        yield "Steps and batch", UNKNOWN


def _start(facts: Provenance) -> Iterator[tuple[str, str]]:
    """The initial weights, and the seed of those that are random."""
    initial = facts.setting("init")
    yield "Initialised from", f"`{initial}`" if initial else ("random weights" if facts.receipt else UNKNOWN)
    if facts.receipt:
        yield "Seed", str(facts.receipt.get("seed", UNKNOWN))


def _data(facts: Provenance) -> str:
    if not facts.dataset:
        return "none here" if facts.setting("optimisation", "epochs") == 0 else UNKNOWN
    generated = " (generated)" if facts.dataset == "moving-shapes" else ""
    parts = [f"`{facts.dataset}`{generated}", f"split `{facts.setting('split')}`"]
    parts += [f"{facts.clips:,} clips"] if facts.clips else []
    images = facts.setting("images", "datasets")
    parts += [f"and images of {', '.join(f'`{name}`' for name in images)}"] if images else []
    return ", ".join(parts)


def _mask(mask: Any) -> str:
    strategy, ratio = get_nested(mask, "strategy"), get_nested(mask, "ratio")
    if strategy is None:
        return UNKNOWN
    return f"`{strategy}`, ratio {ratio}"


def _image_mask(facts: Provenance) -> str:
    mask = facts.setting("images", "mask")
    return f"; images: {_mask(mask)}" if mask else ""


def _objectives(facts: Provenance) -> str:
    """The objectives of nonzero weight."""
    target = {"normalised": "normalised pixels", "pixels": "pixels"}
    weighted = {
        f"reconstruction of {target.get(facts.setting('reconstruction', 'target'), 'pixels')}": facts.setting(
            "reconstruction", "weight"
        ),
        "masked video-text contrast": facts.setting("contrast", "weight"),
    }
    weighted |= {text: facts.setting("objectives", key) for key, text in _OBJECTIVES.items()}
    numbers = {name: weight for name, weight in weighted.items() if isinstance(weight, int | float) and weight}
    return "; ".join(f"{name} (weight {weight:g})" for name, weight in numbers.items())


def _teacher(facts: Provenance) -> str:
    if not facts.receipt:
        return UNKNOWN
    model = facts.setting("teacher", "model")
    return f"`{model}`" if model else "none"


# -------------------------------------------------------------------------------------------------------
# numbers and limits


def _numbers(facts: Provenance) -> str:
    evaluations = facts.evaluations.items()
    rows = [
        _number(name, metrics) for name, metrics in evaluations if get_nested(metrics, "headline", "value") is not None
    ]
    if not rows:
        return "No evaluation of these weights was found beside them: unknown.\n"
    return _MEASURED + _table(("evaluation", "task", "metric", "value", "95 % interval", "chance"), rows)


def _number(name: str, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    headline = metrics["headline"]
    scale, unit = headline.get("scale") or 1.0, headline.get("unit") or ""

    def show(value: float | None) -> str:
        return UNKNOWN if value is None else f"{value * scale:.1f}{f' {unit}' if unit else ''}"

    low, high = headline.get("interval") or (None, None)
    interval = "-" if low is None else f"{show(low)} to {show(high)}"
    chance = headline.get("chance")
    shown = (show(headline.get("value")), interval, "-" if chance is None else show(chance))
    return (f"`{name}`", str(metrics.get("task", UNKNOWN)), str(headline.get("label", UNKNOWN)), *shown)


def _limits(weights: Weights, facts: Provenance, omitted: Sequence[str]) -> Iterator[str]:
    untrained = facts.setting("optimisation", "epochs") == 0 and not facts.setting("release")
    if facts.rehearsal:
        yield "Made by a rehearsal, from generated stand-ins for data and models: the weights and numbers mean nothing"
    if facts.dataset == "moving-shapes":
        yield "Pretrained on generated videos of moving shapes: good for trying the software, not for real videos"
    if 0 < facts.clips < _FEW_CLIPS:
        yield f"Pretrained on {facts.clips:,} clips only"
    if weights.architecture.width < 384:
        yield "A model far smaller than ViT-S"
    if weights.kind == "classifier":
        yield "Probabilities are not calibrated, and a clip of none of the classes still gets one of them"
    elif untrained:
        yield "Not trained here: the weights are the initial ones"
    if not facts.dataset and (facts.setting("init") or not untrained):
        yield "The pretraining data is unknown, and so are its licence and its biases"
    if facts.origin_license:
        yield (
            "Started from VideoMAE's weights, which are licensed CC BY-NC 4.0, not for commercial use: that holds for these "
            "weights, too"
        )
    elif facts.origin:
        yield (
            f"The licence of `{facts.origin}`, from which the weights started, holds for them, too (VideoMAE's "
            "published weights: CC BY-NC 4.0)"
        )
    yield "The number of frames and the image size are fixed; other sizes are cropped and resized first"
    yield from omitted


def _bullets(lines: Iterator[str]) -> str:
    return "".join(f"- {line}.\n" for line in lines)


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in lines)


def _cell(value: object) -> str:
    """A table's cell, on a single line, such as a class's name with line breaks."""
    return " ".join(str(value).split()).replace("|", "\\|")
