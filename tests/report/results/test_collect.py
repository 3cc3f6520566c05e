"""Reading results: counts, and how damaged and missing files are handled."""

import json
from pathlib import Path
from shutil import rmtree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_results import copy_results

from stm.config import Config
from stm.layout import Layout
from stm.report.results.collect import collect, collect_study
from stm.report.results.provenance import collect_provenance
from stm.report.results.records import Run
from stm.storage.files import write_json


@pytest.fixture
def copied(made_results: Config, tmp_path: Path) -> Config:
    """A copy that a test may damage."""
    return copy_results(made_results, tmp_path / "copy")


def test_clips_are_counted_at_each_stage(made_results: Config) -> None:
    results = collect(made_results, Layout.of(made_results))
    assert [(s.name, s.listed, s.kept, s.packed) for s in results.splits] == [("test", 5, 5, 5), ("train", 3, 3, 3)]
    assert results.problems == []


def test_clips_lost_at_a_stage_are_not_counted_there(copied: Config) -> None:
    layout = Layout.of(copied)
    rmtree(layout.root)
    lost = {"train-00000": (3, 2, 1), "train-00001": (4, 4, 3), "test-00000": (2, 1, 0)}  # listed, kept, packed
    splits = [split for split, listed in (("train", 3), ("train", 4), ("test", 2)) for _ in range(listed)]
    tables = {layout.manifest: pa.table({"split": splits})}
    for shard, (listed, kept, packed) in lost.items():
        tables[layout.frames(shard)] = pa.table({"kept": [number < kept for number in range(listed)]})
        tables[layout.shard(shard)] = pa.table(
            {"key": pa.array([str(number) for number in range(packed)], pa.string())}
        )
    for path, table in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    write_json(layout.shard_index, {"shards": dict.fromkeys(lost)})
    results = collect(copied, layout)
    assert [(s.name, s.listed, s.kept, s.packed) for s in results.splits] == [("test", 2, 1, 0), ("train", 7, 6, 4)]


def test_final_loss_is_the_mean_of_the_last_twentieth(made_results: Config) -> None:
    run = Run("r", made_results.pretrain["tube"], list(range(40)), [1.0] * 38 + [2.0, 4.0], None, {})
    assert run.final_loss == 3.0
    assert Run("r", made_results.pretrain["tube"], [1], [0.25], None, {}).final_loss == 0.25
    assert Run("r", made_results.pretrain["tube"], [], [], None, {}).final_loss is None


def test_a_repeated_step_counts_once_and_an_incomplete_line_is_skipped(copied: Config) -> None:
    lines = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 2.0},
        {"step": 1, "loss": 1.0},
        {"step": 3, "loss": float("nan")},
    ]
    path = Layout.of(copied).pretrain("tube") / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    run = collect(copied, Layout.of(copied)).runs[0]
    assert (run.steps, run.losses) == ([1, 2], [1.0, 2.0])


def test_an_evaluation_of_an_earlier_version_is_named_with_the_command_that_repeats_it(copied: Config) -> None:
    path = Layout.of(copied).evaluate("text", "linear") / "metrics.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "headline"}))
    results = collect(copied, Layout.of(copied))
    (problem,) = results.problems
    assert str(path) in problem and "`stm evaluate --run text --task linear` again" in problem
    assert set(results.runs[1].evaluations) == {"finetune"}


def test_a_damaged_file_is_named_and_the_rest_is_read(copied: Config) -> None:
    layout = Layout.of(copied)
    (layout.evaluate("text", "linear") / "metrics.json").write_text("{ not json")
    layout.mask_quality.write_text('{"rows": [{"guide": "text"}]}')
    layout.captions("human", "test-00000").write_bytes(b"PAR1 torn")
    results = collect(copied, layout)
    assert len([p for p in results.problems if p.startswith("linear of text")]) == 1
    assert len([p for p in results.problems if p.startswith("mask quality")]) == 1
    assert any("captions" in p for p in results.problems)
    assert set(results.runs[1].evaluations) == {"finetune"}
    assert set(results.runs[0].evaluations) == {"linear", "finetune"}


def test_the_quarantine_is_the_union_of_all_stages(made_results: Config) -> None:
    refusals = {
        (r.stage, r.video_id, r.status, r.kept) for r in collect(made_results, Layout.of(made_results)).refusals
    }
    assert refusals == {
        ("manifest", "<b>lost</b>", "missing_file", False),
        *(("frames", f"{split}-0", "truncated", True) for split in ("test", "train")),
        *(("motion", clip, "unsupported_motion", False) for clip in ("test-4", "train-2")),
        *(("captions/label", f"{split}-0", "caption_missing", False) for split in ("test", "train")),
    }


def test_caption_failures_are_counted_by_clip(made_results: Config) -> None:
    human, label = collect(made_results, Layout.of(made_results)).captions
    assert (human.clips, human.captions, human.failed) == (8, 16, 0)
    assert (label.clips, label.captions, label.failed) == (8, 12, 2)
    assert label.failed_share == 0.25
    assert len({caption for _, caption in human.examples}) == len(human.examples)


def test_an_empty_folder_is_not_an_error(made_results: Config, tmp_path: Path) -> None:
    empty = made_results.model_copy(update={"results": str(tmp_path)})
    results = collect(empty, Layout.of(empty))
    assert (results.splits, results.captions, results.refusals, results.problems) == ([], [], [], [])
    assert collect_provenance(collect_study(empty, Layout.of(empty)), Layout.of(empty)).stages == []


def test_time_is_summed_over_jobs_and_compared_with_the_plan(made_results: Config) -> None:
    layout = Layout.of(made_results)
    frames, pretrain = collect_provenance(collect_study(made_results, layout), layout).stages
    assert (frames.name, frames.jobs, frames.seconds, frames.cpu_seconds, frames.memory) == (
        "frames",
        2,
        20.0,
        30.0,
        220.5,
    )
    assert (frames.planned_jobs, frames.planned_cpu_seconds) == (2, pytest.approx(36.0))
    assert (pretrain.planned_jobs, pretrain.planned_cpu_seconds) == (2, pytest.approx(180.0))


def test_receipts_name_models_and_versions(made_results: Config) -> None:
    layout = Layout.of(made_results)
    provenance = collect_provenance(collect_study(made_results, layout), layout)
    models = {model.stage: model for model in provenance.models}
    assert models["similarity/human"].sha256 == "ab" * 32
    assert models["similarity/human"].name == made_results.similarity.model
    assert {"pretrain/tube", "pretrain/text", "pretrain/scratch"} <= set(models)
    assert {"stm", "av", "torch"} <= set(provenance.versions)


def test_a_plan_of_another_format_is_a_problem_and_not_a_crash(copied: Config) -> None:
    layout = Layout.of(copied)
    layout.plan.write_text("[1, 2]")
    study = collect_study(copied, layout)
    assert all(s.planned_jobs is None for s in collect_provenance(study, layout).stages)
    assert any(problem.startswith("plan") for problem in study.problems)
