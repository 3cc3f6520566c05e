"""The config rejects unknown keys with helpful messages; its JSON schema matches the one in the repository."""

import copy
import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
from demo_config import demo_values
from pydantic import TypeAdapter, ValidationError

from stm.config import (
    ConfigError,
    EvaluationTask,
    Section,
    inherit,
    json_schema,
    load_config,
    parse_config,
    read_values,
)
from stm.config.strategies import find_strategy

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
DEMO = demo_values()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_for_parser_and_schema(path):
    assert load_config(path).name
    jsonschema.validate(inherit(read_values(path)), json_schema())


DATASETS = ("FolderDataset", "MovingShapesDataset", "BenchmarkDataset", "LanguageDataset")
TASKS = [section.__name__ for section in get_args(get_args(EvaluationTask)[0])]
RUN = {
    "workers",
    "kept_gigabytes",
    "checkpoint_every",
    "checkpoints_kept",
    "dataset",
    "seeds",
    "gradient_checkpointing",
}
# Written out, because adding a key to these changes what is rerun, which must not happen unnoticed.
CACHE_NEUTRAL = {
    "Config": {"trackers"},
    "Frames": {"timeout_seconds", "keep", "from_dataset"},
    **{name: {"timeout_seconds"} for name in ("Motion", "Flow")},
    "Similarity": {"keep_embeddings"},
    "Pack": {"more_splits"},
    "BadInput": {"max_failure_rate"},
    **{name: {"probe_timeout_seconds"} for name in DATASETS},
    **dict.fromkeys(("PretrainRun", "LanguageRun"), RUN),
    **{name: {"runs", "dataset"} for name in TASKS},
    **{
        name: {"runs", "dataset", "gradient_checkpointing"}
        for name in ("FineTune", "VideoTextRetrieval", "QuestionAnswering", "MultipleChoice", "Captioning")
    },
}


def leaves(section: type[Section]) -> list[type[Section]]:
    """Return the concrete sections: those without subclasses, of which other tests may define more."""
    children = [child for child in section.__subclasses__() if child.__module__.startswith("stm.")]
    return [leaf for child in children for leaf in leaves(child)] or [section]


def test_a_fingerprint_excludes_exactly_the_cache_neutral_keys():
    assert {s.__name__: set(s.cache_neutral) for s in leaves(Section) if s.cache_neutral} == CACHE_NEUTRAL
    config = parse_config(DEMO)
    for section in (config.frames, config.motion, config.dataset, config.bad_input, config.pretrain["tube"]):
        excluded = CACHE_NEUTRAL[type(section).__name__]
        assert excluded <= set(type(section).model_fields)
        without = {"count"} if section is config.frames else set()  # the frames are stored at a step
        assert set(section.fingerprint()) == set(type(section).model_fields) - excluded - without


def test_the_schema_in_the_repository_is_the_generated_one():
    assert json.loads((ROOT / "config/schema.json").read_text()) == json_schema(), "run `make schema`"


def test_the_schema_rejects_unknown_keys_too():
    with pytest.raises(jsonschema.ValidationError, match="evry"):
        jsonschema.validate(DEMO | {"frames": {"evry": 2}}, json_schema())


def demo_with(path: str, value: object) -> dict:
    """Return the demo config with another value for one key, given by its dotted path."""
    config = copy.deepcopy(DEMO)
    *parents, last = path.split(".")
    section = config
    for part in parents:
        section = section[part]
    section[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("frames.evry", 2, ["frames.evry", "no such key", "did you mean `every`", "short_side"]),
        ("frames.every", 0, ["frames.every = 0", "greater than or equal to 1", "unit: frames"]),
        ("frames.short_side", "128px", ["frames.short_side = '128px'", "integer", "unit: pixels"]),
        ("motion.backend", "raft", ["motion.backend = 'raft'", "codec", "transcode", "mestimate"]),
        ("dataset.source", "webdataset", ["dataset", "folder", "moving-shapes"]),
        ("name", "../up", ["name = '../up'"]),
        ("pack.captions", "gpt", ["pack.captions", "'gpt'", "blip2", "human"]),
        ("captions.blip2.kind", "blip3", ["captions.blip2", "blip3", "blip2"]),
        ("pretrain.text.image_size", 102, ["pretrain.text", "image_size 102", "patch_size 4"]),
        ("pretrain.text.optimisation.epochs", 5, ["pretrain.text.optimisation", "8 is more than epochs 5"]),
        ("pretrain.text.repeats", 3, ["pretrain.text", "batch_size 32", "repeats = 1 x 1 x 3"]),
        ("pretrain.text.mask.ratio", 1.0, ["pretrain.text.mask.ratio = 1.0", "less than 1"]),
        ("pretrain.text.mask.strategy", "txet", ["pretrain.text.mask.strategy = 'txet'", "text_top", "tube"]),
        ("bad_input", {"policy": {"broken": "keep"}}, ["bad_input.policy", "broken", "truncated"]),
        ("captions.label", {"kind": "label", "templates": ["a video"]}, ["captions.label", "{}"]),
        (
            "captions.label",
            {"kind": "label", "template": ["{}"]},
            ["captions.label.label.template", "did you mean `templates`"],
        ),
        ("pretrain.text.mask.ration", 0.6, ["pretrain.text.mask.ration", "did you mean `ratio`", "strategy"]),
        (
            "pretrain.text",
            {
                **DEMO["pretrain"]["text"],
                "resize_on": "device",
                "augmentation": {"auto_augment": "rand-m7", "erasing": 0.1},
            },
            ["pretrain.text", "augmentation.auto_augment and augmentation.erasing", "set resize_on to loader"],
        ),
        ("pretrain.text.resize_on", "gpu", ["pretrain.text.resize_on = 'gpu'", "loader", "device"]),
        (
            "pretrain.text.decode_on",
            "device",
            ["pretrain.text", "decode_on: device needs resize_on: device"],
        ),
        (
            "pretrain.text",
            {**DEMO["pretrain"]["text"], "decode_on": "device", "resize_on": "device", "kept_gigabytes": 1},
            ["pretrain.text", "set it to 0, or decode_on to loader"],
        ),
        ("pretrain.text.seeds", [0, 0], ["pretrain.text", "lists a seed twice"]),
        ("evaluate.retrieval.source", "label", ["evaluate.retrieval.source", "'label'", "blip2"]),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_is_allowed(path, value, words):
    with pytest.raises(ConfigError) as error:
        parse_config(demo_with(path, value), "demo.yaml")
    for word in ["demo.yaml", *words]:
        assert word in str(error.value)


def test_all_mistakes_are_reported_at_once():
    config = demo_with("frames.every", 0)
    config["grid"] = 1
    with pytest.raises(ConfigError) as error:
        parse_config(config)
    assert "frames.every" in str(error.value)
    assert "grid = 1" in str(error.value)


def test_partial_fine_tuning_settings_keep_the_other_defaults():
    task = parse_config(demo_with("evaluate.finetune", {"task": "finetune", "optimisation": {"epochs": 60}}))
    o = task.evaluate["finetune"].optimisation
    assert (o.epochs, o.learning_rate, o.warmup_epochs, o.betas) == (60, 1e-3, 5, (0.9, 0.999))
    dumped = task.model_dump(mode="json", exclude_defaults=True)  # as shown on the report page
    assert parse_config(dumped) == task
    task = parse_config(demo_with("evaluate.finetune", {"task": "finetune", "augmentation": {"flip": False}}))
    assert task.evaluate["finetune"].augmentation.crop == "random_resized"


def test_guided_masks_need_their_guide_in_the_shards():
    config = demo_with("pack.similarity", False)
    with pytest.raises(ConfigError, match=r"pretrain\.text masks by similarity"):
        parse_config(config)


def two_datasets(**keys: object) -> dict:
    """Return a config of two generated datasets whose caption sources share a name but differ in kind."""
    first = {"dataset": DEMO["dataset"], "captions": {"texts": {"kind": "label"}}}
    second = {"dataset": DEMO["dataset"], "captions": {"texts": {"kind": "human"}}}
    return {"name": "all", "datasets": {"first": first, "second": second}, **keys}


def test_shared_defaults_beside_datasets_may_be_incomplete():
    config = parse_config(two_datasets(pack={"captions": "texts", "text": True}))
    assert [config.of(name).pack.sources for name in config.dataset_names] == [("texts",), ("texts",)]
    with pytest.raises(ConfigError, match=r"datasets\.first: pack\.captions names 'other'"):
        parse_config(two_datasets(pack={"captions": "other"}))


def test_a_dataset_can_replace_a_shared_caption_source_by_one_of_another_kind():
    shared = {"texts": {"kind": "blip2", "model": "nowhere/blip2"}, "also": {"kind": "label", "templates": ["{}!"]}}
    config = parse_config(two_datasets(captions=shared))
    assert [config.of(name).captions["texts"].kind for name in config.dataset_names] == ["label", "human"]
    assert config.of("first").captions["also"].templates == ("{}!",)
    values = two_datasets(captions=shared)
    values["datasets"]["first"]["captions"] = {"texts": {"key_frames": 1}}
    assert parse_config(values).of("first").captions["texts"].key_frames == 1, "keys of the same kind are merged"


VIDEOS = {"source": "folder", "root": "videos"}
FRAMES_ONLY = {"similarity": False, "motion": False}


def parse_frames(*frames, shared=None, roots=("videos", "videos", "videos"), **keys):
    """A config with a dataset per section of `frames`: a, b, c."""
    datasets = {
        name: {"dataset": {**VIDEOS, "root": root}, "frames": own}
        for name, root, own in zip("abc", roots, frames, strict=False)
    }
    return parse_config({"name": "all", "frames": shared or {}, "pack": FRAMES_ONLY, "datasets": datasets, **keys})


def test_frames_are_stored_at_a_step_or_by_their_number():
    config = parse_frames({"count": 16}, {}, {"every": 1}, shared={"every": 6})
    assert [(c.frames.every, c.frames.count) for c in config.datasets.values()] == [(None, 16), (6, None), (1, None)]
    assert parse_frames({"every": 1}, {}, shared={"count": 8}).of("a").frames.count is None
    assert parse_config(config.model_dump(mode="json")) == config
    # Results from before there was a number keep their receipts.
    assert "count" not in config.of("b").frames.fingerprint() and "every" not in config.of("a").frames.fingerprint()
    assert [config.of(name).frames.stored_frames(450) for name in "abc"] == [16, 75, 450]
    for wrong in (
        {"count": 8, "every": 2},
        {"every": None},
        {"count": 8, "min_frames": 9},
        {"count": 9, "max_frames": 8},
    ):
        with pytest.raises(ConfigError, match=r"every|at least min_frames"):
            parse_frames(wrong)


@pytest.mark.parametrize("name", ["motion", "flow"])
def test_motion_is_not_measured_between_frames_spread_over_a_clip(name):
    with pytest.raises(ConfigError, match=rf"pack\.{name} measures motion .*set pack\.{name} to false"):
        parse_frames({"count": 8}, pack={**FRAMES_ONLY, name: True})


def test_dense_sampling_needs_frames_at_a_step():
    run = {
        "model": "tiny",
        "dataset": "a",
        "frames": 4,
        "optimisation": {"epochs": 2, "warmup_epochs": 1, "batch_size": 8},
    }
    task = {"task": "linear", "dataset": "b"}
    with pytest.raises(ConfigError, match=r"pretrain\.mae samples frames `stride` apart.*of a stores 8 frames"):
        parse_frames({"count": 8}, {}, pretrain={"mae": run})
    with pytest.raises(ConfigError, match=r"evaluate\.linear samples frames `stride` apart.*of b stores 8 frames"):
        parse_frames({}, {"count": 8}, pretrain={"mae": run}, evaluate={"linear": task})
    sparse = {"linear": {**task, "sampling": "sparse"}}
    assert parse_frames({}, {"count": 8}, pretrain={"mae": run}, evaluate=sparse)
    assert parse_frames({"count": 8}, {"count": 8}, pretrain={"mae": {**run, "sampling": "tsn"}}, evaluate=sparse)


@pytest.mark.parametrize(
    ("frames", "roots", "words"),
    [
        (({}, {"from_dataset": "z"}), "vv", "datasets has: a, b"),
        (({}, {"from_dataset": "b"}), "vv", "takes its own frames from 'b'"),
        (({}, {"from_dataset": "a"}, {"from_dataset": "b"}), "vvv", "takes its own frames from 'a'"),
        (({}, {"from_dataset": "a"}), "vw", "not in the same folder"),
        (({}, {"from_dataset": "a", "every": 2}), "vv", "every of frames is 4, not 2"),
        (({"count": 8}, {"from_dataset": "a"}), "vv", "every of frames is None, not 4"),
    ],
)
def test_frames_are_shared_by_datasets_with_the_same_videos_and_settings(frames, roots, words):
    with pytest.raises(ConfigError, match=words):
        parse_frames(*frames, roots=roots)
    assert parse_frames({}, {"from_dataset": "a"}).of("b").frames.from_dataset == "a"
    with pytest.raises(ConfigError, match="only one dataset"):
        parse_config({"name": "one", "dataset": VIDEOS, "frames": {"from_dataset": "a"}})


def test_no_two_runs_write_to_the_same_folder():
    runs = {"a": {"seeds": [0, 1]}, "a-seed0": {}}
    with pytest.raises(ConfigError, match="both result in the run 'a-seed0'"):
        parse_config(DEMO | {"pretrain": runs, "evaluate": {}})
    assert len(parse_config(DEMO | {"pretrain": {**runs, "a": {"seeds": [1, 2]}}, "evaluate": {}}).runs) == 3


def test_a_run_with_its_own_seed_is_not_repeated_with_the_configs_seeds():
    config = parse_config(DEMO | {"seeds": [0, 1], "pretrain": {"a": {"seed": 7}, "b": {}}, "evaluate": {}})
    assert {name: run.seed for name, run in config.runs.items()} == {"a": 7, "b-seed0": 0, "b-seed1": 1}
    assert [*config.instances("a"), *config.instances("b")] == list(config.runs)
    with pytest.raises(ConfigError, match="either `seed` or `seeds`"):
        parse_config(DEMO | {"pretrain": {"a": {"seed": 7, "seeds": [1]}}, "evaluate": {}})


def test_retrieval_needs_packed_text_on_its_dataset():
    values = two_datasets(captions={"texts": {"kind": "label"}}, pack={"captions": "texts", "text": True})
    values["datasets"]["second"]["pack"] = {"text": False}
    values["pretrain"] = {"a": {"dataset": "first", "contrast": {}}}
    parse_config(values | {"evaluate": {"find": {"task": "retrieval"}}})
    with pytest.raises(ConfigError, match=r"evaluate\.find uses captions of second as queries, but pack\.text"):
        parse_config(values | {"evaluate": {"find": {"task": "retrieval", "dataset": "second"}}})


def test_a_table_and_a_figure_cannot_be_one_target():
    table = {"title": "", "columns": [{"title": "", "task": "linear"}], "rows": [{"label": "", "runs": "tube"}]}
    figure = {"title": "", "kind": "losses", "runs": {"Tube": "tube"}}
    with pytest.raises(ConfigError, match="'both' is the name of a table and of a figure"):
        parse_config(DEMO | {"tables": {"both": table}, "figures": {"both": figure}})


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            {"optimisation": {"batch_size": 24, "accumulate": 2}, "repeats": 2},
            "accumulate x processes x repeats = 2 x 8 x 2",
        ),
        ({"optimisation": {"batch_size": 24}}, "3 clips per pass, which must be even"),
        ({"optimisation": {"batch_size": 24}, "augmentation": {"mixup": 0, "cutmix": 0}}, None),
        ({"optimisation": {"epochs": 0}}, None),
        (
            {"task": "multiple_choice", "optimisation": {"batch_size": 256}},
            "negatives_among None does not divide the 32",
        ),
        ({"task": "multiple_choice", "negatives_among": 64, "optimisation": {"batch_size": 256}}, "negatives_among 64"),
        ({"task": "multiple_choice", "negatives_among": 16, "optimisation": {"batch_size": 256}}, None),
        ({"task": "multiple_choice"}, None),
        ({"task": "captioning", "optimisation": {"batch_size": 20}}, "accumulate x processes x repeats = 1 x 8 x 1"),
    ],
)
def test_the_batch_of_an_evaluation_is_divided_among_its_processes(task, words):
    values = {"task": "finetune", "processes": 4, "nodes": 2, **task}
    parse = TypeAdapter(EvaluationTask).validate_python
    if words is None:
        assert parse(values).world_size == 8
        return
    with pytest.raises(ValidationError, match=words):
        parse(values)


def test_fine_tuning_at_full_size_takes_the_papers_steps_on_eight_gpus():
    config = load_config(ROOT / "config/tgm.yaml")
    for name, rate in (
        ("finetune-ssv2", 5e-4),
        ("finetune-k400", 1e-3),
    ):  # TGM, Table 9: batches of 384 clips, rates per 256
        task = config.evaluate[name]
        o, scale = task.optimisation, task.optimisation.batch_size / 256
        assert o.batch_size / task.repeats == 384
        assert o.learning_rate * scale == pytest.approx(rate * 384 / 256)
        # VideoMAE scales the minimum with the batch size, too, and starts the warm-up at 0.
        assert o.warmup_learning_rate == 0
        assert o.min_learning_rate * scale == pytest.approx(1e-6 * 384 / 256)
        assert task.processes == 8 and o.batch_size / o.accumulate / task.processes <= 64, "samples of a GPU in a pass"
        assert o.accumulate * 48 * task.repeats == o.batch_size, "as many mixtures as GPUs of 48 clips"


def test_strategies_parsed_from_source_match_the_registered_ones():
    from stm.masking import get_strategy, strategy_names

    declared = {name: find_strategy(name).needs for name in strategy_names()}
    assert declared == {name: get_strategy(name).needs for name in strategy_names()}


def test_the_error_for_a_missing_or_broken_file_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(tmp_path / "list.yaml")


def test_the_header_of_a_shipped_config_states_what_it_reproduces():
    for path in CONFIGS:
        header = path.read_text().split("\n\nname:")[0]
        for word in ("Data", "Hardware", "Time", "Expect", "Source"):
            assert f"# {word} " in header, f"the header of {path.name} lacks {word}"


BAD_PLACES = {
    "": "must not be empty",
    "  ": "must not be empty",
    "~": "`~` is not expanded; write the whole path",
    "~/videos": "`~` is not expanded",
    "$HOME/videos": "variables are not expanded",
    "videos ": "has white space at its ends",
    "\tvideos": "has white space at its ends",
    "a\nb": "must not contain line breaks",
    "a\0b": "must not contain line breaks",
}


@pytest.mark.parametrize("place", BAD_PLACES)
@pytest.mark.parametrize("key", ["results", "dataset.root", "dataset.annotations"])
def test_paths_that_name_no_place_are_refused(key, place):
    values = {"name": "x", "dataset": {"source": "folder", "root": "videos"}}
    section = values["dataset"] if "." in key else values
    section[key.rpartition(".")[2]] = place
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    message = str(caught.value)
    assert f"{key.rpartition('.')[2]} = {place!r}: {BAD_PLACES[place]}" in message


@pytest.mark.parametrize("place", ["out{x}", "{}", "a}"])
def test_braces_are_refused_in_the_paths_of_the_workflow_only(place):
    folder = {"source": "folder", "root": place}
    assert parse_config({"name": "x", "dataset": folder}).dataset.root == place
    for values in ({"results": place, "dataset": folder}, {"dataset": {**folder, "annotations": place}}):
        with pytest.raises(ConfigError, match="must not contain braces, which are wildcards"):
            parse_config({"name": "x", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trackers": "wandb"}, "trackers = 'wandb': should be a list, such as [a, b]"),
        ({"tables": "x"}, "tables = 'x': should be a mapping of keys to values"),
        ({"pretrain": {"tube": 3}}, "pretrain.tube = 3: should be a mapping of keys to values"),
        ({"captions": {"human": 3}}, "captions.human = 3: should be a mapping of keys to values"),
    ],
)
def test_types_are_named_as_in_yaml(values, message):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x", "dataset": {"source": "moving-shapes"}, **values})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("seed", "shown"),
    [
        (16**5000, "a number of 20,001 bits: should be less than 2147483648"),
        ("9" * 5000, "... (5,002 characters): "),
        ([1] * 5000, "... (15,000 characters): "),
    ],
    ids=["number", "text", "list"],
)
def test_an_enormous_value_does_not_fill_the_message(seed, shown):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x", "dataset": {"source": "moving-shapes"}, "seed": seed})
    assert shown in str(caught.value) and len(str(caught.value)) < 500
