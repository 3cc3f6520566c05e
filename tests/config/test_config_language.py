"""Runs with text: default masks, required packed arrays, and the keys of each method."""

import copy
from typing import Any

import pytest
from pydantic import TypeAdapter

from stm.config import ConfigError, EvaluationTask, LanguageRun, PretrainRun, parse_config

STUDY: dict[str, Any] = {
    "name": "study",
    "captions": {"human": {"kind": "human"}},
    "pack": {"captions": "human", "similarity": False, "motion": False, "text": True},
    "datasets": {
        "clips": {"dataset": {"source": "folder", "root": "clips"}},
        "stills": {"dataset": {"source": "folder", "root": "stills"}, "frames": {"min_frames": 1}},
    },
    "pretrain": {
        "run": {
            "method": "umt",
            "dataset": "clips",
            "images": {"datasets": ["stills"]},
            "teacher": {"model": "local-dir:clip"},
            "language": {"model": "bert"},
        }
    },
}


def study(**changes: object) -> dict:
    """Return STUDY with changes to its run."""
    config = copy.deepcopy(STUDY)
    config["pretrain"]["run"] |= changes
    return config


def test_the_method_determines_the_section_and_defaults_to_mae():
    config = parse_config(study() | {"pretrain": {**STUDY["pretrain"], "mae": {"dataset": "clips"}}})
    assert isinstance(config.pretrain["run"], LanguageRun)
    assert isinstance(config.pretrain["mae"], PretrainRun)


@pytest.mark.parametrize(
    ("method", "mask"),
    [("umt", ("attention", 0.8)), ("stm", ("spatiotemporal", 0.7)), ("clusterstm", ("cluster", 0.85))],
)
def test_each_method_has_its_own_default_mask(method, mask):
    run = parse_config(study(method=method)).pretrain["run"]
    assert (run.mask.strategy, run.mask.ratio) == mask


def test_a_method_s_own_section_is_filled_in_so_that_the_fingerprint_has_its_values():
    stm, clusterstm, umt = (parse_config(study(method=m)).pretrain["run"] for m in ("stm", "clusterstm", "umt"))
    assert stm.fingerprint()["spatio_temporal"]["mask_gradient"] == "by_token" and stm.cluster is None
    assert clusterstm.fingerprint()["cluster"]["scaling"] == "frame" and clusterstm.spatio_temporal is None
    assert umt.fingerprint()["spatio_temporal"] is None and umt.fingerprint()["cluster"] is None
    changed = parse_config(study(method="stm", spatio_temporal={"width": 64})).pretrain["run"]
    assert changed.spatio_temporal.width == 64


def test_clusterstm_aligns_features_only_where_asked():
    weights = [
        parse_config(study(method=method, objectives=objectives)).pretrain["run"].objectives
        for method, objectives in [
            ("umt", {}),
            ("stm", {"matching": 0.5}),
            ("clusterstm", {}),
            ("clusterstm", {"matching": 0.5}),
            ("clusterstm", {"alignment": 0.25}),
        ]
    ]
    assert [w.alignment for w in weights] == [1.0, 1.0, 0.0, 0.0, 0.25]
    assert [w.relevance for w in weights] == [1.0] * 5 and weights[3].matching == 0.5


def test_the_sources_of_a_run_include_further_and_image_datasets():
    run = parse_config(study(more=["stills"])).pretrain["run"]
    assert run.video_sources == (("clips", "train"), ("stills", "train"))
    assert run.image_sources == (("stills", "train"),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"language": None}, "need `language`"),
        ({"cluster": {}}, "`cluster` belongs to the method clusterstm"),
        ({"mask": {"strategy": "spatiotemporal", "ratio": 0.7}}, "learned by the method stm alone"),
        ({"more": ["films"]}, "'films'"),
        ({"mask": {"strategy": "text_top", "ratio": 0.6}}, "similarity"),
        ({"captions": {"sources": ["blip2"]}}, "'blip2'"),
        ({"method": "clusterstm", "cluster": {"window": 4}}, "must be odd"),
        (
            {"images": {"datasets": ["stills"], "batch_size": 7}, "optimisation": {"accumulate": 2}},
            "images.batch_size 7",
        ),
        ({"tubelet": 2}, "less than or equal to 1"),
    ],
)
def test_an_inconsistent_run_is_rejected_before_anything_runs(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(study(**changes))


def test_a_mae_run_cannot_use_the_cluster_mask():
    with pytest.raises(ConfigError, match="umt, stm and clusterstm"):
        parse_config(
            study() | {"pretrain": {"mae": {"dataset": "clips", "mask": {"strategy": "cluster", "ratio": 0.8}}}}
        )


def test_clusterstm_needs_packed_caption_vectors():
    config = study(method="clusterstm")
    config["pack"] = config["pack"] | {"text": False}
    with pytest.raises(ConfigError, match=r"pack\.text of clips is not set"):
        parse_config(config)


def test_text_evaluations_cover_only_runs_with_text():
    config = study() | {"evaluate": {"find": {"task": "video_text_retrieval"}, "probe": {"task": "linear"}}}
    config["pretrain"]["mae"] = {"dataset": "clips"}
    parsed = parse_config(config)
    assert parsed.runs_of("find") == ["run"] and parsed.runs_of("probe") == ["run", "mae"]
    config["evaluate"]["find"]["runs"] = ["mae"]
    with pytest.raises(ConfigError, match="needs runs with `language`; mae has none"):
        parse_config(config)


@pytest.mark.parametrize("task", ["video_text_retrieval", "multiple_choice", "question_answering", "finetune"])
def test_without_epochs_only_releases_are_tested(task: str) -> None:
    """Weights of the run's own would be called fine-tuned, or be refused for want of a head once they are trained."""
    config = study() | {"evaluate": {"asis": {"task": task, "optimisation": {"epochs": 0}}}}
    with pytest.raises(ConfigError, match=r"evaluate\.asis\.optimisation\.epochs is 0, .* pretrain\.run has none"):
        parse_config(config)
    released = study(release="umt.pth")
    released["pretrain"]["run"].pop("images")
    assert parse_config(released | {"evaluate": config["evaluate"]}).runs_of("asis") == ["run"]


@pytest.mark.parametrize("changes", [{"views": 2}, {"crops": 3}])
@pytest.mark.parametrize("task", ["video_text_retrieval", "question_answering", "multiple_choice", "captioning"])
def test_a_task_with_text_refuses_views_and_crops_which_it_does_not_use(task: str, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`views` and `crops` are not used by tasks with text"):
        TypeAdapter(EvaluationTask).validate_python({"task": task, **changes})


def test_a_release_reads_no_training_data_and_no_teacher() -> None:
    run = LanguageRun.model_validate(
        {"method": "umt", "dataset": "clips", "images": {"datasets": ["pictures"]}, "release": "umt.pth"}
        | {"teacher": {"model": "ViT-B-16@openai"}, "language": {"model": "bert"}}
    )
    assert (run.video_sources, run.image_sources, run.models) == ((), (), ("bert",))
    with pytest.raises(ValueError, match="either `init`, to train from these weights, or `release`"):
        PretrainRun.model_validate({"init": "a.pth", "release": "b.pth"})


def test_a_task_without_epochs_reads_what_it_tests_alone() -> None:
    splits = {"train_split": "train", "validation_split": "val"}
    for task, expected in (
        ({"task": "video_text_retrieval", **splits}, {"test": "test"}),
        ({"task": "video_text_retrieval", **splits, "optimisation": {"epochs": 0}}, {"test": "test"}),
        ({"task": "multiple_choice", **splits, "optimisation": {"epochs": 0}}, {"test": "test"}),
        ({"task": "finetune", "optimisation": {"epochs": 0}}, {"test": "test"}),
        ({"task": "question_answering", **splits, "optimisation": {"epochs": 0}}, {"test": "test"}),
        ({"task": "linear"}, {"train": "train", "test": "test"}),
        (
            {"task": "video_text_retrieval", **splits, "optimisation": {}},
            {"train": "train", "validation": "val", "test": "test"},
        ),
    ):
        settings = TypeAdapter(EvaluationTask).validate_python(task)
        assert settings.splits == settings.splits_for(own_answers=True) == expected
        # Without a list of the benchmark's own, the training split's answers are the candidates.
        more = {"train": "train"} if task["task"] == "question_answering" else {}
        assert settings.splits_for(own_answers=False) == more | expected
    with pytest.raises(ValueError, match="no release has a caption decoder"):
        TypeAdapter(EvaluationTask).validate_python({"task": "captioning", "optimisation": {"epochs": 0}})
    with pytest.raises(ValueError, match=r"needs optimisation\.epochs: 0"):
        TypeAdapter(EvaluationTask).validate_python({"task": "finetune", "classes": "names.txt"})
