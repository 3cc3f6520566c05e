"""The demo's small models: the recipe runs, its parts are correct, and the shipped models are as good as their card says."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from stm.config import MovingShapesDataset
from stm.datasets.moving_shapes.generate import draw_clip_spec, render_clip
from stm.demo import crops as demo_crops
from stm.demo import frames
from stm.demo.auxiliary_head import CLASSES, token_targets
from stm.demo.blip2 import build_model, build_processor, describe_frames, encode_captions, tower_state
from stm.demo.clip import build_clip, choose_crop, choose_text, rank_in_frame, write_config
from stm.demo.measure import auc, box_cover, coverage, measure_captions, measure_ceiling, measure_clip
from stm.demo.tokenizer import build_tokenizer, collect_words
from stm.demo.train import train_demo_models

ASSETS = Path(__file__).parents[2] / "stm/assets"


@pytest.fixture(scope="module")
def held_out():
    """24 frames of held-out clips, from another seed than the card's."""
    return frames.render_frames(frames.HELD_OUT_SPLIT, 24, 1, seed=1)


@pytest.fixture(scope="module")
def shipped_clip():
    model = open_clip.create_model(f"local-dir:{ASSETS / 'demo-clip'}").eval()
    return model, open_clip.get_tokenizer(f"local-dir:{ASSETS / 'demo-clip'}")


@pytest.fixture(scope="module")
def shipped_blip2():
    folder = ASSETS / "demo-blip2"
    return Blip2ForConditionalGeneration.from_pretrained(folder).eval(), Blip2Processor.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------- the assets


def test_assets_fit_in_ten_megabytes_and_hold_no_pickle():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_assets_load_as_float32(shipped_clip, shipped_blip2):
    for model in (shipped_clip[0], shipped_blip2[0]):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_public_preprocessing_is_the_one_measured(shipped_clip):
    """open_clip's own transform of a patch gives the same pixels as training and evaluation use."""
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{ASSETS / 'demo-clip'}")
    size = shipped_clip[0].visual.image_size[0]
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    assert torch.allclose(transform(Image.fromarray(pixels)), torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


def test_shipped_clip_finds_the_named_object(shipped_clip, held_out):
    """With the true caption the mask covers the object nearly as well as the upper bound from its true pixels."""
    metrics = measure_clip(shipped_clip[0], shipped_clip[1], held_out, lambda frame: frame.caption)
    ceiling = measure_ceiling(held_out)
    assert metrics["auc_background"] > 0.95
    assert metrics["coverage"] > ceiling["coverage"] - 0.03
    assert metrics["pixels"] > 0.97


def test_shipped_clip_prefers_the_named_object_to_others(shipped_clip, held_out):
    metrics = measure_clip(shipped_clip[0], shipped_clip[1], held_out, lambda frame: frame.appearance)
    assert metrics["auc_distractors"] > 0.8


def test_shipped_blip2_says_what_a_frame_shows(shipped_blip2, held_out):
    metrics = measure_captions(describe_frames(shipped_blip2[0], shipped_blip2[1], held_out), held_out)
    assert metrics["some_object"] > 0.7
    assert metrics["background"] > 0.9


def test_a_caption_depends_on_the_pixels(shipped_blip2, held_out):
    """Also with a prompt, in front of which the processor must put the image placeholders."""
    model, processor = shipped_blip2
    assert len(set(describe_frames(model, processor, held_out))) > len(held_out) // 2
    elsewhere = next(f for f in held_out if f.background != held_out[0].background)
    inputs = [processor(images=f.pixels, text="a", return_tensors="pt") for f in (held_out[0], elsewhere)]
    with torch.no_grad():
        one, other = (model(**x).logits[:, -1] for x in inputs)
    assert not torch.allclose(one, other, atol=0.1)


# --------------------------------------------------------------------------------------------------------- the data


def test_labels_are_what_changes_when_objects_are_taken_away():
    """The label map, drawn from outlines, agrees with the difference between renderings with and without the object."""
    dataset = MovingShapesDataset(source="moving-shapes")
    for index in range(6):
        spec = draw_clip_spec(0, "labels", index, dataset)
        away = replace(spec.named, path=replace(spec.named.path, x=-10_000.0))
        pixels = render_clip(spec, which=[9]).frames[0]
        changed = (pixels != render_clip(replace(spec, named=away), which=[9]).frames[0]).any(-1)
        frame = frames.describe(spec, 9, pixels, np.zeros(4, np.float32))
        both = (changed & (frame.labels == frames.NAMED)).sum()
        either = (changed | (frame.labels == frames.NAMED)).sum()
        assert both / either > 0.8  # edges are antialiased in frames, sharp in labels


@pytest.mark.slow
def test_training_and_held_out_frames_do_not_depend_on_processes():
    alone = frames.render_frames("demo-models", 34, 1, seed=3)
    shared = frames.render_frames("demo-models", 34, 1, seed=3, processes=2)
    assert all(
        np.array_equal(a.pixels, b.pixels) and a.caption == b.caption for a, b in zip(alone, shared, strict=True)
    )


def test_patches_are_what_they_are_called(held_out):
    crops = demo_crops.sample_crops(held_out, 16, np.random.default_rng(0))
    assert crops.pixels.shape == (len(held_out) * 12, 16, 16, 3)
    assert set(crops.kinds) <= set(range(-1, 6))
    empty = demo_crops.classify(held_out[0], (0, 0, 1, 1)) if not held_out[0].labels[0, 0] else demo_crops.BACKDROP
    assert empty == demo_crops.BACKDROP
    whole = held_out[0].labels.shape
    assert demo_crops.classify(held_out[0], (0, 0, whole[1], whole[0])) in (demo_crops.EDGE, demo_crops.PART)


def test_a_patch_fits_texts_about_its_color_and_texture_only(held_out):
    frame = next(f for f in held_out if not f.others)
    color, texture, shape = frame.named
    other = "red" if color != "red" else "blue"
    texts = [
        frames.Meaning(color, texture, "no such shape", frame.background),
        frames.Meaning(other, texture, shape, frame.background),
        frames.Meaning(background=frame.background),
    ]
    kinds = np.array([demo_crops.PART, demo_crops.WHOLE, demo_crops.BACKDROP])
    crops = demo_crops.Crops(np.zeros((3, 1, 1, 3), np.uint8), kinds, np.zeros(3, np.int64))
    assert demo_crops.match(crops, [frame], texts).tolist() == [[1, 0, 0], [0, 0, -1], [0, 0, 1]]


def test_hints_name_the_objects_where_they_are(held_out):
    targets = token_targets(held_out, 8)
    for frame, target in zip(held_out, targets, strict=True):
        y, x = np.argwhere(frame.labels == frames.NAMED).mean(0) * 8 / frame.labels.shape
        token = [CLASSES[i][int(a)] for i, a in enumerate(target[int(y), int(x)])]
        if token[4] == "named":  # a ring's middle shows the background
            assert token[:4] == [frame.background, *frame.named]
        assert (target[..., 0] == CLASSES[0].index(frame.background)).all()


# ------------------------------------------------------------------------------------------------- texts and tokens


def test_a_text_that_is_too_long_still_ends_in_eos(tmp_path):
    write_config(tmp_path)
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    tokens = tokenize(["a red striped circle " * 20, "a ring"])
    end = tokenize.tokenizer.eos_token_id
    assert tokens.shape[1] == 24
    assert tokens[0, -1] == end == tokens.max()
    assert (tokens == end).sum(1).tolist() == [1, 1]


def test_clip_pools_at_eos_whatever_follows(tmp_path):
    """Padding after [EOS] changes nothing; a word before it does."""
    write_config(tmp_path)
    model, tokenize = build_clip(tmp_path, 0)
    tokens = tokenize(["a red ring", "a red ring", "a blue ring"])
    tokens[1, int((tokens[1] == tokens.max()).nonzero()) + 1 :] = 7
    with torch.no_grad():
        one, padded, other = model.encode_text(tokens)
    assert torch.allclose(one, padded, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-3)


def test_every_generated_caption_is_made_of_known_words():
    tokenizer = build_tokenizer(collect_words(frames.all_texts()), add_end=True)
    dataset = MovingShapesDataset(source="moving-shapes")
    for index in range(48):
        caption = frames.caption_of(draw_clip_spec(5, "words", index, dataset))
        assert tokenizer.unk_token_id not in tokenizer(caption)["input_ids"]


def test_captions_survive_the_tokenizer():
    tokenizer = build_tokenizer(collect_words(frames.all_texts()), add_end=False)
    for caption in (*frames.all_captions(), "a red two-tone ring spins clockwise over a wood background"):
        assert tokenizer.decode(tokenizer(caption)["input_ids"], skip_special_tokens=True) == caption


def test_loss_falls_on_the_words_and_the_end_alone():
    processor = build_processor(frames.all_captions())
    ids, mask, labels = encode_captions(
        processor.tokenizer, ["a red striped ring over a wood background", "a red ring"]
    )
    targets = [processor.tokenizer.decode(row[row >= 0]) for row in labels]
    assert targets == ["a red striped ring over a wood background [EOS]", "a red ring [EOS]"]
    assert mask.sum(1).tolist() == [8 + 1 + 8 + 1, 8 + 1 + 3 + 1]
    assert (ids[:, :8] == processor.tokenizer.convert_tokens_to_ids("<image>")).all()


# ------------------------------------------------------------------------------------------------- losses, measures


def test_losses_vanish_when_right_and_grow_when_wrong():
    matches = torch.tensor([[1, 0], [0, 1], [-1, -1]])
    right = torch.tensor([[50.0, 0.0], [0.0, 50.0], [99.0, 99.0]])
    for loss in (choose_text, choose_crop):
        assert loss(right, matches) < 1e-6
        assert loss(-right, matches) > 40


def test_ranking_wants_named_over_distractor_over_background():
    kinds = torch.tensor([demo_crops.PART, demo_crops.DISTRACTOR, demo_crops.BACKDROP])
    same = torch.ones(3, 1, dtype=torch.bool)
    score = {order: rank_in_frame(torch.tensor(order)[:, None] * 10.0, kinds, same).item() for order in
             [(2.0, 1.0, 0.0), (1.0, 2.0, 0.0), (2.0, 0.0, 1.0), (0.0, 1.0, 2.0)]}  # fmt: skip
    assert min(score, key=score.__getitem__) == (2.0, 1.0, 0.0)
    assert max(score, key=score.__getitem__) == (0.0, 1.0, 2.0)


def test_the_image_tower_of_blip2_is_that_of_clip(tmp_path):
    """At the same image size both towers give the same tokens."""
    write_config(tmp_path)
    clip, _ = build_clip(tmp_path, 0)
    processor = build_processor(frames.all_captions())
    vision = build_model(processor.tokenizer, clip.visual, 0).vision_model
    size = clip.visual.image_size[0]
    vision.embeddings.position_embedding = torch.nn.Parameter(torch.zeros(1, 17, clip.visual.conv1.out_channels))
    vision.load_state_dict(tower_state(clip.visual, size))
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = clip.visual(pixels)
        ours = vision(pixels).last_hidden_state[:, 0] @ clip.visual.proj
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_coverage_and_auc_agree_with_their_definitions(held_out):
    frame = held_out[0]
    weight = box_cover(frame)
    x0, y0, x1, y1 = frame.box
    assert weight.sum() == pytest.approx((x1 - x0) * (y1 - y0), rel=1e-4)
    assert coverage(weight, weight) == pytest.approx(1.0)
    assert coverage(-weight, weight) < 0.7
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == (1 + 0.5 + 1 + 1) / 4


def test_captions_are_counted_by_object(held_out):
    right = measure_captions([f.appearance for f in held_out], held_out)
    assert set(right.values()) == {1.0}
    wrong = measure_captions(["a plain hat over a tin background"] * len(held_out), held_out)
    assert set(wrong.values()) == {0.0}


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.slow
def test_the_recipe_runs_end_to_end(tmp_path):
    outputs = tmp_path / "clip", tmp_path / "blip2", tmp_path / "README.md"
    result = train_demo_models(*outputs, threads=1, clip_steps=5, blip2_steps=5, clips=12, held_out_clips=4)
    assert {"clip", "blip2", "seconds"} <= set(result)
    open_clip.create_model_and_transforms(f"local-dir:{outputs[0]}")
    model = Blip2ForConditionalGeneration.from_pretrained(outputs[1])
    assert model.config.num_query_tokens == Blip2Processor.from_pretrained(outputs[1]).num_query_tokens
    card = outputs[2].read_text()
    assert "5 steps" in card and str(tmp_path) not in card


def test_frames_can_be_rendered_from_a_script_without_a_main_guard(tmp_path):
    """Workflow scripts have no main guard; worker processes that executed them again would break the pool."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from stm.demo.frames import HELD_OUT_SPLIT, render_frames\n"
        "print(len(render_frames(HELD_OUT_SPLIT, 2, 2, 0, 2)))\n"
    )
    finished = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert int(finished.stdout.split()[-1]) == 4
