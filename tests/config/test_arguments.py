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


@pytest.mark.parametrize(("name", "learned"), [("stm-argument-small", "spatiotemporal-{}"), ("stm-argument", "stm{}")])
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
    runs = load("clusterstm-argument-small").pretrain
    first = without(runs["cluster-85"], "mask")
    for mask in ("cluster", "attention", "tube", "random"):
        for ratio in (75, 85, 90):
            run = runs[f"{mask}-{ratio}"]
            assert (run.mask.strategy, run.mask.ratio, run.method) == (mask, ratio / 100, "clusterstm")
            assert without(run, "mask") == first
    full = load("clusterstm-argument").pretrain
    first = without(full["clusterstm"], "mask", "images.mask")
    for name in ("cluster-75", "cluster-90", "attention-85", "tube-85", "random-85"):
        run = full[name]
        assert f"{run.mask.strategy}-{100 * run.mask.ratio:.0f}" == name and run.images.mask.ratio == run.mask.ratio
        assert without(run, "mask", "images.mask") == first


@pytest.mark.parametrize(
    ("name", "own"), [("clusterstm-argument-small", "cluster-85"), ("clusterstm-argument", "clusterstm")]
)
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


@pytest.mark.parametrize("name", ["clusterstm-argument-small", "clusterstm-argument"])
def test_persistence_is_measured_for_four_masks_of_one_teacher_at_three_ratios(name: str) -> None:
    config = load(name)
    runs = {config.pretrain[r].mask.strategy: config.pretrain[r] for r in config.evaluate["kept-75"].runs or ()}
    assert set(runs) == {"cluster", "attention", "tube", "random"}
    assert len({str(without(run, "mask")) for run in runs.values()}) == 1 and not any(
        r.trains_encoder for r in runs.values()
    )
    assert [config.evaluate[f"kept-{ratio}"].ratio for ratio in (75, 85, 90)] == [0.75, 0.85, 0.9]


def test_full_size_runs_that_other_configs_have_are_shared() -> None:
    for argument, paper, shared in (
        ("stm-argument", "stm", ("umt", "stm")),
        ("clusterstm-argument", "clusterstm", ("umt", "clusterstm")),
    ):
        one, other = load(argument), load(paper)
        assert all(one.pretrain[run] == other.pretrain[run] for run in shared)
        assert all(one.datasets[name] == other.datasets[name] for name in one.datasets if name in other.datasets)
        tasks = [task for task in one.evaluate if task in other.evaluate]
        assert tasks and all(one.evaluate[t].fingerprint() == other.evaluate[t].fingerprint() for t in tasks)


@pytest.mark.parametrize(
    "name", ["stm-argument", "clusterstm-argument", "stm-argument-small", "clusterstm-argument-small"]
)
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
