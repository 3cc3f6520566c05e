"""The configs of the papers' arguments: runs of a comparison differ in what is compared, and in nothing else."""

from pathlib import Path
from typing import Any

import pytest

from stm.config import Config, load_config

ROOT = Path(__file__).parents[2]


def load(name: str) -> Config:
    return load_config(ROOT / f"config/{name}.yaml")


def without(run: Any, *keys: str) -> dict[str, Any]:
    """A run's settings without those that a comparison varies."""
    values = run.model_dump(mode="json")
    for key in keys:
        section, _, inner = key.partition(".")
        values[section] = {k: v for k, v in (values[section] or {}).items() if k != inner} if inner else None
    return values


@pytest.mark.parametrize(("name", "learned"), [("stm-small", "spatiotemporal-{}"), ("stm-argument", "stm{}")])
def test_stm_s_six_runs_are_three_masks_by_two_targets(name: str, learned: str) -> None:
    runs = load(name).pretrain
    own = (
        {"image": "stm-image", "video": "stm"}
        if learned == "stm{}"
        else {t: learned.format(t) for t in ("image", "video")}
    )
    cells = {
        (strategy, target): runs[own[target] if strategy == "spatiotemporal" else f"{short}-{target}"]
        for short, strategy in (("tube", "tube"), ("attention", "attention_hidden"), ("", "spatiotemporal"))
        for target in ("image", "video")
    }
    for (strategy, target), run in cells.items():
        assert (run.mask.strategy, run.mask.ratio) == (strategy, 0.7)
        assert (run.teacher.temporal_fusion is not None) == (target == "video")
        # The decoder compares frames in all; a learned mask makes it do so, whatever the setting.
        assert strategy == "spatiotemporal" or run.spatio_temporal.compares == "always"
    varied = ("mask.strategy", "teacher.temporal_fusion", "spatio_temporal.compares")
    first, *others = (without(run, *varied) for run in cells.values())
    assert all(other == first for other in others)
    assert len({run.teacher.temporal_fusion for run in cells.values()}) == 2


def test_clusterstm_s_masks_differ_in_strategy_and_ratio_alone() -> None:
    compared = ("cluster-75", "cluster-90", "attention-85", "tube-85", "random-85")
    runs = load("clusterstm-small").pretrain
    first = without(runs["cluster-85"], "mask")
    for name in ("cluster-85", *compared):
        run = runs[name]
        assert f"{run.mask.strategy}-{100 * run.mask.ratio:.0f}" == name and run.method == "clusterstm"
        assert without(run, "mask") == first
    full = load("clusterstm-argument").pretrain
    first = without(full["clusterstm"], "mask", "images.mask")
    for name in compared:
        run = full[name]
        assert f"{run.mask.strategy}-{100 * run.mask.ratio:.0f}" == name and run.images.mask.ratio == run.mask.ratio
        assert without(run, "mask", "images.mask") == first


@pytest.mark.parametrize(("name", "own"), [("clusterstm-small", "cluster-85"), ("clusterstm-argument", "clusterstm")])
def test_clusterstm_s_objectives_are_relevance_and_alignment_on_and_off(name: str, own: str) -> None:
    runs = load(name).pretrain
    weights = {
        (run.objectives.relevance, run.objectives.alignment)
        for run in (runs[r] for r in ("texts-alone", "alignment-alone", own, "relevance-alignment"))
    }
    assert weights == {(0, 0), (0, 1), (1, 0), (1, 1)}
    varied = ("objectives.relevance", "objectives.alignment")
    first = without(runs[own], *varied)
    assert all(without(runs[r], *varied) == first for r in ("texts-alone", "alignment-alone", "relevance-alignment"))
    umt = runs["umt" if name.endswith("small") else "umt-siglip"]
    assert umt.teacher == runs[own].teacher and umt.method == "umt" and umt.mask.strategy == "attention"


@pytest.mark.parametrize("name", ["clusterstm-small", "clusterstm-argument"])
def test_persistence_is_measured_for_four_masks_of_one_teacher_at_three_ratios(name: str) -> None:
    config = load(name)
    runs = {config.pretrain[r].mask.strategy: config.pretrain[r] for r in config.evaluate["kept-75"].runs or ()}
    assert set(runs) == {"cluster", "attention", "tube", "random"}
    assert len({str(without(run, "mask")) for run in runs.values()}) == 1 and not any(
        r.trains_encoder for r in runs.values()
    )
    assert [config.evaluate[f"kept-{ratio}"].ratio for ratio in (75, 85, 90)] == [0.75, 0.85, 0.9]
    # "at each ratio", says the header
    asked = {(e.evaluation, e.above) for e in config.report.expect if getattr(e, "run", None) == "kept-cluster"}
    assert asked == {(f"kept-{r}", f"kept-{m}") for r in (75, 85, 90) for m in ("attention", "tube", "random")}


@pytest.mark.parametrize(
    ("name", "other", "shared"),
    [
        ("stm-argument", "stm", {"umt", "stm"}),
        ("clusterstm-argument", "clusterstm", {"umt", "clusterstm"}),
        ("stm-small", "clusterstm-small", {"umt", "scratch"}),
    ],
)
def test_runs_that_two_studies_have_are_shared(name: str, other: str, shared: set[str]) -> None:
    """They write to the same folder, so entries of the same name must be equal, and are made once."""
    one, two = load(name), load(other)
    assert (one.results, one.seeds) == (two.results, two.seeds)
    assert one.pretrain.keys() & two.pretrain.keys() == shared
    assert all(one.pretrain[run] == two.pretrain[run] for run in shared)
    assert all(one.datasets[dataset] == two.datasets[dataset] for dataset in one.datasets if dataset in two.datasets)
    tasks = [task for task in one.evaluate if task in two.evaluate]
    assert tasks and all(one.evaluate[task].fingerprint() == two.evaluate[task].fingerprint() for task in tasks)


@pytest.mark.parametrize("name", ["stm-argument", "clusterstm-argument", "stm-small", "clusterstm-small"])
def test_predictions_are_in_the_header_and_are_checked(name: str) -> None:
    header = (ROOT / f"config/{name}.yaml").read_text().partition("\nextends:")[0]
    predicted = header.partition("Predicted")[2].partition("Enough" if "Enough" in header else "Expect")[0]
    numbers = {
        line.split()[1]
        for line in predicted.splitlines()
        if line.startswith("#              ") and line.split()[1].isdigit()
    }
    checked = {expected.says.split(".")[0] for expected in load(name).report.expect}
    assert numbers and numbers <= checked
