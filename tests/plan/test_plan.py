"""The plan counts the jobs of the workflow, and its FLOPs are those of the models."""

from argparse import Namespace
from itertools import product
from typing import Any

import numpy as np
import open_clip
import pytest
from demo_config import demo_values

from stm.cli.common import load
from stm.config import parse_config
from stm.plan.clips import count_clips
from stm.plan.costs import dataset_lines
from stm.plan.hardware import Hardware
from stm.plan.make import describe_plan, make_plan
from stm.pretrained.sizes import answer_flops, clip_image_flops, frame_tokens, weights_and_basis
from stm.stages.costs import Workload
from stm.stages.jobs import Jobs
from stm.stages.journey import all_stages


def test_clips_and_shards_of_the_generated_dataset_come_from_the_config(tmp_path):
    config = parse_config(demo_values() | {"results": str(tmp_path)})
    plan = make_plan(config)
    dataset = plan.datasets[config.name]
    assert dataset.clips == config.dataset.clips
    assert dataset.shards == sum(-(-n // config.shard_size) for n in config.dataset.clips.values())  # type: ignore[misc]
    assert dataset.stored_frames == config.dataset.frames / config.frames.every


def test_only_the_packed_source_is_scored_on_every_split(tmp_path):
    config = parse_config(demo_values() | {"results": str(tmp_path)})
    jobs = {stage.stage: stage.jobs for stage in make_plan(config).stages}
    measured = -(-config.dataset.clips["test"] // config.shard_size)
    assert jobs["similarity/human"] == measured
    assert jobs["similarity/blip2"] == make_plan(config).datasets[config.name].shards


def test_a_folder_is_planned_from_its_files_before_there_is_a_manifest(tmp_path, encode_video, texture):
    for number in range(3):
        encode_video(tmp_path / f"videos/{number}.mp4", texture(frames=12))
    (tmp_path / "videos/broken.mp4").write_bytes(b"no video")
    whole = (tmp_path / "videos/0.mp4").read_bytes()
    (tmp_path / "videos/odd.mp4").write_bytes(whole.replace(b"avc1", b"zzzz"))  # an unknown codec
    values = {"name": "x", "results": str(tmp_path), "dataset": {"source": "folder", "root": str(tmp_path / "videos")}}
    clips = count_clips(parse_config(values))
    assert (clips.total, clips.frames, clips.width, clips.height) == (5, 12, 96, 64)
    assert "5 clips, the headers of 3" in clips.basis


def test_annotated_splits_and_segments_are_planned_as_such(tmp_path, encode_video, texture):
    encode_video(tmp_path / "videos/a.mp4", texture(frames=24))
    rows = ["path,split,start,end", "a.mp4,train,0,0.5", "a.mp4,train,0.5,1", "a.mp4,val,0.2,0.7"]
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    dataset = {"source": "folder", "root": str(tmp_path / "videos"), "annotations": str(tmp_path / "clips.csv")}
    clips = count_clips(parse_config({"name": "x", "results": str(tmp_path), "dataset": dataset}))
    assert clips.per_split == {"train": 2, "val": 1}
    assert clips.frames < 24


def test_frames_that_are_spread_removed_and_shared_are_planned_as_such(tmp_path):
    folders = {"root": str(tmp_path / "videos"), "annotations": str(tmp_path / "lists")}
    values: dict[str, Any] = {
        "name": "x",
        "results": str(tmp_path),
        "frames": {"count": 16, "short_side": 240, "keep": False},
        "pack": {"similarity": False, "motion": False},
        "datasets": {
            "retrieval": {"dataset": {"source": "msrvtt", **folders}},
            "questions": {"dataset": {"source": "msrvtt-qa", **folders}, "frames": {"from_dataset": "retrieval"}},
            "images": {"dataset": {"source": "cc3m", **folders}, "frames": {"every": 1, "min_frames": 1, "keep": True}},
        },
    }
    plan = make_plan(parse_config(values))
    assert [dataset.stored_frames for dataset in plan.datasets.values()] == [16, 16, 1]
    lines = {line.stage: line for line in plan.stages}
    gigabytes = 10_000 * 16 * 320 * 240 * 0.25 / 1e9  # both lists have all 10,000 videos
    for name in ("frames/retrieval", "shards/retrieval", "frames/questions", "shards/questions"):
        assert lines[name].gigabytes == pytest.approx(gigabytes)
        assert lines[name].removed == pytest.approx(gigabytes if name.startswith("frames") else 0)
    assert lines["frames/questions"].cpu_hours == pytest.approx(gigabytes * 8.5 / 3600)
    assert lines["frames/retrieval"].cpu_hours > 20 * lines["frames/questions"].cpu_hours
    left = 2 * gigabytes + lines["frames/images"].gigabytes + lines["shards/images"].gigabytes
    said = describe_plan(plan)
    assert f"disk: {left:.2f} GB at the end" in said and f"together {2 * gigabytes:.2f} GB, are removed" in said
    del values["frames"]["keep"]
    assert "removed" not in describe_plan(make_plan(parse_config(values)))


def test_twice_the_clips_cost_twice_the_work(tmp_path):
    values = demo_values() | {"results": str(tmp_path)}
    written = []
    for clips in (1000, 2000):
        values["dataset"]["clips"] = {"train": clips}
        plan = make_plan(parse_config(values))
        written.append({s.stage: s.gigabytes for s in plan.stages if s.gigabytes})
    for stage, gigabytes in written[0].items():
        assert written[1][stage] == pytest.approx(2 * gigabytes)


def lines(values: dict) -> dict:
    return {stage.stage: stage for stage in make_plan(parse_config(values)).stages}


def test_shards_hold_the_frames_and_what_is_packed(tmp_path):
    values = demo_values() | {"results": str(tmp_path)}
    packed = lines(values)
    maps = sum(packed[name].gigabytes for name in ("motion", "flow", "similarity/blip2", "text/blip2"))
    assert packed["shards"].gigabytes == pytest.approx(packed["frames"].gigabytes + maps)


def test_generating_text_takes_the_time_of_its_tokens_not_of_its_arithmetic_alone(tmp_path):
    values = demo_values() | {"results": str(tmp_path)}
    source = values["captions"]["blip2"]
    before = lines(values)["captions/blip2"].gpu_hours
    source["max_new_tokens"] *= 2
    more = lines(values)["captions/blip2"].gpu_hours - before
    passes = sum(values["dataset"]["clips"].values()) * source["key_frames"] / source["batch_size"]
    assert more == pytest.approx(passes * (source["max_new_tokens"] / 2) * 0.025 / 3600)


VLM = {"kind": "vlm", "model": "Qwen/Qwen2.5-VL-7B-Instruct", "precision": "bfloat16"}


def test_answers_about_frames_cost_their_tokens_and_a_pass_per_new_token(tmp_path):
    values = demo_values() | {"results": str(tmp_path), "captions": {"vlm": VLM}, "pack": {"captions": "vlm"}}
    values |= {"pretrain": {}, "evaluate": {}, "tables": {}, "figures": {}, "report": {}}
    values.pop("mask_quality", None)

    def hours(**more: Any) -> float:
        line = lines(values | {"captions": {"vlm": VLM | more}})["captions/vlm"]
        return line.gpu_hours - line.jobs * 5 / 3600

    assert hours(batch_size=10**9, prompts=["what?", "where?"]) == pytest.approx(2 * hours(batch_size=10**9), rel=1e-3)
    clips = sum(values["dataset"]["clips"].values())
    more = hours(batch_size=4) - hours(batch_size=8)
    assert more == pytest.approx(clips * (1 / 4 - 1 / 8) * 60 * 0.025 / 3600)
    # Asked about each frame alone, the model reads as many frames, and writes as many answers as there are frames.
    assert hours(input="key_frames", frames=4) > 3 * hours(frames=4)
    text = describe_plan(make_plan(parse_config(values)), parse_config(values))
    assert "captions of vlm: 7.0 billion weights (by its name), about" in text


@pytest.mark.parametrize(("model", "processor"), [("Qwen2.5-VL-7B", "Qwen2VL"), ("Qwen3-VL-8B", "Qwen3VL")])
def test_tokens_of_a_video_are_those_of_its_processor(model, processor):
    import transformers

    video = np.zeros((8, 256, 340, 3), np.uint8)
    processing = getattr(transformers, f"{processor}VideoProcessor")()
    grid = processing([video], do_sample_frames=False, return_tensors="pt")["video_grid_thw"]
    tokens = int(grid.prod()) / processing.merge_size**2
    assert 8 * frame_tokens(f"Qwen/{model}-Instruct", 256 * 340, True) == pytest.approx(tokens, rel=0.2)


def test_weights_are_counted_by_name_if_there_are_no_files():
    found = {name: weights_and_basis(name)[0] / 1e9 for name in (
        "Qwen/Qwen2.5-VL-7B-Instruct", "HuggingFaceTB/SmolVLM2-256M-Video-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "owner/model-v2",
    )}  # fmt: skip
    assert list(found.values()) == [7, 0.256, 30, 0.5, 7] and weights_and_basis("owner/model-v2")[1] == "assumed"
    dense, mixture = (answer_flops(f"Qwen/Qwen3-VL-{size}-Instruct", 8, 87040, True, 60) for size in ("30B", "30B-A3B"))
    assert mixture < dense / 5  # each token passes through 3 billion weights


def test_newer_captions_for_tgm_are_one_line_that_leaves_frames_and_motion_as_they_are():
    plain, other = (load(Namespace(config=["config/tgm.yaml"], set=more)) for more in ([], ["pack.captions=vlm"]))
    assert other.of("k400").pack.sources == ("vlm",) and plain.of("k400").pack.sources == ("blip2",)
    load_of = Workload({"train": 1000}, 1000, 75, 75, 87040, 87040, 14 * 19)
    captioned = [
        {line.stage for line in dataset_lines(config, "k400", load_of, Hardware.of(config)) if "captions" in line.stage}
        for config in (plain, other)
    ]
    assert captioned == [{"captions/k400/blip2"}, {"captions/k400/vlm"}]
    changed = set()
    for dataset, stage in product(plain.dataset_names, all_stages().values()):
        if "run" not in stage.per and "dataset" in stage.per:
            one, two = (Jobs(c).make(dataset=dataset, source="vlm", shard="train-00000") for c in (plain, other))
            if "source" in stage.per and dataset not in ("k400", "ssv2"):
                continue
            if one.settings(stage.settings) != two.settings(stage.settings):
                changed.add((dataset, stage.name))
    assert ("k400", "shards") in changed and {dataset for dataset, _ in changed} == {"k400"}
    assert not changed & {("k400", name) for name in ("manifest", "frames", "motion")}


def test_augmentation_of_fine_tuning_is_counted_for_each_repeat(tmp_path):
    values = demo_values() | {"results": str(tmp_path)}
    values["pretrain"]["tube"] |= {"image_size": 128, "patch_size": 16}
    task = values["evaluate"]["finetune"]

    def loading() -> float:
        return lines(values)["evaluate/tube/finetune"].loading_hours

    plain = loading()
    task["augmentation"]["auto_augment"] = "rand-m7-n4-mstd0.5-inc1"
    once = loading() - plain
    task["repeats"] = 2
    assert once > plain, "RandAugment takes longer than decoding"
    assert loading() - plain == pytest.approx(2 * once)


def test_the_image_tower_of_vit_b_32_takes_as_many_operations_as_published():
    # 4.4 G multiply-adds; open_clip's own configuration is the source of the sizes.
    assert open_clip.get_model_config("ViT-B-32")["vision_cfg"]["width"] == 768
    assert clip_image_flops("ViT-B-32@openai") == pytest.approx(8.82e9, rel=0.01)


def test_the_description_names_what_is_assumed_and_prices_only_when_there_are_some(tmp_path):
    config = parse_config(demo_values() | {"results": str(tmp_path)})
    text = describe_plan(make_plan(config), config)
    assert "assumed" in text
    assert "prices" not in text
    assert "on 1 GPU (h200) and 64 cores (assumed: the config does not name gpu, gpus, cores)" in text
    named = parse_config(config.model_dump(mode="json") | {"prices": {"gpu": "a100", "gpus": 4, "cores": 32}})
    assert "on 4 GPUs (a100) and 32 cores; " in describe_plan(make_plan(named), named)
    values = config.model_dump(mode="json") | {"prices": {"cpu_core_hour": 0.05, "gpu_hour": 2.0}}
    assert "prices" in describe_plan(make_plan(config), parse_config(values))


def test_splits_that_nothing_reads_are_not_scored(tmp_path):
    """Only the first 512 of their clips, of which the page can show some."""
    values = demo_values() | {"results": str(tmp_path), "shard_size": 100, "mask_quality": None}
    values["dataset"]["clips"] = {"train": 2000, "val": 2000, "test": 2000}
    values["evaluate"] = {"linear": {"task": "linear", "runs": ["tube"], "test_split": "val"}}

    def clips(line: str) -> float:
        per_clip = 8 * 8 * 10 * 3 * 2 / 1e9  # frames, cells, captions, bytes
        return round(lines(values)[line].gigabytes / per_clip)

    assert clips("similarity/blip2") == 2000 + 2 * 600
    assert {lines(values)[line].jobs for line in ("captions/blip2", "text/blip2", "motion", "flow")} == {20 + 2 * 6}
    assert lines(values)["shards"].jobs == lines(values)["frames"].jobs == 60
    values["pack"]["more_splits"] = ["val"]
    assert clips("similarity/blip2") == 2 * 2000 + 600
    values["evaluate"]["retrieval"] = {"task": "retrieval"}
    assert clips("similarity/blip2") == 3 * 2000
