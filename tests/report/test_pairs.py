"""Differences of two runs on the same test clips: closed forms, coverage and power by simulation, files and command."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from stm.cli import main
from stm.config import load_config
from stm.report.pairs import Difference, Spread, compare_runs, detectable, expected_spread, mean_of, plan
from stm.report.results.evaluations import ReportError
from stm.report.results.records import student_quantile
from stm.storage.tables import write_table


def answers(first_alone: int, second_alone: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """[1, n] of two runs: clips about which the first, the second, both or neither is right."""
    first = [1] * first_alone + [0] * second_alone + [1] * both + [0] * neither
    second = [0] * first_alone + [1] * second_alone + [1] * both + [0] * neither
    return np.array([first], bool), np.array([second], bool)


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """The difference of two runs, [S, n] whether each is right."""
    return mean_of(first.astype(np.float64) - second)


def test_one_seed_is_the_interval_of_mcnemars_pairs() -> None:
    first_alone, second_alone, n = 60, 40, 500
    found = paired_difference(*answers(first_alone, second_alone, 150, 250))
    difference = (first_alone - second_alone) / n
    variance = ((first_alone + second_alone) / n - difference**2) / (n - 1)
    assert found.value == pytest.approx(difference) and found.discordant == 0.2
    assert (found.high - found.low) / 2 == pytest.approx(2.042 * np.sqrt(variance))  # Student's, 30 degrees of freedom
    # Clips about which both runs agree change nothing but the number of clips.
    assert paired_difference(*answers(first_alone, second_alone, 400, 0)).low == pytest.approx(found.low)


def test_seeds_that_repeat_each_other_add_nothing_and_seeds_alone_are_students_t() -> None:
    one, other = answers(60, 40, 150, 250)
    alone = paired_difference(one, other)
    repeated = paired_difference(one.repeat(4, 0), other.repeat(4, 0))
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high), rel=1e-6)
    assert (repeated.spread.seeds, repeated.spread.rest) == pytest.approx((0, 0), abs=1e-12)
    # Runs that are right about all clips or none: only the seeds differ.
    wins = np.array([1, 1, 1, 0, 0], bool)
    by_seed = paired_difference(wins[:, None].repeat(50, 1), np.zeros((5, 50), bool))
    half = 2.776 * np.std(wins, ddof=1) / np.sqrt(5)
    assert (by_seed.low, by_seed.high) == pytest.approx((0.6 - half, 0.6 + half))


def test_equal_clips_are_the_sign_test() -> None:
    """Of n clips that the first run alone is right about, the exact test (2 / 2^n) tells it apart from 6 on."""
    for n in range(2, 12):
        found = paired_difference(np.ones((1, n), bool), np.zeros((1, n), bool))
        assert (found.value, found.high) == (1.0, 1.0) and (found.sign == 1) == (2 * 0.5**n < 0.05) == (n > 5)
    # Runs that never differ: the exact binomial interval of a share of which none of 128 clips was seen.
    found = paired_difference(np.ones((3, 128), bool), np.ones((3, 128), bool))
    assert found.value == 0 and (found.low, found.high) == pytest.approx((-0.0284, 0.0284), abs=1e-4)


def test_what_cannot_be_planned_is_said() -> None:
    equal = paired_difference(np.ones((3, 128), bool), np.ones((3, 128), bool))
    assert "no study can be planned" in plan(equal, 5, 1000)
    one_seed = paired_difference(*answers(60, 40, 150, 250))
    assert plan(one_seed, None, None).startswith("1 seed and 500 test clips tell")
    with pytest.raises(ReportError, match="an interval needs two test clips at least"):
        plan(one_seed, None, 1)
    with pytest.raises(ReportError, match="a study with 5 seeds cannot be planned from one seed"):
        plan(one_seed, 5, None)
    assert "1 seed, 500 clips" in one_seed.describe() and "says nothing about other seeds" in one_seed.describe()


def test_quantiles_between_degrees_of_freedom_are_interpolated() -> None:
    """From the exact quantile, by the integral of the density, to 2 % more; between 1 and 2, where it falls fast, to 19 %."""
    for freedom, exact in ((1.5, 6.017), (2.2, 3.949), (2.5, 3.575), (7.3, 2.345), (29.9, 2.043)):
        assert exact - 0.001 <= student_quantile(freedom) <= exact * (1.02 if freedom > 2 else 1.19)
    assert [student_quantile(freedom) for freedom in (1, 2, 30, 1e6)] == [12.706, 4.303, 2.042, 2.042]


def test_the_plan_of_a_study_in_closed_form() -> None:
    spread = expected_spread(discordant=0.3, systematic=0.1, deviation=0.01)
    assert (spread.seeds, spread.clips, spread.rest) == pytest.approx((0.0002, 0.03, 0.27))
    # Many seeds and clips: only sqrt(V_seed / S + V_clip / n + V_rest / (S n)) times the two quantiles is left.
    variance = 0.0002 / 400 + 0.03 / 1000 + 0.27 / 400_000
    assert detectable(spread, 400, 1000) == pytest.approx((2.042 + 0.8416) * np.sqrt(variance), rel=0.01)
    assert detectable(spread, 5, 1920) > detectable(spread, 5, 3840) > detectable(spread, 10, 3840)
    only_seeds = Spread(0.0002, 0.0, 0.0)
    assert detectable(only_seeds, 5, 10) == pytest.approx(detectable(only_seeds, 5, 10_000))


def test_the_plan_in_the_header_of_tgm_small_is_the_formulas() -> None:
    header = (Path(__file__).parents[2] / "config/tgm-small.yaml").read_text().split("\nname:")[0]
    titles = re.search(r"seeds, clips((?:   \d+ seeds?, \d+)+)", header)
    assert titles
    sizes = [(int(seeds), int(clips)) for seeds, clips in re.findall(r"(\d+) seeds?, (\d+)", titles[1])]
    rows = re.findall(r"^#   (0\.\d+), (0\.\d+) +([\d. ]+)$", header, re.M)
    assert len(rows) == 3
    for deviation, discordant, numbers in rows:
        spread = expected_spread(float(discordant), 0.1, float(deviation))
        points = [100 * detectable(spread, *size) for size in sizes]
        assert [float(number) for number in numbers.split()] == pytest.approx(points, abs=0.051)


def test_the_plan_of_the_small_studies_of_stm_and_clusterstm_is_what_its_lines_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(__file__).parents[2] / "config/base/video-language-small.yaml"
    header = base.read_text().split("\nresults:")[0]
    plan = [line.removeprefix("#").removeprefix(" " * 14) for line in header.splitlines()]
    rows = [numbers for line in plan if len(numbers := re.findall(r"  (\d+\.\d)\b", line)) == 3]
    first = next(number for number, line in enumerate(plan) if line.startswith("from stm"))
    exec("\n".join(plan[first : plan.index("", first)]), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(rows) == 6 and rows[0] == ["0.5", "1.0", "2.0"]
    for row, line in zip(rows[1:], lines, strict=True):
        printed = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        assert [float(number) for number in row] == pytest.approx(printed, abs=0.051)


def simulate(spread_of_seeds: float, spread_of_clips: float, difference: float, seeds: int, clips: int) -> tuple:
    """Share of 300 studies whose interval holds the difference, share that tells it from 0, and the mean spread."""
    rng = np.random.default_rng(1)
    holds, told, spreads = [], [], []
    for _ in range(300):
        ease, favours = rng.normal(0, 0.2, clips), rng.normal(0, spread_of_clips, clips)
        runs = []
        for sign in (1, -1):
            chance = 0.4 + sign * (difference + favours) / 2 + ease + rng.normal(0, spread_of_seeds, (seeds, 1))
            runs.append(rng.random((seeds, clips)) < chance)
        found = paired_difference(*runs)
        holds.append(found.low <= difference <= found.high)
        told.append(found.low > 0)
        spreads.append([found.spread.seeds, found.spread.clips, found.spread.rest])
    return np.mean(holds), np.mean(told), Spread(*np.mean(spreads, axis=0))


@pytest.mark.parametrize(("of_seeds", "of_clips", "seeds"), [(0.01, 0.1, 5), (0.02, 0.1, 3), (0.005, 0.2, 5)])
def test_intervals_hold_the_truth_and_the_planned_difference_is_told(
    of_seeds: float, of_clips: float, seeds: int
) -> None:
    holds, _, spread = simulate(of_seeds, of_clips, 0.0, seeds, 400)
    assert holds > 0.93
    planned = detectable(spread, seeds, 400)
    holds, told, _ = simulate(of_seeds, of_clips, planned, seeds, 400)
    assert holds > 0.93 and 0.7 < told < 0.9


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("clips", [128, 2000])
@pytest.mark.parametrize(
    "spread", [Spread(0, 0, 0.3), Spread(0.0002, 0.01, 0.3), Spread(0.0018, 0, 0.3), Spread(0, 0.05, 0.3)]
)
def test_coverage_and_power_of_few_seeds(seeds: int, clips: int, spread: Spread) -> None:
    """Of 300 studies of the crossed model, with normal effects."""
    rng = np.random.default_rng(0)
    deviations = np.sqrt([spread.seeds, spread.clips, spread.rest])
    planned, holds, told = detectable(spread, seeds, clips), 0, 0
    for _ in range(300):
        of_seeds, of_clips = rng.normal(0, deviations[0], (seeds, 1)), rng.normal(0, deviations[1], clips)
        found = mean_of(of_seeds + of_clips + rng.normal(0, deviations[2], (seeds, clips)))
        holds += found.low <= 0 <= found.high
        told += found.low + planned > 0
    assert 0.92 < holds / 300 <= 1
    assert 0.7 < told / 300 < 0.88


CONFIG = {
    "name": "study",
    "seeds": [0, 1, 2, 3, 4],
    "captions": {"human": {"kind": "human"}},
    "pack": {"captions": None, "similarity": False, "motion": False},
    "datasets": {
        name: {"dataset": {"source": "moving-shapes", "clips": {"train": 8, "test": 8}}} for name in ("clips", "others")
    },
    "pretrain": {
        "tgm": {"dataset": "clips", "model": "tiny", "image_size": 32, "patch_size": 4, "mask": {"strategy": "tube"}},
        "tube": {"dataset": "others", "model": "tiny", "image_size": 32, "patch_size": 4, "mask": {"strategy": "tube"}},
        "once": {"dataset": "clips", "model": "tiny", "image_size": 32, "patch_size": 4, "seeds": [7]},
    },
    "evaluate": {
        "finetune": {"task": "finetune", "dataset": "clips"},
        "linear": {"task": "linear", "dataset": "clips", "runs": ["tgm"]},
        "find": {"task": "video_retrieval", "dataset": "clips"},
    },
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The config of a study, whose results are beside it."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "results": str(tmp_path / "results")}))
    return path


def write_predictions(study: Path, dataset: str, run: str, correct: np.ndarray, first_key: int = 0) -> None:
    rows = [
        {"key": f"clip-{first_key + i:03d}", "label": "up", "prediction": "up" if right else "down"}
        for i, right in enumerate(correct)
    ]
    path = study.parent / "results" / dataset / "evaluate" / run / "finetune" / "predictions.parquet"
    path.parent.mkdir(parents=True)
    write_table(path, pa.Table.from_pylist(rows[::-1]), {})


def test_recalls_are_compared_at_any_depth(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One seed: Student's t of the clips' differences. Ranks with ties lie between."""
    rng = np.random.default_rng(3)
    ranks = {run: rng.integers(2, 16, 60) / 2 for run in ("tgm", "tube")}
    for run, dataset in (("tgm", "clips"), ("tube", "others")):
        path = study.parent / "results" / dataset / "evaluate" / f"{run}-seed0/find/ranks.parquet"
        path.parent.mkdir(parents=True)
        write_table(path, pa.table({"key": [f"clip-{n}" for n in range(60)], "rank": ranks[run]}), {})
    runs = ["tgm-seed0", "tube-seed0"]
    for depth, options in ((1, []), (5, ["--metric", "r5"])):
        x = 1.0 * (ranks["tgm"] <= depth) - 1.0 * (ranks["tube"] <= depth)
        half = 2.042 * x.std(ddof=1) / np.sqrt(60)
        bounds = f"{100 * x.mean():.1f} points [{100 * (x.mean() - half):.1f}, {100 * (x.mean() + half):.1f}]"
        assert main(["difference", "find", *runs, "--config", str(study), *options]) == 0
        assert f"find{' r5' if options else ''}: {bounds}" in capsys.readouterr().out
    assert main(["difference", "find", *runs, "--config", str(study), "--metric", "r3"]) == 2
    assert "find: r3 is not kept per test clip; kept are: r1, r5, r10" in capsys.readouterr().err


def test_runs_are_paired_by_seed_and_clip(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    tgm, tube = rng.random((5, 200)) < 0.7, rng.random((5, 200)) < 0.3
    for seed in range(5):
        write_predictions(study, "clips", f"tgm-seed{seed}", tgm[seed])
        write_predictions(study, "others", f"tube-seed{seed}", tube[seed])
    config = load_config(study)
    found = compare_runs(config, "finetune", ["tgm", "tube"])
    assert found == paired_difference(tgm, tube) and found.seeds == 5
    one = compare_runs(config, "finetune", ["tgm-seed1", "tube-seed1"])
    assert one.seeds == 1 and one.value == pytest.approx(tgm[1].mean() - tube[1].mean())
    options = ["--config", str(study), "--seeds", "6", "--clips", "2000"]
    assert main(["difference", "finetune", "tgm", "tube", *options]) == 0
    printed = capsys.readouterr().out
    assert "above 0. 5 seeds, 200 clips" in printed and "6 seeds and 2000 test clips tell" in printed
    # A difference of differences: that of the same runs leaves nothing, the opposite one doubles it.
    for beyond, value in ((["tgm", "tube"], 0.0), (["tube", "tgm"], 2 * found.value)):
        assert compare_runs(config, "finetune", ["tgm", "tube", *beyond]).value == pytest.approx(value, abs=1e-12)
    assert main(["difference", "finetune", "tgm", "tube", "--beyond", "tgm", "tube", *options]) == 0
    printed = capsys.readouterr().out
    assert "tgm - tube - (tgm - tube), finetune: 0.0 points [-1.8, 1.8], not told from 0" in printed
    assert "no study can be planned" in printed


@pytest.mark.parametrize(
    ("task", "first", "second", "message"),
    [
        ("finetune", "tgm-seed0", "tube-seed0", "different test clips"),
        ("finetune", "tgm-seed0", "tube-seed1", "no seed in common"),
        ("finetune", "tgm", "tube", "tgm-seed1/finetune/predictions.parquet"),
        ("finetune", "tgm", "once", "no seed in common"),
        ("linear", "tgm", "tube", "linear does not evaluate tube-seed0"),
        ("probe", "tgm", "tube", "no such evaluation: probe; there are: find, finetune, linear"),
        ("finetune", "tgm", "tub", "finetune does not evaluate tub"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused(
    study: Path, capsys: pytest.CaptureFixture[str], task: str, first: str, second: str, message: str
) -> None:
    write_predictions(study, "clips", "tgm-seed0", np.ones(9, bool))
    write_predictions(study, "others", "tube-seed0", np.ones(9, bool), first_key=1)
    assert main(["difference", task, first, second, "--config", str(study)]) == 2
    assert message in capsys.readouterr().err
