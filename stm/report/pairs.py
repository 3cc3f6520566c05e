"""Two runs on the same test clips: their difference with a paired interval, and what difference a study can tell.

Both runs are tested on the same clips with several seeds. x[s, i] is 1 where, with seed s, the first run alone is right about
clip i, -1 where the second one alone is, and 0 elsewhere: McNemar's pairs. It lies between where a clip has several captions or
questions, or shares (`stm.evaluation.clip_values`). Seeds and clips are crossed:

    x[s, i] = difference + seed[s] + clip[i] + rest[s, i]
    variance of the mean over S seeds and n clips = V_seed / S + V_clip / n + V_rest / (S n)

V_seed: another initialisation and order of the data; V_clip: clips about which one run is right whatever the seed; V_rest: all
else. An interval of the seeds' accuracies alone omits V_clip, a binomial interval V_seed, and one that is not paired has the
variance of both accuracies instead of that of the difference. Clips that a retrieval searches are taken as given.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stm.config import Config, ConfigError
from stm.evaluation.clip_values import clip_file, metrics_by_clip, read_clip_values
from stm.evaluation.tasks import TASKS
from stm.layout import Layout
from stm.report.comparison import list_names, side
from stm.report.results.evaluations import ReportError
from stm.report.results.records import student_quantile

UNREADABLE = "results per clip unreadable"
"""The reason of a `NotPairedError` that is due to a damaged file."""

_NO_SPREAD = 1e-9  # standard deviations below are rounding
_POWER_QUANTILE = 0.841621  # of the standard normal distribution, at 80 %: how often a difference `detectable` is told


@dataclass(frozen=True)
class Spread:
    """The variances of the difference of two runs: between seeds, between clips, and the rest."""

    seeds: float
    clips: float
    rest: float


@dataclass(frozen=True)
class Difference:
    """A metric of one run, such as the accuracy, minus that of another one on the same clips."""

    value: float
    low: float  # 95 %
    high: float
    spread: Spread  # of one seed, all variance is in `rest`
    discordant: float  # share of clips, of all seeds, whose values differ
    seeds: int
    clips: int

    @property
    def sign(self) -> int:
        """1 if the interval lies wholly above 0, -1 if wholly below; 0: the runs are not told apart."""
        return side((self.low, self.high), 0.0)

    def describe(self) -> str:
        """`2.1 points [0.4, 3.8], above 0. ...`, with what the interval comes from."""
        low, high = 100 * self.low, 100 * self.high
        outcome = {0: "not told from 0", 1: "above 0", -1: "below 0"}[self.sign]
        spread = self.spread
        variances = f"variances: seeds {spread.seeds:.2g}, clips {spread.clips:.2g}, rest {spread.rest:.2g}."
        if self.seeds == 1:
            variances = f"variance: {spread.rest:.2g}. The interval says nothing about other seeds."
        return (
            f"{100 * self.value:.1f} points [{low:.1f}, {high:.1f}], {outcome}. {count(self.seeds, 'seed')}, {self.clips} clips, "
            f"{100 * self.discordant:.0f} % discordant; {variances}"
        )


def count(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def plan(found: Difference, seeds: int | None, clips: int | None) -> str:
    """Say what difference a study tells whose runs and clips vary as those of `found`; None: as many as there.

    Raises:
        ReportError: results of one seed do not tell how several vary, or there is one clip.
    """
    seeds, clips = seeds or found.seeds, clips or found.clips
    if found.seeds == 1 and seeds > 1:
        raise ReportError(
            f"a study with {seeds} seeds cannot be planned from one seed, which does not tell how seeds vary: evaluate the runs "
            "with a second seed first (`seeds` in the config)"
        )
    if clips < 2:
        raise ReportError("an interval needs two test clips at least: plan with more --clips")
    if max(found.spread.seeds, found.spread.clips, found.spread.rest) < _NO_SPREAD**2:
        return "All clips and seeds give the same difference, so no study can be planned from them."
    told = 100 * detectable(found.spread, seeds, clips)
    return f"{count(seeds, 'seed')} and {clips} test clips tell a difference of {told:.1f} points in 80 % of studies."


def expected_spread(discordant: float, systematic: float, deviation: float) -> Spread:
    """The spread to plan a study with, for accuracies that hardly differ.

    Args:
        discordant: share of clips about which only one of the two runs is right with the same seed; this is the variance of one
            clip's x.
        systematic: share of that variance which is the clips' own, the same with every seed.
        deviation: standard deviation of a run's accuracy between seeds, without that of its test clips.
    """
    return Spread(2 * deviation**2, systematic * discordant, (1 - systematic) * discordant)


def detectable(spread: Spread, seeds: int, clips: int) -> float:
    """The difference whose 95 % interval excludes 0 with a probability of about 80 %, as a share.

    In simulated studies of three and five seeds with 128 clips or more, it was 76 to 84 %.
    """
    squares = clips * spread.seeds + spread.rest, seeds * spread.clips + spread.rest, spread.rest
    deviation, freedom = _standard_error(*squares, seeds, clips)
    quantile = student_quantile(freedom)
    # Where the noncentral t distribution is above that quantile in 80 % (Abramowitz and Stegun, 26.7.10).
    width = math.sqrt(1 + quantile**2 / (2 * freedom))
    return (quantile * (1 - 1 / (4 * freedom)) + _POWER_QUANTILE * width) * deviation


def mean_of(x: NDArray[np.float64]) -> Difference:
    """The mean of x, and its 95 % interval over seeds and clips.

    It contains the truth in 95 % of studies or more; with two seeds that differ much, in 90 %. With a single seed it says nothing
    about other seeds. Where all values are equal, it is that of a share of clips of which none was seen.

    Args:
        x: [S, n] by seed and clip; n is at least 2.
    """
    seeds, clips = x.shape
    mean, rows, columns = x.mean(), x.mean(1), x.mean(0)
    of_clips = seeds * columns.var(ddof=1)
    if seeds == 1:
        of_seeds = rest = of_clips
    else:
        of_seeds = clips * rows.var(ddof=1)
        rest = ((x - rows[:, None] - columns + mean) ** 2).sum() / ((seeds - 1) * (clips - 1))
    deviation, freedom = _standard_error(of_seeds, of_clips, rest, seeds, clips)
    half = student_quantile(freedom) * deviation
    low, high = mean - half, mean + half
    if deviation < _NO_SPREAD:
        # As many equal clips occur with a probability of 2.5 % if this share of all clips has other values, up to -1 and 1.
        others, bound = 1 - 0.025 ** (1 / clips), max(1.0, abs(mean))
        low, high = mean - others * (mean + bound), mean + others * (bound - mean)
    spread = Spread(max(0.0, (of_seeds - rest) / clips), max(0.0, (of_clips - rest) / seeds), float(rest))
    discordant = float((x != 0).mean())
    return Difference(float(mean), float(low), float(high), spread, discordant, seeds, clips)


def _standard_error(of_seeds: float, of_clips: float, rest: float, seeds: int, clips: int) -> tuple[float, float]:
    """Standard error of the mean from the mean squares, and its degrees of freedom (Satterthwaite).

    The estimate (of_seeds + of_clips - rest) / (S n) may come out below what seeds or clips alone say; then the larger counts.
    """
    count = seeds * clips
    variance = max(of_seeds + of_clips - rest, of_seeds, of_clips) / count
    if seeds == 1 or variance == 0:
        return math.sqrt(variance), clips - 1
    parts = ((of_seeds, seeds - 1), (of_clips, clips - 1), (rest, (seeds - 1) * (clips - 1)))
    freedom = variance**2 / sum((square / count) ** 2 / number for square, number in parts)
    # Of a sum with a negative part, the formula may give less than the smallest number of all parts.
    return math.sqrt(variance), max(min(seeds, clips) - 1.0, freedom)


class NotPairedError(ReportError):
    """Two runs cannot be paired.

    Args:
        message: names the files, and what to run.
        reason: the same in few words, for a table.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_values(folders: Sequence[Path], task: str, metric: str) -> tuple[list[str], NDArray[np.float64]]:
    """The keys of the test clips, and [S, n] their values (see `read_clip_values`), from one folder of results per seed.

    Args:
        task: the kind of evaluation, such as `finetune`.

    Raises:
        NotPairedError: a table is missing or damaged, or has other clips than the first one.
    """
    found: list[dict[str, float]] = []
    for folder in folders:
        path = clip_file(folder, task, metric)
        missing = not path.exists()
        try:
            found.append(read_clip_values(folder, task, metric))
        except (ValueError, PermissionError) as error:
            reason = "no results per clip" if missing else UNREADABLE
            raise NotPairedError(f"no {metric} per test clip: {error}", reason) from error
        if found[-1].keys() != found[0].keys():
            raise NotPairedError(f"{path} and {folders[0] / path.name} have different test clips", "other test clips")
    return list(found[0]), np.array([list(values.values()) for values in found])


def compare_runs(
    config: Config,
    task: str,
    runs: Sequence[str],
    metric: str | None = None,
    seeds: Container[int] | None = None,
) -> Difference:
    """The difference of two runs of a study in an evaluation, over the seeds that both have.

    Args:
        task: a name in `evaluate`.
        runs: names in `pretrain`, for all of their seeds, or of instances with one seed (`tube-seed0`). Of two, the second is
            subtracted from the first; of four, the difference of the last two from that of the first two.
        metric: dotted key in metrics.json; None: the headline.
        seeds: those to use, if the runs have them; None: all.

    Raises:
        ConfigError: the study has no such task or run, or the task does not evaluate it.
        NotPairedError: the metric is not kept per clip, results are missing or have different clips, or no seed is common to
            all runs.
    """
    folders = [_folders(config, task, run) for run in runs]
    kind = config.evaluate[task].task
    metric = metric or TASKS[kind].headline.name
    if metric not in (known := metrics_by_clip(kind)):
        shown = f"kept are: {', '.join(known)}" if known else f"no metric of {kind} is"
        raise NotPairedError(f"{task}: {metric} is not kept per test clip; {shown}", "no results per clip")
    common = [
        seed for seed in folders[0] if all(seed in found for found in folders) and (seeds is None or seed in seeds)
    ]
    if not common:
        raise NotPairedError(f"{list_names(runs)} have no seed in common", "no common seed")
    found = [read_values([by_seed[seed] for seed in common], kind, metric) for by_seed in folders]
    keys = found[0][0]
    if any(others != keys for others, _ in found):
        raise NotPairedError(f"{task}: {list_names(runs)} have different test clips", "other test clips")
    if len(keys) < 2:
        raise NotPairedError(f"{task}: an interval needs two test clips at least", "one test clip")
    signs = np.array([1.0, -1.0, -1.0, 1.0])[: len(runs)]  # a - b - (c - d)
    return mean_of(np.einsum("r,rsn->sn", signs, np.stack([values for _, values in found])))


def seed_of(config: Config, instance: str) -> int:
    """The seed of an instance of a run, a name in `runs`."""
    seed = config.runs[instance].seed
    return config.seed if seed is None else seed


def _folders(config: Config, task: str, run: str) -> dict[int, Path]:
    """The folders of a run's results by seed."""
    evaluated = [instance for instance, name in config.evaluations() if name == task]
    if not evaluated:
        raise ConfigError(f"no such evaluation: {task}; there are: {', '.join(config.evaluate)}")
    instances = config.instances(run) if run in config.pretrain else [run]
    found = {}
    for instance in instances:
        if instance not in evaluated:
            raise ConfigError(f"{task} does not evaluate {instance}; it evaluates: {', '.join(evaluated)}")
        found[seed_of(config, instance)] = Layout.of(config, config.dataset_of(instance)).evaluate(instance, task)
    return found
