"""Reference results: what is kept, whether it is what the config makes, and how a user's run is set beside it."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_study import make_study

from stm.cli import main
from stm.config import Config, load_config, parse_config
from stm.evaluation.metrics import wilson_interval
from stm.layout import Layout
from stm.report import build_report, reference, write_table
from stm.report.compare import Difference, Number, agrees, compare, config_differences, read_numbers
from stm.report.reference import ComparisonError, keep_reference, shape_problems
from stm.report.results import provenance as described_results
from stm.report.results.records import MetricValue, over_seeds
from stm.storage.files import write_json
from stm.storage.shipped import NotShippedError, shipped

ROOT = Path(__file__).parents[2]
KEPT = sorted(path.parent for path in (ROOT / "results/reference").glob("*/provenance.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a results folder with its report; read-only."""
    config = make_study(tmp_path_factory.mktemp("study"), figures={}, report={"clips": 0})
    row = {"guide": "text_top", "source": "human", "ratio": 0.6, "chance": 0.6, "clips": 3}
    rows = [{**row, "camera": camera, "coverage": 0.9, "low": 0.85, "high": 0.94} for camera in ("fixed", "moving")]
    write_json(Layout.of(config).mask_quality, {"rows": rows})
    build_report(config, Layout.of(config))
    write_table(config, "main")
    return config


@pytest.fixture
def mine(finished: Config, tmp_path: Path) -> Path:
    """Finished results that a test may change."""
    return shutil.copytree(Layout.of(finished).root, tmp_path / "made")


@pytest.fixture
def kept(finished: Config, tmp_path: Path) -> Path:
    """The reference of these results."""
    return keep_reference(Layout.of(finished).root, tmp_path / "reference/made")


def change(results: Path, table: str, row: str, **cells: object) -> None:
    """Overwrite cells of a table."""
    path = results / f"tables/{table}.csv"
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    [line] = [line for line in lines if next(iter(line.values())) == row]
    line.update({key: str(value) for key, value in cells.items()})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


# ---------------------------------------------------------------------------------------- those that come with stm


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_a_reference_has_the_tables_that_its_config_makes_today(folder: Path) -> None:
    """Rows, columns, tasks and seeds; also figures of at most 1 MB, a commit without changes, and no path of a machine."""
    provenance = json.loads((folder / "provenance.json").read_text())
    config = load_config(shipped("config") / f"{provenance['file']}.yaml")
    assert config.name == folder.name
    assert shape_problems(folder, config) == []
    assert sum(path.stat().st_size for path in folder.glob("figures/*")) <= reference.FIGURE_BYTES
    assert "commit" in provenance["environment"]["Code"] and "uncommitted" not in provenance["environment"]["Code"]
    assert (
        set(provenance["environment"]) >= {"Python", "torch", "Platform", "Packages", "Cores"}
        and provenance["versions"]
    )
    assert not re.search(r'"[/~]', (folder / "provenance.json").read_text())  # no string is a path of the machine


# ------------------------------------------------------------------------------------------------ what is kept


def test_tables_figures_and_provenance_are_kept(finished: Config, kept: Path) -> None:
    results = Layout.of(finished).root
    for folder in ("tables", "figures"):
        assert {path.name: path.read_bytes() for path in (kept / folder).iterdir()} == {
            path.name: path.read_bytes() for path in (results / folder).iterdir()
        }
    provenance = json.loads((kept / "provenance.json").read_text())
    config = json.dumps(finished.model_dump(mode="json"))
    # The two paths of this machine, which are not published.
    for place in (results.parents[1], ROOT / "stm/assets"):
        assert f"{place}/" in config
        config = config.replace(f"{place}/", "")
    assert provenance["config"] == json.loads(config) and provenance["file"] is None
    assert {"Code", "Python", "torch", "Platform", "Packages", "Cores"} == set(provenance["environment"])
    assert sorted(path.name for path in kept.iterdir()) == ["figures", "provenance.json", "tables"]


def test_the_largest_figures_are_left_out(finished: Config, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(mine / "figures")
    (mine / "figures").mkdir()
    (mine / "figures/small.png").write_bytes(bytes(100))
    (mine / "figures/chart.png").write_bytes(bytes(150))
    monkeypatch.setattr(reference, "FIGURE_BYTES", 200)
    kept = keep_reference(mine)
    assert kept == mine.parent / "reference/made"
    assert [path.name for path in kept.glob("figures/*")] == ["small.png"]
    assert json.loads((kept / "provenance.json").read_text())["figures_left_out"] == ["chart.png"]


def test_figures_of_clips_are_halved(mine: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(mine / "figures/clips.png")
    assert (mine / "figures/clips.png").stat().st_size > reference.LARGE
    [figure] = (keep_reference(mine) / "figures").glob("clips.*")
    with Image.open(figure) as image:
        assert image.size == (200, 150) and figure.suffix == f".{(image.format or '').lower()}"


def test_a_reference_is_replaced_and_nothing_else_is(mine: Path, kept: Path, tmp_path: Path) -> None:
    (kept / "tables/old.csv").write_text("row\n")
    keep_reference(mine, kept)
    assert not (kept / "tables/old.csv").exists()
    (tmp_path / "papers").mkdir()
    with pytest.raises(ComparisonError, match=r"papers: has no provenance\.json"):
        keep_reference(mine, tmp_path / "papers")


def test_no_other_results_are_replaced(mine: Path, kept: Path, tmp_path: Path) -> None:
    """Another study's results, which have a provenance, too, and the results and the reference themselves."""
    other = shutil.copytree(mine, tmp_path / "other")
    (other / "pretrain").mkdir(exist_ok=True)
    files = sorted(path for folder in (other, mine, kept) for path in folder.rglob("*"))
    for results, target in (
        (mine, other),
        (mine, mine),
        (mine, mine / "../made"),
        (kept, kept),
        (mine, mine / "report.html"),
    ):
        with pytest.raises(ComparisonError, match="name another"):
            keep_reference(results, target)
    assert sorted(path for folder in (other, mine, kept) for path in folder.rglob("*")) == files
    assert (keep_reference(kept, tmp_path / "again") / "provenance.json").read_bytes() == (
        kept / "provenance.json"
    ).read_bytes()


def test_an_old_reference_stays_if_the_new_one_cannot_be_made(mine: Path, kept: Path) -> None:
    (mine / "figures/damaged.png").write_bytes(bytes(reference.LARGE + 1))
    with pytest.raises(OSError, match=r"damaged\.png"):
        keep_reference(mine, kept)
    assert shape_problems(kept, load_provenance_config(kept)) == []


def test_a_reference_of_the_current_folder_is_beside_it(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine)
    assert keep_reference(Path()) == mine.parent / "reference/made"


def test_tables_of_an_earlier_config_are_not_kept(mine: Path) -> None:
    (mine / "tables/earlier.csv").write_text("row\n")
    (mine / "tables/notes").mkdir()
    names = {path.name for path in (keep_reference(mine) / "tables").iterdir()}
    assert "main.csv" in names and not names & {"earlier.csv", "notes"}


def test_no_folder_of_the_machine_is_kept(mine: Path) -> None:
    path = mine / "provenance.json"
    provenance = json.loads(path.read_text())
    provenance["config"] |= {"results": "/home/me/results", "text": {"model": "local-dir:~/models/clip"}}
    path.write_text(json.dumps(provenance))
    table = mine / "tables/quarantine.csv"
    table.write_text(table.read_text() + "frames,a,a.mp4,unreadable,drop,false,cannot open '/home/me/a.mp4'\n")
    kept = keep_reference(mine)
    texts = [path.read_text() for path in (kept / "provenance.json", *kept.glob("tables/*"))]
    assert not any("/home" in text or "~/" in text for text in texts)
    config = json.loads(texts[0])["config"]
    assert (config["results"], config["text"]["model"]) == ("results", "local-dir:clip")
    assert "cannot open 'a.mp4'" in (kept / "tables/quarantine.csv").read_text()
    assert main(["compare", str(mine), "--with", str(kept)]) == 0  # elsewhere, the same folder is at another place


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("/data/ssv2", "ssv2"),
        ("file:///home/me/x", "file:x"),
        ("ViT-B-16@/home/me/My Models/w.pt", "ViT-B-16@My Models/w.pt"),
        *(
            (text, text)
            for text in ("models/clip", "top-1/top-5", "a / b", "</b>", "https://arxiv.org/abs/1", "../videos")
        ),
    ],
)
def test_paths_are_reduced_to_their_last_name(text: str, same: str) -> None:
    assert reference.without_folders({"key": [text]}) == {"key": [same]}


def load_provenance_config(folder: Path) -> Config:
    return parse_config(json.loads((folder / "provenance.json").read_text())["config"])


def test_incomplete_results_are_no_reference(mine: Path) -> None:
    change(mine, "results", "tube", linear_seeds=2)
    with pytest.raises(ComparisonError, match="tube has 2 instead of 3 linear_seeds"):
        keep_reference(mine)
    (mine / "tables/main.csv").unlink()
    with pytest.raises(ComparisonError, match=r"there is no tables/main\.csv"):
        keep_reference(mine)


def test_the_shape_of_tables_follows_the_config(finished: Config, kept: Path) -> None:
    """Another run, another evaluation, another seed and another row each make the reference an old one."""
    assert shape_problems(kept, finished) == []
    runs = finished.pretrain
    fewer = finished.model_copy(update={"pretrain": {name: runs[name] for name in list(runs)[:-1]}})
    assert any("its rows are tube, text, attentive, scratch instead of" in line for line in shape_problems(kept, fewer))
    seeds = finished.model_copy(update={"seeds": (0, 1)})
    assert any("tube has 3 instead of 2 linear_seeds" in line for line in shape_problems(kept, seeds))
    tasks = finished.model_copy(update={"evaluate": {"linear": finished.evaluate["linear"]}})
    assert any("results.csv: its columns are others" in line for line in shape_problems(kept, tasks))
    spec = finished.tables["main"]
    renamed = (spec.rows[0].model_copy(update={"label": "Random"}), spec.rows[1])
    rows = finished.model_copy(update={"tables": {"main": spec.model_copy(update={"rows": renamed})}})
    assert any(
        "main.csv: its rows are Tube, Text instead of Random, Text" in line for line in shape_problems(kept, rows)
    )


def test_results_are_described_without_the_files_that_come_with_stm(
    finished: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the package was copied by hand: its configs cannot be searched for this one."""

    def missing(name: str = "") -> Path:
        if name:
            raise NotShippedError(name)
        return ROOT

    monkeypatch.setattr(described_results, "shipped", missing)
    described = described_results.describe_results(finished, described_results.Provenance([], [], {}, {}))
    assert described["file"] is None and described["config"] == finished.model_dump(mode="json")


# ------------------------------------------------------------------------------------------------- comparing


def judge(value: float, half: float, other: float, other_half: float, more: int = 0) -> str:
    """The verdict on two symmetric intervals among `more` other numbers."""
    places = [("t", "r", str(number)) for number in range(more + 1)]
    equal = Number(0.5, 0.4, 0.6, 1)
    mine = dict.fromkeys(places, equal) | {places[0]: Number(value, value - half, value + half, 1)}
    theirs = dict.fromkeys(places, equal) | {places[0]: Number(other, other - other_half, other + other_half, 1)}
    return next(each.verdict for each in compare(mine, theirs) if each.place == places[0])


def test_a_difference_is_judged_by_its_own_interval() -> None:
    """Halves of 0.3 and 0.4 make a half of 0.5. Intervals that overlap may differ, and those that touch do."""
    assert judge(0.49, 0.3, 0.0, 0.4) == "agrees"
    assert judge(0.51, 0.3, 0.0, 0.4) == "far"  # a single comparison is not widened
    assert judge(-0.51, 0.3, 0.0, 0.4) == "far"
    assert judge(0.51, 0.3, 0.0, 0.4, more=9) == "differs"
    # Ten comparisons: 0.0025 on each side, z = 2.807 instead of 1.960.
    assert judge(0.5 * 2.807 / 1.960 - 0.001, 0.3, 0.0, 0.4, more=9) == "differs"
    assert judge(0.5 * 2.807 / 1.960 + 0.001, 0.3, 0.0, 0.4, more=9) == "far"


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says() -> None:
    """Two shares of 200 trials each, with the intervals of their own; simulated."""
    rng, inside, trials = np.random.default_rng(0), 0, 2000
    for first, second in rng.binomial(200, 0.3, (trials, 2)) / 200:
        halves = [1.96 * math.sqrt(p * (1 - p) / 200) for p in (first, second)]
        numbers = [Number(p, p - half, p + half, 1) for p, half in zip((first, second), halves, strict=True)]
        low, high = Difference(("t", "r", "c"), numbers[0], numbers[1]).interval
        inside += low <= 0 <= high
    assert inside / trials == pytest.approx(0.95, abs=0.015)


def test_numbers_are_those_with_an_interval(kept: Path) -> None:
    numbers = read_numbers(kept)
    half = 4.303 * 0.1 / math.sqrt(3)  # Student's t, three seeds of deviation 0.1
    tube = numbers["results", "tube", "linear_top1"]
    assert (tube.value, tube.seeds) == (0.5, 3) and [tube.low, tube.high] == pytest.approx(
        [0.5 - half, 0.5 + half], abs=1e-5
    )
    assert numbers["main", "Tube", "linear"].value == 0.5
    assert ("results", "chance", "linear_top1") not in numbers  # which is exact
    assert not any(table in ("quarantine", "per_class") for table, _, _ in numbers)
    quality = {place: number for place, number in numbers.items() if place[0] == "mask_quality"}
    assert quality == {
        ("mask_quality", "text_top human 0.6", f"{camera}_coverage"): Number(0.9, 0.85, 0.94, None)
        for camera in ("fixed", "moving")
    }


def test_a_run_of_the_same_config_agrees(mine: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(mine), "--with", str(kept)]) == 0
    printed = capsys.readouterr().out
    count = len(read_numbers(kept))
    assert f"Of {count} numbers that both have, {count} agree with the reference." in printed
    assert len([line for line in printed.splitlines() if line.endswith("agrees")]) == count


def test_a_number_that_is_far_off_is_named_and_ends_with_1(
    mine: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(mine, "results", "text", linear_top1=0.01, linear_low=0.0, linear_high=0.02)
    assert main(["compare", str(mine), "--with", str(kept)]) == 1
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.endswith("far")]
    assert line.split()[:3] == ["results", "text", "linear_top1"] and "-0.79" in line
    assert "1 differ by more than chance explains" in printed


def test_fewer_seeds_and_missing_numbers_are_said(mine: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(mine, "results", "tube", linear_seeds=1)
    (mine / "tables/main.csv").unlink()
    assert main(["compare", str(mine), "--with", str(kept)]) == 1
    printed = capsys.readouterr().out
    assert "agrees (1 seed, in the reference 3)" in printed and "numbers of the reference are missing here" in printed


def test_another_config_is_an_error_that_names_the_keys(
    mine: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    provenance = json.loads((mine / "provenance.json").read_text())
    provenance["config"]["pretrain"]["tube"]["mask"]["ratio"] = 0.5
    (mine / "provenance.json").write_text(json.dumps(provenance))
    assert main(["compare", str(mine), "--with", str(kept)]) == 2
    assert "pretrain.tube.mask.ratio is 0.5, in the reference 0.75. To compare" in capsys.readouterr().err
    assert main(["compare", str(mine), "--with", str(kept), "--other-config"]) == 0


def test_keys_that_change_no_number_are_the_same_config(finished: Config) -> None:
    config = finished.model_dump(mode="json")
    other = json.loads(json.dumps(config))
    other["results"], other["report"]["title"] = "elsewhere", "Mine"
    other["pretrain"]["tube"] |= {"workers": 9, "processes": 4}
    assert config_differences(other, config) == []
    del other["prices"]  # an older version had no such key
    other["pretrain"]["tube"]["seeds"] = [5]
    assert config_differences(other, config) == ["pretrain.tube.seeds is [5], in the reference []"]


def test_a_section_that_one_config_lacks_is_another_config() -> None:
    base = {"pretrain": {"tube": {"contrast": None, "mask": {"ratio": 0.9}, "stages": [{"size": 1}]}}, "seed": 0}
    changed = {"pretrain": {"tube": {"contrast": {"weight": 1.0}, "mask": {"ratio": 0.9}, "stages": []}}, "seed": 1}
    assert config_differences(base, changed) == [
        'pretrain.tube.contrast is null, in the reference {"weight": 1.0}',
        'pretrain.tube.stages is [{"size": 1}], in the reference []',
        "seed is 0, in the reference 1",
    ]
    assert config_differences({"text": {"model": "/a/clip"}}, {"text": {"model": "/b/clip"}}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "results.csv: is empty"),
        ("run,a,a_low,a_high\ntube,1,0\n", "results.csv: line 2 has 3 cells instead of 4"),
        ("run,a,a_low,a_high\ntube,nan,0,1\n", "results.csv: row 'tube': a is 'nan' instead of a finite number"),
        ("run,a,a_low,a_high\ntube,1,zero,1\n", "results.csv: row 'tube': a_low is 'zero' instead of"),
        ("run,a,a_deviation,a_seeds,a_low,a_high\ntube,1,0,x,0,2\n", "row 'tube': a_seeds is 'x' instead of"),
        ('run,a,a_low,a_high\n"tube,1,0,1\n', "results.csv: is not a CSV table"),
        (b"run,a\n\xff,1\n", "results.csv: is not a CSV table in UTF-8"),
    ],
)
def test_damaged_tables_are_named(
    mine: Path, kept: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, message: str
) -> None:
    (mine / "tables/results.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["compare", str(mine), "--with", str(kept)]) == 2
    assert message in capsys.readouterr().err
    assert main(["reference", str(mine)]) == 2
    assert "results.csv" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": 1}', '{"config": {}}'])
def test_a_damaged_provenance_is_named(mine: Path, kept: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (mine / "provenance.json").write_text(text)
    for command in (["compare", str(mine), "--with", str(kept)], ["reference", str(mine)]):
        assert main(command) == 2
        assert "made/provenance.json: " in (printed := capsys.readouterr().err) and "make the report again" in printed


def test_rows_of_equal_labels_are_all_compared(mine: Path) -> None:
    (mine / "tables/main.csv").write_text("row,a,a_low,a_high\nTube,1,0,2\nTube,3,2,4\n")
    numbers = read_numbers(mine)
    assert (numbers["main", "Tube", "a"].value, numbers["main", "Tube (2)", "a"].value) == (1, 3)


def test_numbers_of_one_seed_are_said_to_be(mine: Path, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (mine, kept):
        change(folder, "results", "tube", linear_seeds=1)
    assert main(["compare", str(mine), "--with", str(kept)]) == 0
    assert "1 comes from one seed, whose interval does not contain how trainings vary" in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_studies_agree(seeds: int) -> None:
    """Of 60 pairs of studies with 30 numbers, whose seeds and clips differ, at most one in twenty is told to differ."""
    rng, alarms = np.random.default_rng(0), 0

    def draw() -> Number:
        values = rng.binomial(300, np.clip(rng.normal(0.4, 0.03, seeds), 0, 1)) / 300
        measured = over_seeds([MetricValue("top-1", p, wilson_interval(300 * p, 300), 0.1) for p in values])
        low, high = measured.interval or (0.0, 0.0)
        return Number(measured.mean, low, high, seeds)

    for _ in range(60):
        studies = [{("results", "run", str(number)): draw() for number in range(30)} for _ in range(2)]
        alarms += not agrees(compare(*studies))
    assert alarms / 60 <= 0.05


def test_a_reference_is_not_compared_with_itself(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(mine), "--with", str(mine / "../made")]) == 2
    assert "is the reference itself" in capsys.readouterr().err


def test_results_are_not_taken_for_their_own_reference(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mine.parent)
    assert main(["compare", "made"]) == 2
    assert "no reference results of 'made'" in capsys.readouterr().err


def test_what_is_missing_is_said_with_what_to_do(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(tmp_path / "none")]) == 2
    assert "has no tables (*.csv); run `snakemake`" in capsys.readouterr().err
    assert main(["compare", str(mine), "--with", "unheard"]) == 2
    assert "no reference results of 'unheard'; there are:" in capsys.readouterr().err
    (mine / "provenance.json").unlink()
    assert main(["reference", str(mine)]) == 2
    assert "has no provenance.json, which the report writes" in capsys.readouterr().err


def test_results_are_compared_with_the_reference_of_their_name(
    mine: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that come with stm, also by the name of the config's file."""
    provenance = json.loads((kept / "provenance.json").read_text())
    (kept / "provenance.json").write_text(json.dumps({**provenance, "file": "demo"}))
    monkeypatch.setattr(reference, "shipped", lambda name: kept.parent)
    assert main(["compare", str(mine)]) == 0
    assert main(["compare", str(mine), "--with", "demo"]) == 0
    assert main(["compare", str(mine), "--with", "tgm-small"]) == 2
    assert "there are: made, demo" in capsys.readouterr().err
