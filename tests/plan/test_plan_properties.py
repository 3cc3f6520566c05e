"""The plan's costs: each moves with what it depends on, by the right factor, and with nothing else."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stm.config import parse_config
from stm.plan.clips import Clips, Texts
from stm.plan.make import Plan, describe_plan, make_plan, write_plan

ASSETS = Path(__file__).parents[2] / "stm/assets"
CLIP = f"local-dir:{ASSETS / 'demo-clip'}"  # 4 blocks of width 128; 16 patches of 12 x 12 pixels and a class token; vectors of 96
BERT = str(ASSETS / "demo-bert")
BERT_LAYERS = json.loads((ASSETS / "demo-bert/config.json").read_text())["num_hidden_layers"]
OPTIMISATION = {"epochs": 10, "batch_size": 40, "warmup_epochs": 1}
MAE = {
    "dataset": "videos",
    "model": "tiny",  # 4 blocks of width 128, decoder of 2 blocks of width 64
    "image_size": 32,
    "patch_size": 8,  # 16 tokens per slot
    "frames": 8,
    "tubelet": 2,  # 4 slots
    "mask": {"strategy": "tube", "ratio": 0.75},  # 4 of 16 tokens stay visible
    "optimisation": OPTIMISATION,
}
UMT = {
    "dataset": "videos",
    "method": "umt",
    "model": "tiny",
    "image_size": 32,
    "patch_size": 8,
    "frames": 4,
    "mask": {"strategy": "attention", "ratio": 0.75},
    "teacher": {"model": CLIP, "layers": 2},
    "language": {"model": BERT, "fusion_layer": 1, "max_tokens": 10},
    "optimisation": OPTIMISATION,
}
STAGES: dict[str, Any] = {
    "shard_size": 50,
    "grid": 8,
    "frames": {"every": 4, "short_side": 64},
    "captions": {
        "blip2": {"kind": "blip2", "model": "hub/blip2", "key_frames": 3, "batch_size": 10, "max_new_tokens": 20},
        "label": {"kind": "label", "templates": ["{}.", "a video of {}."]},
        "human": {"kind": "human"},
        "llm": {"kind": "llm", "model": "hub/llm", "prompts": ["What is {}?"], "batch_size": 8, "max_new_tokens": 10},
    },
    "similarity": {"model": CLIP, "keep_embeddings": True},
    "text": {"model": CLIP},
    "flow": {"cells": 2},
}
VALUES: dict[str, Any] = {
    "name": "study",
    **STAGES,
    "datasets": {
        "videos": {
            "dataset": {"source": "moving-shapes", "frames": 40, "width": 160, "height": 128},
            "pack": {"captions": ["blip2", "label"], "similarity": True, "motion": True, "flow": True, "text": True},
            "mask_quality": {"split": "test"},
        },
        "pictures": {
            "dataset": {"source": "moving-shapes", "frames": 8, "width": 80, "height": 80},
            "pack": {"captions": "label", "similarity": False, "motion": False, "text": True},
        },
    },
    "pretrain": {
        "tube": MAE,
        "contrast": MAE | {"reconstruction": {"weight": 0}, "contrast": {"hidden": 16}},
        "control": MAE | {"reconstruction": {"weight": 0}, "contrast": {"hidden": 16, "weight": 0}},
        "guided": MAE | {"mask": {"strategy": "attention", "ratio": 0.75}, "teacher": {"model": CLIP}},
        "umt": UMT,
        "joint": UMT
        | {"images": {"datasets": ["pictures"], "batch_size": 40, "mask": {"strategy": "attention", "ratio": 0.5}}},
    },
    "evaluate": {
        "linear": {"task": "linear", "runs": ["tube"]},
        "finetune": {
            "task": "finetune",
            "runs": ["tube"],
            "optimisation": {"epochs": 5, "batch_size": 40, "warmup_epochs": 1},
            "augmentation": {"auto_augment": None},
            "views": 2,
        },
        "zero": {"task": "zero_shot", "runs": ["contrast"]},
        "neighbours": {"task": "video_retrieval", "runs": ["tube"]},
        "rerank": {
            "task": "video_text_retrieval",
            "runs": ["umt"],
            "depth": 4,
            "optimisation": {"epochs": 2, "batch_size": 40},
            "validation_split": "val",
        },
    },
}
VIDEOS = Clips(
    {"train": 400, "val": 100, "test": 200},
    frames=40,  # 10 stored
    width=160,
    height=128,
    basis="here",
    texts={"train": Texts(800, 0, 0), "val": Texts(100, 0, 0), "test": Texts(400, 0, 0)},
)
PICTURES = Clips({"train": 300}, frames=1, width=80, height=80, basis="here")
Corpora = dict[str, Clips]
Values = dict[str, Any]


def copy_values() -> Values:
    """A copy of the config in which no section is shared, as `copy.deepcopy` would leave them."""
    copied: Values = json.loads(json.dumps(VALUES))
    return copied


# ------------------------------------------------------------------------------------------ the arithmetic, by hand

# FLOP/s of an H200 in float32 at the assumed share of its peak, and of a core; seconds to start a job that runs a network.
GPU, CORE, START = 0.32 * 67e12, 90e9, 5.0
LOAD = 8.9e-9  # seconds of decoding and cropping per pixel
CELLS, STORED_PIXELS = 8 * 10, 64 * 80


def blocks(tokens: int, width: int = 128, depth: int = 4) -> float:
    return depth * 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)


def encode(tokens: int, values: int) -> float:
    return 2 * tokens * values * 128 + blocks(tokens)


IMAGE = 2 * 16 * 3 * 12**2 * 128 + 2 * 3 * 12**2 * 128 + blocks(17)  # of the small CLIP
DENSE_FRAME = 2 * 80 * 3 * 12**2 * 128 + 2 * 3 * 12**2 * 128 + blocks(81)  # all 80 cells at once
LARGE_IMAGE = 2 * 64 * 3 * 12**2 * 128 + 2 * 3 * 12**2 * 128 + blocks(65)
BF16 = 67 / 989.5  # of the time in float32, on an H200
RAFT = 2 * 7000 * STORED_PIXELS * (24_000 + 6 * 27_400)  # both directions of all stored frames
DECODE = 2 * 16 * 128 * 64 + blocks(64, 64, 2) + 2 * 48 * 64 * 384  # 16 visible and 48 hidden tokens
# Forward, and twice as much backward, except for the input that needs no gradient.
MAE_STEP = 3 * (encode(16, 384) + DECODE) - 2 * 16 * 384 * 128


def text_side(memory: int) -> float:
    """One layer of text alone, then the other ones with cross-attention, for the losses of UMT's second stage."""
    layers = BERT_LAYERS - 1
    crossing = layers * 2 * (2 * 10 * 128**2 + 2 * memory * 128**2 + 2 * 10 * memory * 128)
    fusion = blocks(10, depth=layers) + crossing
    return 2 * blocks(10, depth=1) + 4 * fusion  # contrast, words; three pairs of matching, words


def pair(tokens: int) -> float:
    layers = BERT_LAYERS - 1
    return blocks(10, depth=layers) + layers * 2 * (2 * 10 * 128**2 + 2 * tokens * 128**2 + 2 * 10 * tokens * 128)


def pass_of_tuning(frames: int = 4) -> float:
    """Forward: a clip, a caption and three pairs."""
    return encode(frames * 16, 192) + blocks(10, depth=1) + 3 * pair(frames * 16)


def rerank(tests: int = 200, frames: int = 4) -> float:
    """Fine-tuning for 2 epochs with validation, and a test with 4 candidates per query; all clips have 400 captions in test."""
    clip, text = encode(frames * 16, 192), blocks(10, depth=1)
    tuning = 2 * 800 * 3 * pass_of_tuning(frames) + 2 * (100 * clip + 100 * text)
    return tuning + tests * clip + 400 * text + (400 * 4 + tests * 4) * pair(frames * 16)


CLIP_STEP = 3 * (encode(4 * 4, 192) + text_side(4 * 4)) + 4 * IMAGE
IMAGE_STEP = 3 * (encode(8, 192) + text_side(8)) + IMAGE


# ----------------------------------------------------------------------------------------------------- measuring

NETWORKS = ("captions", "embeddings", "joint_similarity", "similarity", "text", "pretrain", "evaluate")
Line = dict[str, float]


def measure(plan: Plan) -> dict[str, Line]:
    """Each line's jobs, seconds of work on cores or a GPU without the start of jobs, gigabytes and seconds of loading."""
    lines = {}
    for line in plan.stages:
        start = START * line.jobs if line.stage.partition("/")[0] in NETWORKS else 0.0
        lines[line.stage] = {
            "jobs": line.jobs,
            "cpu": line.cpu_hours * 3600 - start,
            "gpu": line.gpu_hours * 3600 - start if line.gpu_hours else 0.0,
            "gb": line.gigabytes,
            "loading": line.loading_hours * 3600,
        }
    return lines


@pytest.fixture
def plan_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Plan]:
    def make(values: Values = VALUES, corpora: Corpora | None = None) -> Plan:
        known = corpora or {"videos": VIDEOS, "pictures": PICTURES}
        queue = list(known.values())
        monkeypatch.setattr("stm.plan.make.count_clips", lambda config: queue.pop(0))
        return make_plan(parse_config(values | {"results": str(tmp_path)}))

    return make


def test_every_line_has_the_cost_that_is_written_out_by_hand(plan_of: Callable[..., Plan]) -> None:
    stored = 700 * 10
    read = LOAD * STORED_PIXELS  # seconds of decoding a stored frame
    gigabytes = {
        "generate/videos": 700 * 5e-5,
        "generate/pictures": 300 * 5e-5,
        "frames/videos": stored * STORED_PIXELS * 0.25 / 1e9,
        "frames/pictures": 300 * 64 * 64 * 0.25 / 1e9,
        "embeddings/videos": stored * CELLS * 96 * 2 / 1e9,
        "similarity/videos/blip2": stored * CELLS * 3 * 2 / 1e9,
        "similarity/videos/label": stored * CELLS * 2 * 2 / 1e9,
        "similarity/videos/human": 200 * 10 * CELLS * 2 / 1e9,
        "similarity/videos/llm": 200 * 10 * CELLS * 2 / 1e9,
        "text/videos/blip2": 700 * 3 * 1e-6,
        "text/videos/label": 700 * 2 * 1e-6,
        "text/pictures/label": 300 * 2 * 1e-6,
        "motion/videos": stored * CELLS * 7 / 1e9,
        "flow/videos": stored * CELLS * 4 * 8 / 1e9,
    }
    parts = ("frames", "similarity/videos/blip2", "similarity/videos/label", "text", "motion", "flow")
    for dataset in ("videos", "pictures"):
        packed = [name for name in gigabytes if name.startswith(parts) and f"/{dataset}" in name]
        gigabytes[f"shards/{dataset}"] = sum(gigabytes[name] for name in packed)
    core_seconds = {
        "generate/videos": 700 * 40 * 4e-8 * 160 * 128,
        "generate/pictures": 300 * 8 * 4e-8 * 80 * 80,
        "manifest/videos": 700 * 0.02,
        "manifest/pictures": 300 * 0.02,
        "split/videos": 0,
        "split/pictures": 0,
        "frames/videos": 700 * 40 * (9.1e-4 + 4.64e-9 * 160 * 128),
        "frames/pictures": 300 * (9.1e-4 + 4.64e-9 * 80 * 80),
        "motion/videos": 700 * 40 * (1.34e-3 + 4.46e-9 * 160 * 128),
        "flow/videos": stored * 1.3e-7 * STORED_PIXELS,
        "shards/videos": 700 * 0.01,
        "shards/pictures": 300 * 0.01,
    }
    test = encode(64, 384)  # without a mask
    flops = {
        "captions/videos/blip2": 700 * 3 * 2 * (1.0e9 * 257 + 2.7e9 * 62),
        "captions/videos/label": 0,
        "captions/videos/human": 0,
        "captions/videos/llm": 200 * 2 * 7e9 * 10,
        "captions/pictures/label": 0,
        "embeddings/videos": stored * CELLS * IMAGE,
        **{f"similarity/videos/{source}": 0 for source in STAGES["captions"]},
        "text/videos/blip2": 700 * 3 * 5.9e9,
        "text/videos/label": 700 * 2 * 5.9e9,
        "text/pictures/label": 300 * 2 * 5.9e9,
        "pretrain/tube": 400 * 10 * MAE_STEP,
        "pretrain/contrast": 400 * 10 * (3 * encode(16, 384) - 2 * 16 * 384 * 128),
        "pretrain/control": 400 * 10 * encode(16, 384),
        "pretrain/guided": 400 * 10 * (MAE_STEP + 8 * IMAGE),
        "pretrain/umt": 400 * 10 * CLIP_STEP,
        "pretrain/joint": 400 * 10 * CLIP_STEP + 300 * 10 * IMAGE_STEP,
        "evaluate/tube/linear": (400 + 200) * test,
        "evaluate/tube/finetune": (400 * 5 * 3 + 200 * 2) * test,
        "evaluate/contrast/zero": 200 * test,
        "evaluate/tube/neighbours": (400 + 200) * test,
        "evaluate/umt/rerank": rerank(),
    }
    loading = {
        **{f"pretrain/{run}": 400 * 10 * 8 * read for run in ("tube", "contrast", "control", "guided")},
        "pretrain/umt": 400 * 10 * 4 * read,
        "pretrain/joint": 400 * 10 * 4 * read + 300 * 10 * LOAD * 64 * 64,
        "evaluate/tube/linear": 600 * 8 * read,
        "evaluate/tube/finetune": (400 * 5 + 200 * 2) * 8 * read,
        "evaluate/contrast/zero": 200 * 8 * read,
        "evaluate/tube/neighbours": 600 * 8 * read,
        "evaluate/umt/rerank": (2 * 800 + 2 * 100 + 200) * 4 * read,
    }
    tokens = {
        "captions/videos/blip2": 700 * 3 / 10 * 20 * 0.025,
        "captions/videos/llm": 200 / 8 * 10 * 0.025,
    }
    jobs = dict.fromkeys([*core_seconds, *flops, *gigabytes], 14)
    jobs |= {name: 6 for name in jobs if "pictures" in name} | {
        name: 4 for name in jobs if name.endswith(("human", "llm"))
    }
    jobs |= {name: 1 for name in jobs if name.startswith(("generate", "manifest", "split", "pretrain", "evaluate"))}
    found = measure(plan_of())
    assert set(found) == set(core_seconds) | set(flops)
    for name, line in found.items():
        seconds = core_seconds[name] if name in core_seconds else flops[name] / CORE
        on_gpu = flops.get(name, 0) / GPU + tokens.get(name, 0)
        expected = {"jobs": jobs[name], "cpu": seconds, "gpu": on_gpu, "gb": gigabytes.get(name, 0)}
        assert line == pytest.approx(expected | {"loading": loading.get(name, 0)}, rel=1e-9, abs=1e-9), name


# ------------------------------------------------------------------------------------ what moves, and by what factor

# A factor, or a function of all lines and the quantity that returns its new value.
Factor = float | Callable[[dict[str, Line], str], float]
Moves = dict[str, dict[str, Factor]]  # regular expression of lines -> factors of the quantities that change
WORK: dict[str, Factor] = {"cpu": 2, "gpu": 2}
RUN: dict[str, Factor] = {**WORK, "loading": 2}
SHARDED: dict[str, Factor] = {**WORK, "jobs": 2, "gb": 2}


def slower(factor: float) -> Moves:
    """A slower GPU: of the captions that a language model generates, only the arithmetic takes longer, not the tokens' passes."""

    def without(line: str, tokens: float) -> Factor:
        return lambda base, quantity: tokens + (base[line][quantity] - tokens) * factor

    return {
        r"embeddings/.*|text/.*|pretrain/.*|evaluate/.*": {"gpu": factor},
        "captions/videos/blip2": {"gpu": without("captions/videos/blip2", 105)},
        "captions/videos/llm": {"gpu": without("captions/videos/llm", 6.25)},
    }


def setting(path: str, value: Any) -> Callable[[Values, Corpora], None]:
    """Set one key of the config."""

    def change(values: Values, corpora: Corpora) -> None:
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value

    return change


def clips(dataset: str, **changes: Any) -> Callable[[Values, Corpora], None]:
    def change(values: Values, corpora: Corpora) -> None:
        corpora[dataset] = replace(corpora[dataset], **changes)

    return change


def packed(share: str, factor: float, dataset: str = "videos") -> Factor:
    """The shards' size if that of some of their parts changes by `factor`."""

    def grown(base: dict[str, Line], quantity: str) -> float:
        part = sum(line[quantity] for name, line in base.items() if re.fullmatch(share, name))
        return base[f"shards/{dataset}"][quantity] + (factor - 1) * part

    return grown


def joined(clip: float, image: float) -> Factor:
    """The factor of the work of clips and images together."""
    parts = 400 * CLIP_STEP, 300 * IMAGE_STEP
    return (clip * parts[0] + image * parts[1]) / sum(parts)


def joined_loading(clip: float, image: float) -> Factor:
    parts = 400 * 4 * 80, 300 * 64
    return (clip * parts[0] + image * parts[1]) / sum(parts)


DOUBLED = {split: 2 * count for split, count in VIDEOS.per_split.items()}
DOUBLED_TEXTS = {split: Texts(2 * texts.captions, 0, 0) for split, texts in VIDEOS.texts.items()}
OF_PACKED = r"(frames|motion|flow|shards|embeddings)/videos|(captions|similarity|text)/videos/(blip2|label)"
MAPS = r"(embeddings/videos|similarity/videos/\w+)"
PACKED_MAPS = r"(motion/videos|flow/videos|similarity/videos/(blip2|label))"
NOTHING: Moves = {}

# RandAugment's time relative to that of decoding, per training frame of 32 x 32 pixels.
RAND_AUGMENT = 2.9e-8 * 32 * 32 / (LOAD * STORED_PIXELS)


def embedded(share: float) -> Callable[[dict[str, Line], str], float]:
    """The cost of embedding a share of the clips, which replaces a cost of 0."""
    return lambda base, quantity: share * base["embeddings/videos"][quantity]


CHANGES: dict[str, tuple[Callable[[Values, Corpora], None], Moves]] = {
    "twice the videos": (
        clips("videos", per_split=DOUBLED, texts=DOUBLED_TEXTS),
        {
            r"(generate|manifest)/videos": {"cpu": 2, "gb": 2},
            r"(frames|motion|flow|shards|embeddings)/videos|(captions|similarity|text)/videos/\w+": SHARDED,
            r"pretrain/(tube|contrast|control|guided|umt)|evaluate/.*": RUN,
            "pretrain/joint": {"cpu": joined(2, 1), "gpu": joined(2, 1), "loading": joined_loading(2, 1)},
        },
    ),
    "twice the pictures": (
        clips("pictures", per_split={"train": 600}),
        {
            r"(generate|manifest)/pictures": {"cpu": 2, "gb": 2},
            r"(frames|shards)/pictures|(captions|text)/pictures/\w+": SHARDED,
            "pretrain/joint": {"cpu": joined(1, 2), "gpu": joined(1, 2), "loading": joined_loading(1, 2)},
        },
    ),
    "twice the test clips": (
        clips("videos", per_split={**VIDEOS.per_split, "test": 400}),
        {
            r"(generate|manifest)/videos": {"cpu": 9 / 7, "gb": 9 / 7},
            OF_PACKED: dict.fromkeys(SHARDED, 9 / 7),
            r"(captions|similarity)/videos/(human|llm)": SHARDED,  # only what mask quality is measured on
            r"evaluate/tube/(linear|neighbours)": dict.fromkeys(RUN, 8 / 6),
            "evaluate/contrast/zero": RUN,
            "evaluate/tube/finetune": {
                **dict.fromkeys(WORK, (6000 + 800) / (6000 + 400)),
                "loading": (2000 + 800) / (2000 + 400),
            },
            "evaluate/umt/rerank": {**{name: rerank(tests=400) / rerank() for name in WORK}, "loading": 2200 / 2000},
        },
    ),
    "longer videos": (
        clips("videos", frames=80),
        {
            r"(frames|motion|flow)/videos": {"cpu": 2, "gb": 2},
            MAPS: {**WORK, "gb": 2},
            "shards/videos": {"gb": packed(rf"frames/videos|{PACKED_MAPS}", 2)},
        },
    ),
    "longer generated videos": (
        setting("datasets.videos.dataset.frames", 80),
        {"generate/videos": {"cpu": 2}},  # the plan's other lines follow from the counted clips, which are given here
    ),
    "fewer stored frames": (
        setting("frames.every", 8),
        {
            r"(frames|motion)/videos": {"gb": 1 / 2},
            "flow/videos": {"cpu": 1 / 2, "gb": 1 / 2},
            MAPS: {"cpu": 1 / 2, "gpu": 1 / 2, "gb": 1 / 2},
            "shards/videos": {"gb": packed(rf"frames/videos|{PACKED_MAPS}", 1 / 2)},
        },
    ),
    "a limit of stored frames": (
        setting("frames.max_frames", 5),
        {
            r"(frames|motion|flow)/videos": {"cpu": 1 / 2, "gb": 1 / 2},
            MAPS: {"cpu": 1 / 2, "gpu": 1 / 2, "gb": 1 / 2},
            "shards/videos": {"gb": packed(rf"frames/videos|{PACKED_MAPS}", 1 / 2)},
        },
    ),
    "larger stored frames": (
        setting("frames.short_side", 128),
        {
            r"frames/\w+": {"gb": 4},
            "flow/videos": {"cpu": 4},
            r"pretrain/.*|evaluate/.*": {"loading": 4},
            "shards/videos": {"gb": packed("frames/videos", 4)},
            "shards/pictures": {"gb": packed("frames/pictures", 4, "pictures")},
        },
    ),
    "a finer grid": (
        setting("grid", 16),
        {
            r"(motion|flow)/videos": {"gb": 4},
            MAPS: {"cpu": 4, "gpu": 4, "gb": 4},
            "shards/videos": {"gb": packed(PACKED_MAPS, 4)},
        },
    ),
    "finer flow": (
        setting("flow.cells", 4),
        {"flow/videos": {"gb": 4}, "shards/videos": {"gb": packed("flow/videos", 4)}},
    ),
    "smaller shards": (
        setting("shard_size", 25),
        {r"(frames|motion|flow|shards|embeddings|captions|similarity|text)/.*": {"jobs": 2}},
    ),
    "shards that splits do not fill": (
        setting("shard_size", 60),
        {  # 7 of train, 2 of val, 4 of test; 5 of the pictures
            OF_PACKED: {"jobs": 13 / 14},
            r"(frames|shards)/pictures|(captions|text)/pictures/\w+": {"jobs": 5 / 6},
        },
    ),
    "more key frames": (
        setting("captions.blip2.key_frames", 6),
        {
            "captions/videos/blip2": WORK,
            "text/videos/blip2": {**WORK, "gb": 2},
            "similarity/videos/blip2": {"gb": 2},  # the embeddings are shared by all captions
            "shards/videos": {"gb": packed("(text|similarity)/videos/blip2", 2)},
        },
    ),
    "more templates": (
        setting("captions.label.templates", ["{}.", "{}!", "{}?", "a {}."]),
        {
            r"text/\w+/label": {**WORK, "gb": 2},
            "similarity/videos/label": {"gb": 2},
            "shards/videos": {"gb": packed("(text|similarity)/videos/label", 2)},
            "shards/pictures": {"gb": packed("text/pictures/label", 2, "pictures")},
        },
    ),
    "more prompts": (
        setting("captions.llm.prompts", ["What is {}?", "How is {}?"]),
        {"captions/videos/llm": WORK, "similarity/videos/llm": {"gb": 2}},
    ),
    "longer answers": (setting("captions.llm.max_new_tokens", 20), {"captions/videos/llm": WORK}),
    "larger batches of captions": (
        setting("captions.blip2.batch_size", 20),
        {"captions/videos/blip2": {"gpu": lambda base, quantity: base["captions/videos/blip2"][quantity] - 105 / 2}},
    ),
    "no mask quality": (setting("datasets.videos.mask_quality", None), {r".*/(human|llm)": {"absent": 0}}),
    "no packed similarity": (
        setting("datasets.videos.pack.similarity", False),
        {
            r"embeddings/videos|similarity/videos/(blip2|label)": dict.fromkeys(SHARDED, 2 / 7),
            "shards/videos": {"gb": packed("similarity/videos/(blip2|label)", 0)},
        },
    ),
    "no packed motion": (
        setting("datasets.videos.pack.motion", False),
        {
            "motion/videos": dict.fromkeys(SHARDED, 2 / 7),
            "shards/videos": {"gb": packed("motion/videos", 0)},
        },
    ),
    "no flow": (
        setting("datasets.videos.pack.flow", False),
        {"flow/videos": {"absent": 0}, "shards/videos": {"gb": packed("flow/videos", 0)}},
    ),
    "more epochs": (setting("pretrain.tube.optimisation.epochs", 20), {"pretrain/tube": RUN}),
    "no epochs": (
        setting("pretrain.tube.optimisation", {"epochs": 0, "batch_size": 40, "warmup_epochs": 0}),
        {"pretrain/tube": {"cpu": 0, "gpu": 0, "loading": 0}},
    ),
    "repeats": (setting("pretrain.tube.repeats", 2), {"pretrain/tube": WORK}),  # of the same decoded frames
    "repeats of clips and images": (setting("pretrain.joint.repeats", 2), {"pretrain/joint": WORK}),
    "accumulation": (setting("pretrain.tube.optimisation.accumulate", 4), NOTHING),
    "larger steps": (setting("pretrain.tube.optimisation.batch_size", 80), NOTHING),
    "more processes": (setting("pretrain.tube.processes", 4), NOTHING),
    "more nodes": (setting("pretrain.tube.nodes", 2), NOTHING),
    "more loading processes": (setting("pretrain.tube.workers", 8), NOTHING),
    "another seed": (setting("pretrain.tube.seed", 3), NOTHING),
    "another learning rate": (setting("pretrain.tube.optimisation.learning_rate", 0.1), NOTHING),
    "another stride": (setting("pretrain.tube.stride", 2), NOTHING),
    "the quality of JPEGs": (setting("frames.quality", 50), NOTHING),
    "motion vectors of the stream": (
        setting("motion.backend", "codec"),
        {"motion/videos": {"cpu": (7e-5 + 3.49e-9 * 160 * 128) / (1.34e-3 + 4.46e-9 * 160 * 128)}},
    ),
    "motion by block matching": (
        setting("motion.backend", "mestimate"),
        {"motion/videos": {"cpu": (5.9e-4 + 3.62e-9 * 160 * 128) / (1.34e-3 + 4.46e-9 * 160 * 128)}},
    ),
    "faster flow": (setting("flow.preset", "fast"), {"flow/videos": {"cpu": 3.6 / 13}}),
    "flow by RAFT": (
        setting("flow", {"cells": 2, "backend": "raft", "weights": "raft.pth", "iterations": 6}),
        {
            "flow/videos": {
                "cpu": lambda base, quantity: RAFT / CORE + START * 14,  # a job that loads a network
                "gpu": lambda base, quantity: RAFT / GPU + START * 14,
            }
        },
    ),
    "beams of captions": (  # the image is encoded once, and the passes through the weights take as long
        setting("captions.blip2.beams", 3),
        {
            "captions/videos/blip2": {
                "cpu": lambda base, quantity: 2100 * 2 * (1.0e9 * 257 + 3 * 2.7e9 * 62) / CORE,
                "gpu": lambda base, quantity: base["captions/videos/blip2"][quantity] + 2100 * 2 * 2 * 2.7e9 * 62 / GPU,
            }
        },
    ),
    "captions in 16 bits": (
        setting("captions.blip2.precision", "bfloat16"),
        {
            "captions/videos/blip2": {
                "gpu": lambda base, quantity: 105 + (base["captions/videos/blip2"][quantity] - 105) * BF16
            }
        },
    ),
    "patches in 16 bits": (setting("similarity.precision", "float16"), {"embeddings/videos": {"gpu": BF16}}),
    "texts in 16 bits": (setting("text.precision", "bfloat16"), {"text/.*": {"gpu": BF16}}),
    "training in 16 bits": (  # and what encodes clips in the precision of the run
        setting("pretrain.tube.precision", "bf16"),
        {"pretrain/tube": {"gpu": BF16}, "evaluate/tube/(linear|neighbours)": {"gpu": BF16}},
    ),
    "fine-tuning in 16 bits": (
        setting("evaluate.finetune.precision", "bf16"),
        {"evaluate/tube/finetune": {"gpu": BF16}},
    ),
    "another GPU": (setting("prices", {"gpu": "a100"}), slower(67 / 19.5)),
    "half of the share": (setting("prices", {"gpu_share": 0.16}), slower(2)),
    "other prices": (setting("prices", {"cpu_core_hour": 1, "gpu_hour": 2, "cores": 4, "gpus": 3}), NOTHING),
    "resizing on the device": (
        setting("pretrain.tube.resize_on", "device"),
        {"pretrain/tube": {"loading": 6.9 / 8.9}},
    ),
    "decoding on the device": (
        setting("pretrain.tube", MAE | {"resize_on": "device", "decode_on": "device"}),
        {"pretrain/tube": {"loading": 0.65 / 8.9}},
    ),
    "recomputed activations of the BERT": (
        setting("pretrain.umt.gradient_checkpointing", "text"),
        {"pretrain/umt": dict.fromkeys(WORK, (CLIP_STEP + text_side(4 * 4)) / CLIP_STEP)},
    ),
    "recomputed activations of the student and the BERT": (
        setting("pretrain.umt.gradient_checkpointing", "all"),
        {"pretrain/umt": dict.fromkeys(WORK, 1 + (CLIP_STEP - 4 * IMAGE) / 3 / CLIP_STEP)},
    ),
    "recomputed activations of encoder and decoder": (
        setting("pretrain.tube.gradient_checkpointing", "video"),
        {"pretrain/tube": dict.fromkeys(WORK, 1 + (encode(16, 384) + DECODE) / MAE_STEP)},
    ),
    "recomputed activations in fine-tuning with labels": (
        setting("evaluate.finetune.gradient_checkpointing", "video"),
        {"evaluate/tube/finetune": dict.fromkeys(WORK, (400 * 5 * 4 + 200 * 2) / (400 * 5 * 3 + 200 * 2))},
    ),
    "recomputed activations of the student in fine-tuning with text": (
        setting("evaluate.rerank.gradient_checkpointing", "video"),
        {"evaluate/umt/rerank": dict.fromkeys(WORK, 1 + 2 * 800 * encode(64, 192) / rerank())},
    ),
    "recomputed activations of both in fine-tuning with text": (
        setting("evaluate.rerank.gradient_checkpointing", "all"),
        {"evaluate/umt/rerank": dict.fromkeys(WORK, 1 + 2 * 800 * pass_of_tuning() / rerank())},
    ),
    "larger frames of the teacher": (  # 8 x 8 patches of 12 pixels instead of the student's 4 x 4
        setting("pretrain.guided.teacher", {"model": CLIP, "image_size": 96}),
        {"pretrain/guided": dict.fromkeys(WORK, (MAE_STEP + 8 * LARGE_IMAGE) / (MAE_STEP + 8 * IMAGE))},
    ),
    "another split": (setting("pretrain.tube.split", "val"), {"pretrain/tube": dict.fromkeys(RUN, 1 / 4)}),
    "more frames of a task": (
        setting("evaluate.rerank.frames", 8),
        {"evaluate/umt/rerank": {"loading": 2, **{name: rerank(frames=8) / rerank() for name in WORK}}},
    ),
    "more epochs of probing": (setting("evaluate.linear.epochs", 200), NOTHING),  # on cached features
    "more rates of probing": (setting("evaluate.linear.learning_rates", [0.1, 0.2, 0.3, 0.4]), NOTHING),
    "more views": (setting("evaluate.zero.views", 2), {"evaluate/contrast/zero": RUN}),
    "more crops": (setting("evaluate.zero.crops", 3), {"evaluate/contrast/zero": {"cpu": 3, "gpu": 3}}),
    "more epochs of fine-tuning": (
        setting("evaluate.finetune.optimisation.epochs", 10),
        {
            "evaluate/tube/finetune": {
                **dict.fromkeys(WORK, (12000 + 400) / (6000 + 400)),
                "loading": (4000 + 400) / (2000 + 400),
            }
        },
    ),
    "repeats of fine-tuning": (
        setting("evaluate.finetune.repeats", 2),
        {"evaluate/tube/finetune": dict.fromkeys(WORK, (12000 + 400) / (6000 + 400))},
    ),
    "another split to train on": (
        setting("evaluate.linear.train_split", "val"),
        {"evaluate/tube/linear": dict.fromkeys(RUN, (100 + 200) / 600)},
    ),
    "another split to test on": (
        setting("evaluate.zero.test_split", "val"),
        {"evaluate/contrast/zero": dict.fromkeys(RUN, 1 / 2)},
    ),
    "RandAugment in pretraining": (
        setting("pretrain.tube.augmentation", {"auto_augment": "rand-m7-n4-mstd0.5-inc1"}),
        {"pretrain/tube": {"loading": 1 + RAND_AUGMENT}},
    ),
    "RandAugment in fine-tuning": (
        setting("evaluate.finetune.augmentation.auto_augment", "rand-m7-n4-mstd0.5-inc1"),
        {"evaluate/tube/finetune": {"loading": 1 + RAND_AUGMENT * 2000 / 2400}},
    ),
    "RandAugment in fine-tuning with text": (
        setting("evaluate.rerank.augmentation", {"auto_augment": "rand-m7-n4-mstd0.5-inc1"}),
        {"evaluate/umt/rerank": {"loading": 1 + RAND_AUGMENT * 1600 / 2000}},
    ),
    "embeddings that are not kept": (
        setting("similarity.keep_embeddings", False),
        {
            "embeddings/videos": {"absent": 0},
            # All sources of a shard share one pass.
            "joint_similarity/videos": {name: embedded(1) for name in ("jobs", *WORK)},
        },
    ),
    "dense maps": (
        setting("similarity.method", "dense"),
        {"embeddings/videos": dict.fromkeys(WORK, DENSE_FRAME / (CELLS * IMAGE))},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_moves_what_depends_on_it_by_the_right_factor_and_nothing_else(
    name: str, plan_of: Callable[..., Plan]
) -> None:
    change, moves = CHANGES[name]
    values, corpora = copy_values(), {"videos": VIDEOS, "pictures": PICTURES}
    change(values, corpora)
    before, after = measure(plan_of()), measure(plan_of(values, corpora))
    before |= {line: dict.fromkeys(after[line], 0.0) for line in moves if line in after and line not in before}
    moved = set()
    for line, quantities in before.items():
        factors = {
            key: value for pattern, own in moves.items() if re.fullmatch(pattern, line) for key, value in own.items()
        }
        moved |= {pattern for pattern in moves if re.fullmatch(pattern, line)}
        if "absent" in factors:
            assert line not in after
            continue
        expected = {}
        for key, value in quantities.items():
            factor = factors.get(key, 1)
            expected[key] = factor(before, key) if callable(factor) else value * factor
        assert after[line] == pytest.approx(expected, rel=1e-9, abs=1e-9), line
    assert set(after) <= set(before) and moved == set(moves)


def test_each_seed_is_a_run_and_an_evaluation_of_its_own(plan_of: Callable[..., Plan]) -> None:
    values = copy_values()
    values["pretrain"]["tube"]["seeds"] = [0, 1, 2]
    before, after = measure(plan_of()), measure(plan_of(values))
    for line in [name for name in before if "tube" in name]:
        assert line not in after
        assert all(after.pop(line.replace("tube", f"tube-seed{seed}")) == before[line] for seed in range(3))
    assert after == {name: line for name, line in before.items() if "tube" not in name}


@pytest.mark.parametrize(
    ("changes", "tokens", "slots", "kept", "hidden", "values"),
    [
        ({"image_size": 64}, 256, 4, 64, 192, 384),
        ({"patch_size": 16}, 16, 4, 4, 12, 1536),
        ({"frames": 16}, 128, 8, 32, 96, 384),
        ({"tubelet": 4}, 32, 2, 8, 24, 768),
        ({"mask": {"strategy": "tube", "ratio": 0.5}}, 64, 4, 32, 32, 384),
        ({"mask": {"strategy": "tube", "ratio": 0.8}}, 64, 4, 16, 48, 384),  # int(0.8 x 16) = 12
        ({"decode_ratio": 0.5}, 64, 4, 16, 24, 384),
    ],
)
def test_a_step_of_masked_autoencoding_costs_what_its_tokens_do(
    changes: Values, tokens: int, slots: int, kept: int, hidden: int, values: int, plan_of: Callable[..., Plan]
) -> None:
    config = copy_values()
    config["pretrain"]["tube"] |= changes
    lines = measure(plan_of(config))
    decode = 2 * kept * 128 * 64 + blocks(kept + hidden, 64, 2) + 2 * hidden * 64 * values
    step = 3 * (encode(kept, values) + decode) - 2 * kept * values * 128
    assert lines["pretrain/tube"]["gpu"] * GPU == pytest.approx(4000 * step)
    assert lines["evaluate/tube/linear"]["gpu"] * GPU == pytest.approx(600 * encode(tokens, values))
    frames = config["pretrain"]["tube"]["frames"]
    assert lines["pretrain/tube"]["loading"] == pytest.approx(4000 * frames * LOAD * STORED_PIXELS)


@pytest.mark.parametrize(
    ("objectives", "texts", "fusions"),
    [
        ({}, 2, 4),
        ({"masked_language": 0}, 1, 3),
        ({"matching": 0}, 2, 1),
        ({"matching": 0, "masked_language": 0}, 1, 0),
        ({"alignment": 0}, 2, 4),
    ],
)
def test_a_step_with_text_costs_the_passes_of_its_objectives(
    objectives: Values, texts: int, fusions: int, plan_of: Callable[..., Plan]
) -> None:
    config = copy_values()
    config["pretrain"]["umt"]["objectives"] = objectives
    layers = BERT_LAYERS - 1
    crossing = layers * 2 * (2 * 10 * 128**2 + 2 * 16 * 128**2 + 2 * 10 * 16 * 128)
    text = texts * blocks(10, depth=1) + fusions * (blocks(10, depth=layers) + crossing)
    step = 3 * (encode(16, 192) + text) + 4 * IMAGE
    assert measure(plan_of(config))["pretrain/umt"]["gpu"] * GPU == pytest.approx(4000 * step)


def test_the_sums_and_the_price_are_those_of_the_lines(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    many = replace(VIDEOS, per_split={split: 100_000 * count for split, count in VIDEOS.per_split.items()})
    plan = plan_of(corpora={"videos": many, "pictures": PICTURES})  # so that two decimals show every part
    priced = parse_config(VALUES | {"results": str(tmp_path), "prices": {"cpu_core_hour": 0.25, "gpu_hour": 40.0}})
    printed = describe_plan(plan, priced)
    networks = [line for line in plan.stages if line.stage.partition("/")[0] in NETWORKS and line.gpu_hours]
    without = sum(line.cpu_hours for line in plan.stages)
    cores = without - sum(line.cpu_hours for line in networks) + sum(line.loading_hours for line in plan.stages)
    gpus, size = sum(line.gpu_hours for line in networks), sum(line.gigabytes for line in plan.stages)
    sums = re.search(
        r"without a GPU: (\S+) core hours; with a GPU: (\S+) core hours and (\S+) GPU hours; (\S+) GB", printed
    )
    assert sums is not None
    assert [float(number) for number in sums.groups()] == pytest.approx([without, cores, gpus, size], abs=0.006)
    assert min(without - cores, gpus - cores, sum(line.loading_hours for line in plan.stages)) > 1  # none is hidden
    price = re.search(r"at the config's prices: (\S+)", printed)
    # A GPU is paid for while it waits for the two loading processes of its run.
    held = sum(max(line.gpu_hours, line.loading_hours / 2) for line in networks)
    assert held > gpus + 1
    assert price is not None and float(price[1]) == pytest.approx(0.25 * cores + 40 * held, abs=0.006)
    assert f"{sum(line.jobs for line in plan.stages)} jobs" in printed
    for line in plan.stages:
        (row,) = [row.split() for row in printed.splitlines() if row.startswith(f"{line.stage} ")]
        shown = [0.0 if number == "-" else float(number) for number in row[1:]]
        numbers = [line.jobs, line.cpu_hours, line.gpu_hours, line.loading_hours, line.gigabytes]
        numbers += [line.gpus, line.job_hours]
        assert shown.pop() == pytest.approx(line.memory, abs=0.06)
        assert shown == pytest.approx(numbers, abs=0.006)
    write_plan(plan, tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["jobs"] == plan.jobs and [line["stage"] for line in written["stages"]] == [
        s.stage for s in plan.stages
    ]
    assert [line["gpu_hours"] for line in written["stages"]] == [line.gpu_hours for line in plan.stages]
    assert (
        written["datasets"]["videos"]["clips"] == many.per_split
        and written["datasets"]["videos"]["shards"] == 14 * 100_000
    )
