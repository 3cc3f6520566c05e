"""Each stage is declared once; the rules, Snakemake's profile for Slurm and the command line agree with it."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from stm.config import Config, ConfigError, load_config, parse_config
from stm.stages.declaration import Stage
from stm.stages.jobs import Job, Jobs
from stm.stages.journey import all_stages
from stm.stages.rules import DeclaredRule, check_targets

ROOT = Path(__file__).parents[2]
STAGES = list(all_stages().values())
RULES = {path.name: path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk")}
SHAPES = {"source": "moving-shapes", "clips": {"train": 8, "test": 4}}
RUN = {"model": "tiny", "image_size": 32, "patch_size": 8, "frames": 4}
SEVERAL: dict[str, Any] = {
    "name": "paper",
    "grid": 8,
    "datasets": {"one": {"dataset": SHAPES}, "two": {"dataset": {**SHAPES, "seed": 1}, "grid": 4}},
    "captions": {"said": {"kind": "human"}, "label": {"kind": "label"}},
    "pack": {"captions": ["said", "label"]},
    "pretrain": {"tube": {**RUN, "dataset": "two", "seeds": [0, 1]}, "random": {**RUN, "dataset": "one", "workers": 3}},
    "evaluate": {"linear": {"task": "linear", "dataset": "one", "runs": ["tube"]}},
}


def made_jobs(values: dict[str, Any] = SEVERAL) -> Jobs:
    return Jobs(parse_config(values), lambda dataset: ["test-00000", "train-00000", "train-00001"])


def text_of(rule: str) -> str:
    """The text of a rule in its file."""
    pattern = rf"^(?:rule|checkpoint) {rule}:\n(.*?)(?=^\S|\Z)"
    (found,) = [m[1] for text in RULES.values() for m in re.finditer(pattern, text, re.M | re.S)]
    return found


def name(stage: Stage) -> str:
    return stage.name


def test_the_declarations_are_light() -> None:
    heavy = "('torch', 'av', 'cv2', 'transformers', 'matplotlib', 'open_clip', 'simplejpeg')"
    code = f"import sys; from stm.stages.journey import all_stages; all_stages(); print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_a_rule_shows_every_output_where_it_will_lie(stage: Stage) -> None:
    """The comment beside an output agrees with the declaration."""
    output, text = DeclaredRule(stage, made_jobs()).output, text_of(stage.name)
    for key, pattern in vars(output).items():
        line = f"{stage.name.upper()}.output.{key}"
        assert line in text
        comment = re.search(rf"{re.escape(line)}[,)]+ +# (\S+)$", text, re.M)
        if isinstance(pattern, str) and comment is not None:
            assert pattern == comment[1] or pattern.endswith(f"/{comment[1]}")
        else:
            assert "report(" in text


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_a_rule_has_a_sentence_for_list_rules_and_all_that_its_stage_asks_for(stage: Stage) -> None:
    text, upper = text_of(stage.name), stage.name.upper()
    assert re.match(r'    """[A-Z][^"]+\."""\n', text)
    assert f"settings={upper}.settings" in text and '"../scripts/stage.py"' in text
    for resource in stage.resources:
        assert f"{resource}={upper}.resource.{resource}," in text
    assert ("input:" in text) == (stage.inputs(made_job(stage)) != {})
    assert (f"cache: {upper}.shared" in text) == (f"made_with={upper}.made_with" in text) == stage.shared
    if stage.threads != 1:
        assert f"threads: {upper}.threads" in text


def made_job(stage: Stage) -> Job:
    jobs = made_jobs({**SEVERAL, "mask_quality": {}, **SHOWN})
    dataset = "two" if "dataset" in stage.per else ""
    return next(stage.each(jobs, dataset))


SHOWN: dict[str, Any] = {
    "tables": {
        "numbers": {
            "title": "Numbers",
            "columns": [{"title": "Linear", "task": "linear"}],
            "rows": [{"label": "Tube", "runs": "tube"}],
        }
    },
    "figures": {"losses": {"title": "Losses", "kind": "losses", "runs": {"Tube": "tube"}}},
}


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_every_output_of_a_job_fits_its_rules_pattern(stage: Stage) -> None:
    """Snakemake derives the wildcards from file names, so paths and patterns must agree."""
    job = made_job(stage)
    patterns = vars(DeclaredRule(stage, job.jobs).output)
    wildcards = {key: getattr(job, key) for key in stage.per} | {"split": job.shard.split("-")[0]}
    for key, found in stage.outputs(job).items():
        if not isinstance(found, list):
            assert patterns[key].format(**wildcards) == found.as_posix()


def test_the_slurm_profile_names_a_partition_for_every_stage_on_gpus_and_leaves_amounts_to_the_rules() -> None:
    shipped = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text())["set-resources"]
    on_gpus = {stage.name for stage in STAGES if "gpu" in stage.resources}
    cores_only = {name for name, values in shipped.items() if values.get("gpu") == 0}
    assert {name for name, values in shipped.items() if values.get("slurm_partition") == "gpu"} == on_gpus - cores_only
    assert not any({"mem_mb", "runtime"} & set(values) for values in shipped.values())


class FixedRequests:
    """What a plan would say: 50 minutes with four cores, and a gigabyte per core."""

    def threads(self, stage: Stage, job: Job) -> int | None:
        return 6 if job.run == "random" else None

    def memory(self, stage: Stage, job: Job, threads: int) -> int | None:
        return 1000 * threads if job.run else None

    def minutes(self, stage: Stage, job: Job, threads: int) -> int | None:
        return 200 // threads if job.run else None


def test_jobs_on_a_cluster_request_what_is_computed_growing_up_to_the_limit() -> None:
    jobs, stages = made_jobs(), all_stages()
    limits = {"runtime": 120, "mem_mb": 10000}
    rule = DeclaredRule(stages["pretrain"], jobs, requests=FixedRequests(), limits=limits)
    run = SimpleNamespace(dataset="one", run="random")
    assert rule.threads(run) == 6
    assert [rule.resource.mem_mb(run, attempt=n, threads=4) for n in (1, 2, 3)] == [4000, 8000, 10000]
    assert [rule.resource.runtime(run, attempt=n, threads=4) for n in (1, 2, 3)] == [50, 100, 120]
    # Nothing is computed for these, so that the declaration holds: 16 GB and eight hours.
    rule = DeclaredRule(stages["captions"], jobs, requests=FixedRequests())
    shard = SimpleNamespace(dataset="one", source="said", shard="train-00000")
    assert rule.resource.mem_mb(shard, attempt=2, threads=8) == 32000
    assert rule.resource.runtime(shard, attempt=2, threads=8) == 960


def test_a_run_with_more_processes_than_there_are_gpus_is_refused() -> None:
    class Shown(Exception):
        pass

    config = {**SEVERAL, "pretrain": {**SEVERAL["pretrain"], "two": {**RUN, "dataset": "one", "processes": 4}}}
    run = SimpleNamespace(dataset="one", run="two")
    stage, jobs = all_stages()["pretrain"], made_jobs(config)
    rule = DeclaredRule(stage, jobs, refuse=lambda error: Shown(str(error)), gpus=2)
    with pytest.raises(Shown, match="pretrain one/two uses 4 GPUs, one per process, and the workflow may use 2"):
        rule.resource.gpu(run)
    assert DeclaredRule(stage, jobs, gpus=4).resource.gpu(run) == 4


def test_jobs_are_told_apart_by_dataset_source_shard_run_and_task() -> None:
    jobs, stages = made_jobs(), all_stages()
    shards = ["test-00000", "train-00000", "train-00001"]
    assert [(j.dataset, j.source, j.shard) for j in stages["captions"].each(jobs, "one")] == [
        ("one", source, shard) for source in ("said", "label") for shard in shards
    ]
    assert [j.run for j in stages["pretrain"].each(jobs, "two")] == ["tube-seed0", "tube-seed1"]
    assert [(j.run, j.task) for j in stages["evaluate"].each(jobs, "two")] == [
        ("tube-seed0", "linear"),
        ("tube-seed1", "linear"),
    ]
    assert list(stages["evaluate"].each(jobs, "one")) == []
    assert list(stages["mask_quality"].each(jobs, "one")) == []
    assert len(list(stages["plan"].each(jobs))) == 1


def test_settings_are_the_datasets_own_without_what_changes_no_byte() -> None:
    jobs = made_jobs()
    assert jobs.make(dataset="one").settings(("grid", "seed")) == {"grid": 8, "seed": 0}
    assert jobs.make(dataset="two").settings(("grid", "frames.min_side")) == {"grid": 4, "frames.min_side": 32}
    frames = jobs.make(dataset="one").settings(("frames",))["frames"]
    assert "short_side" in frames and "timeout_seconds" not in frames
    said = jobs.make(dataset="one", source="said").settings(("captions.{source}",))
    # Without the name of the source: another project with another name for it may reuse the results.
    assert said == {"captions.{source}": {"kind": "human"}}
    run = jobs.make(dataset="one", run="random").settings(("runs.{run}",))["runs.{run}"]
    assert "workers" not in run and run["model"] == "tiny"
    assert jobs.make().settings(("*",))["*"]["name"] == "paper"


def test_local_models_go_by_their_own_names_and_their_files_are_inputs(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/weights.bin").touch()
    jobs = made_jobs({**SEVERAL, "similarity": {"model": f"local-dir:{tmp_path}/clip"}})
    rule = DeclaredRule(all_stages()["similarity"], jobs)
    wildcards = SimpleNamespace(dataset="one", source="said", shard="train-00000")
    assert rule.settings(wildcards)["similarity"]["model"] == "local-dir:clip"
    assert rule.inputs(wildcards)["model"] == [f"{tmp_path}/clip/weights.bin"]
    assert rule.inputs(wildcards)["captions"] == "results/one/captions/said/train-00000.parquet"


def test_memory_grows_with_each_attempt_and_threads_are_shared_among_runs() -> None:
    config = {**SEVERAL, "pretrain": {**SEVERAL["pretrain"], "two": {**RUN, "dataset": "one", "processes": 4}}}
    jobs, stages = made_jobs(config), all_stages()
    assert DeclaredRule(stages["captions"], jobs).resource.mem_mb("any", attempt=2) == 32000
    rule = DeclaredRule(stages["pretrain"], jobs, cores=8)
    small, large = (SimpleNamespace(dataset="one", run=run) for run in ("random", "two"))
    assert (rule.threads(small), rule.threads(large)) == (2, 4)  # eight cores, four runs
    assert rule.resource.mem_mb(large, attempt=1) == 80000
    assert (rule.resource.gpu(large), rule.resource.nodes(large)) == (4, 1)


@pytest.mark.parametrize(
    ("section", "name"), [("tables", "pretrain"), ("figures", "all"), ("tables", "crop_agreement")]
)
def test_a_table_or_figure_named_like_a_rule_is_refused(section: str, name: str) -> None:
    (entry,) = SHOWN[section].values()
    check_targets(made_jobs({**SEVERAL, **SHOWN}).study)
    with pytest.raises(ConfigError, match=f"{section}.{name}: the workflow has a rule '{name}'; rename"):
        check_targets(made_jobs({**SEVERAL, **SHOWN, section: {name: entry}}).study)


def test_an_evaluation_requests_a_gpu_and_a_core_for_each_process_and_nodes_as_pretraining_does() -> None:
    values = {**SEVERAL, "evaluate": {"one": {"task": "linear", "processes": 3}, "two": {"task": "linear", "nodes": 2}}}
    rule = DeclaredRule(all_stages()["evaluate"], made_jobs(values), cores=2)
    one, two = (SimpleNamespace(dataset="two", run="tube-seed0", task=task) for task in ("one", "two"))
    names = ("gpu", "nodes", "tasks", "gres", "mpi", "tasks_per_gpu")
    assert [getattr(rule.resource, name)(one) for name in names] == [3, 1, None, None, None, None]
    assert [getattr(rule.resource, name)(two) for name in names] == [None, 2, 2, "gpu:1", "srun", 0]
    assert (rule.threads(one), rule.resource.mem_mb(one, attempt=1)) == (3, 64000)


def test_a_split_without_clips_is_refused_with_both_names() -> None:
    class Shown(Exception):
        pass

    values = {**SEVERAL, "evaluate": {"linear": {"task": "linear", "test_split": "held-out"}}}
    rule = DeclaredRule(all_stages()["evaluate"], made_jobs(values), refuse=lambda error: Shown(str(error)))
    with pytest.raises(Shown, match=r"two has no clips of the split 'held-out'"):
        rule.inputs(SimpleNamespace(dataset="two", run="tube-seed0", task="linear"))


def test_a_run_waits_for_the_run_whose_weights_it_starts_from_and_for_no_other_file() -> None:
    first = "results/two/pretrain/tube-seed0/weights.safetensors"
    values = {**SEVERAL, "pretrain": {**SEVERAL["pretrain"], "random": {**RUN, "dataset": "one", "init": first}}}
    job = made_jobs(values).make(dataset="one", run="random")
    pretrain = all_stages()["pretrain"]
    assert pretrain.inputs(job)["init"] == [Path(first)]
    assert pretrain.models(job)["init"] == [None]


def test_shards_that_are_not_dealt_yet_are_named_with_what_to_run(tmp_path: Path) -> None:
    config: Config = load_config(ROOT / "config/demo.yaml").model_copy(update={"results": str(tmp_path)})
    with pytest.raises(ConfigError, match="stm split"):
        list(all_stages()["frames"].each(Jobs(config), "shapes"))


def test_what_is_asked_for_once_is_found_once() -> None:
    jobs, asked = made_jobs(), []
    for _ in range(3):
        assert jobs.once("listing", lambda: asked.append(1) or len(asked)) == 1


@pytest.mark.parametrize(
    ("stage", "wildcards", "words"),
    [
        (
            "pretrain",
            {"dataset": "one", "run": "tube-seed0"},
            "the run tube-seed0 trains on two, not one; its files are under",
        ),
        ("pretrain", {"dataset": "two", "run": "cube"}, "no run 'cube'; it has: tube-seed0, tube-seed1, random"),
        ("evaluate", {"dataset": "one", "run": "random", "task": "linear"}, "linear does not apply to the run random"),
        ("evaluate", {"dataset": "one", "run": "random", "task": "probe"}, "no evaluation 'probe'; it has: linear"),
        (
            "captions",
            {"dataset": "one", "source": "sad", "shard": "test-00000"},
            "no caption source 'sad'; it has: said",
        ),
    ],
)
def test_a_requested_file_that_the_config_has_not_is_one_message(
    stage: str, wildcards: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        DeclaredRule(all_stages()[stage], made_jobs()).inputs(SimpleNamespace(**wildcards))
    assert words in str(error.value)


def test_shards_that_nothing_reads_guides_of_need_none() -> None:
    """A split that no run trains on has guides in its first shards alone, for the page; and what is read has them all."""
    captions = {"said": {"kind": "human"}, "label": {"kind": "label"}}
    values = {
        **{"name": "one", "dataset": SHAPES, "shard_size": 256, "grid": 8, "captions": captions},
        **{"pack": {"captions": ["said", "label"], "text": True, "flow": True}},
        "pretrain": {"tube": {**RUN, "contrast": {}}},
        "evaluate": {"linear": {"task": "linear", "test_split": "val"}},
    }
    everything = {"slice", "tar", "frames", "captions", "similarity", "text", "motion", "flow"}
    unread = {"slice", "tar", "frames"}

    def parts(values: dict[str, Any]) -> list[set[str]]:
        """The inputs of the shards stage that are there: of a training shard, the first, second and third of `val`."""
        jobs = Jobs(parse_config(values), lambda dataset: shards)
        made = [all_stages()["shards"].inputs(jobs.make(dataset="one", shard=shard)) for shard in shards]
        return [{name for name, files in inputs.items() if files} for inputs in made]

    shards = ["train-00007", "val-00000", "val-00001", "val-00002"]
    assert parts(values) == [everything, everything, everything, unread]
    assert parts({**values, "pack": values["pack"] | {"more_splits": ["val"]}}) == [everything] * 4
    assert parts({**values, "evaluate": {"retrieval": {"task": "retrieval", "test_split": "val"}}}) == [everything] * 4
    assert parts({**values, "crop_agreement": {"split": "val"}}) == [everything] * 4
    assert (
        parts({key: value for key, value in values.items() if key not in ("pretrain", "evaluate")}) == [everything] * 4
    )

    jobs = Jobs(parse_config(values), lambda dataset: shards)
    report = all_stages()["report"].inputs(jobs.make())["datasets"]
    captioned = {path.stem for path in report if "captions" in path.parts}
    assert captioned == {"train-00007", "val-00000", "val-00001"}


def test_what_a_shard_holds_decides_its_settings() -> None:
    """Shards with and without guides are made by one rule, and each is up to date with its own settings."""
    values = {
        **{"name": "one", "dataset": SHAPES, "shard_size": 1000, "captions": {"said": {"kind": "human"}}},
        **{"pack": {"captions": "said", "more_splits": ["test"]}, "pretrain": {"tube": RUN}},
    }
    jobs = Jobs(parse_config(values), lambda dataset: [])
    rule = DeclaredRule(all_stages()["shards"], jobs)

    def pack(split: str, number: int) -> dict[str, Any]:
        wildcards = SimpleNamespace(dataset="one", split=split, shard=f"{split}-{number:05d}")
        settings: dict[str, Any] = rule.settings(wildcards)["pack"]
        return settings

    assert pack("train", 9) == pack("val", 0) == pack("test", 1) == parse_config(values).pack.fingerprint()
    assert pack("val", 1) == {**pack("train", 9), "captions": None, "similarity": False, "motion": False}


def test_the_sources_of_a_shard_are_scored_in_one_job() -> None:
    captions = {"said": {"kind": "human"}, "label": {"kind": "label"}, "third": {"kind": "label"}}
    values = {
        **{"name": "one", "dataset": SHAPES, "captions": captions, "pack": {"captions": ["label", "said"]}},
        **{"pretrain": {"tube": RUN}, "mask_quality": {"split": "test"}},
    }

    def maps(values: dict[str, Any], source: str, shard: str) -> list[str]:
        job = Jobs(parse_config(values), lambda dataset: []).make(dataset="one", source=source, shard=shard)
        return sorted(name for name, files in all_stages()["similarity"].inputs(job).items() if files)

    direct, taken = ["captions", "frames", "tar"], ["captions", "frames", "maps"]
    assert maps(values, "said", "train-00000") == maps(values, "third", "test-00000") == taken
    assert maps(values, "third", "train-00000") == direct  # which nothing reads; someone asked for it
    assert maps({**values, "pack": {"captions": "said"}}, "said", "train-00000") == direct
    assert maps({**values, "pack": {"captions": "said"}}, "said", "test-00000") == taken  # with those of mask_quality
    kept = {**values, "similarity": {"keep_embeddings": True}}
    assert maps(kept, "said", "train-00000") == ["captions", "embeddings", "frames", "tar"]
    jobs = Jobs(parse_config(values), lambda dataset: [])
    read = all_stages()["joint_similarity"].inputs(jobs.make(dataset="one", shard="test-00000"))["captions"]
    assert [path.parent.name for path in read] == ["said", "label", "third"]
    rule = DeclaredRule(all_stages()["similarity"], jobs)
    scored, taken_from = (
        SimpleNamespace(dataset="one", source="third", shard=f"{split}-00000") for split in ("train", "test")
    )
    assert (rule.resource.gpu(scored), rule.resource.gpu(taken_from)) == (1, None)
