"""Which maps are compared with maps of the crop, and what the comparison depends on."""

from pathlib import Path
from typing import Any

import pytest

from stm.config import ConfigError, CropComparison, parse_config
from stm.evaluation.masks.stage import CROP_AGREEMENT
from stm.stages.jobs import Job, Jobs

TUBE: dict[str, Any] = {"model": "tiny", "image_size": 32, "patch_size": 8, "frames": 4}
TEXT: dict[str, Any] = {
    **TUBE,
    "split": "all",
    "mask": {"strategy": "text_bottom", "ratio": 0.45},
    "augmentation": {"crop": "random_resized", "scale": [0.3, 0.9]},
}
FOLDER: dict[str, Any] = {
    "name": "mine",
    "results": "results",
    "dataset": {"source": "folder", "root": "videos"},
    "captions": {"first": {"kind": "human"}, "second": {"kind": "label"}},
    "pack": {"captions": ["second", "first"]},
    "pretrain": {"tube": TUBE, "text": TEXT, "later": {**TEXT, "image_size": 64}},
}
SHAPES = {"source": "moving-shapes", "clips": {"train": 4, "test": 2}}
QUALITY = {"split": "test", "text_ratio": 0.5, "crops": 7, "image_size": 48, "patch_size": 12}
GIVEN = {"split": "val", "crops": 9, "ratio": 0.7}
OF_THE_RUN = CropComparison(
    split="all", ratio=0.45, crop="random_resized", scale=(0.3, 0.9), image_size=32, patch_size=8
)


def compared(**changes: Any) -> CropComparison | None:
    return parse_config({**FOLDER, **changes}).crop_comparison


def test_any_dataset_is_compared_as_its_first_text_guided_run_uses_it() -> None:
    assert compared() == OF_THE_RUN and OF_THE_RUN.crops == 200
    assert compared(pretrain={"tube": TUBE}) is None
    assert compared(pretrain={"tube": TUBE}, crop_agreement=GIVEN) == CropComparison.model_validate(GIVEN)
    assert compared(crop_agreement=GIVEN) == CropComparison.model_validate(GIVEN)
    assert compared(crop_agreement={"crops": 0}) is None


def test_the_section_mask_quality_is_used_before_a_run() -> None:
    expected = CropComparison(split="test", ratio=0.5, crops=7, image_size=48, patch_size=12)
    assert compared(dataset=SHAPES, mask_quality=QUALITY) == expected
    given = compared(dataset=SHAPES, mask_quality=QUALITY, crop_agreement=GIVEN)
    assert given == CropComparison.model_validate(GIVEN)
    assert compared(dataset=SHAPES, mask_quality=QUALITY, pack={"captions": None}, pretrain={}) is None


def test_each_dataset_is_compared_as_its_own_runs_use_it() -> None:
    study = parse_config(
        {
            **{key: FOLDER[key] for key in ("name", "captions", "pack")},
            "datasets": {"one": {"dataset": FOLDER["dataset"]}, "two": {"dataset": FOLDER["dataset"]}},
            "pretrain": {"tube": {**TUBE, "dataset": "one"}, "text": {**TEXT, "dataset": "two"}},
        }
    )
    assert [study.of(name).crop_comparison for name in ("one", "two")] == [None, OF_THE_RUN]
    assert [CROP_AGREEMENT.applies(study.of(name)) for name in ("one", "two")] == [False, True]


def test_without_a_packed_caption_source_there_is_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match=r"crop_agreement compares the similarity maps .* pack.captions names none"):
        compared(pack={"captions": None}, pretrain={}, crop_agreement={})


def job_of(**changes: Any) -> Job:
    shards = [f"all-{number:05d}" for number in range(6)] + ["test-00000"]
    return Jobs(parse_config({**FOLDER, **changes}), lambda dataset: shards).make(dataset="mine")


def test_a_few_shards_of_the_first_packed_source_are_read() -> None:
    inputs = CROP_AGREEMENT.inputs(job_of())
    names = [f"all-{number:05d}" for number in range(4)]
    assert inputs["similarity"] == [Path(f"results/mine/similarity/second/{name}.parquet") for name in names]
    assert inputs["frames"] == [Path(f"results/mine/frames/{name}.parquet") for name in names]
    assert inputs["tars"] == [Path(f"results/mine/frames/{name}.tar") for name in names]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"mask": {"strategy": "text_top", "ratio": 0.45}}, True),
        ({"mask": {"strategy": "text_bottom", "ratio": 0.5}}, False),
        ({"image_size": 64}, False),
        ({"frames": 8}, True),
        ({"augmentation": {"crop": "center", "scale": [0.3, 0.9]}}, False),
    ],
)
def test_what_follows_from_the_run_tells_results_apart(changes: dict[str, Any], same: bool) -> None:
    changed = job_of(pretrain={"tube": TUBE, "text": {**TEXT, **changes}})
    assert (CROP_AGREEMENT.facts(changed) == CROP_AGREEMENT.facts(job_of())) == same
