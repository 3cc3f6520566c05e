"""The page: complete, self-contained, escaped, deterministic, and written whatever is missing."""

import base64
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import yaml
from browser import run_in_browser
from report_results import box_of, build_copy, check_report_files, check_same_bytes, make_config, make_frames

from stm.config import Config, load_config, parse_config
from stm.config.language import Objectives, PairSettings
from stm.config.strategies import strategy_names
from stm.evaluation.tasks import TASKS
from stm.layout import Layout
from stm.report import build_report, figures
from stm.report.clips import film_strips
from stm.report.clips.draw import draw_clip_strips
from stm.report.clips.select import choose_clips, choose_split
from stm.report.names import figure_names
from stm.report.page import sentences, terms
from stm.report.page.context import dump_config
from stm.report.results.collect import collect, collect_study, find_shards
from stm.report.results.provenance import describe_code, find_config_file
from stm.report.results.records import DatasetResults, Refusal, Results, Split

ROOT = Path(__file__).parents[3]
VOID = {"meta", "link", "br", "img", "wbr", "input"}


class Page(HTMLParser):
    """Text, attributes and ids of a page; fails when tags do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


@pytest.fixture(scope="module")
def built(made_results: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return build_copy(made_results, tmp_path_factory.mktemp("built") / "copy")


@pytest.fixture(scope="module")
def page(built: Config) -> Page:
    return Page(Layout.of(built).report)


@pytest.fixture(scope="module")
def rows(made_results: Config) -> list[film_strips.Row]:
    """Rows of the first clip."""
    layout = Layout.of(made_results)
    return draw_clip_strips(made_results, layout, collect(made_results, layout))[0].rows


def test_all_declared_files_are_written(built: Config) -> None:
    check_report_files(built)


def test_two_builds_give_the_same_bytes(built: Config) -> None:
    check_same_bytes(built)


def test_the_page_loads_nothing_from_the_network(page: Page) -> None:
    assert all(src.startswith("data:image/") for src in page.values("src"))
    assert all(re.match(r"#|data:,", href) for href in page.values("href") + page.values("xlink:href"))
    assert not [tag for tag, _, _ in page.attributes if tag in ("iframe", "object")]
    assert {(name, value) for tag, name, value in page.attributes if tag == "script"} == {("type", "application/json")}
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert "default-src 'none'" in page.source


def test_the_policy_allows_the_viewers_script_and_no_other(page: Page) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.S)
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert policy.endswith(f"; script-src 'sha256-{digest}'") and policy.count("script-src") == 1
    assert page.source.count("<script") == 2 and page.source.count('class="viewer"') == 1


def test_links_have_targets_and_images_have_alternative_text(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in page.values("href") if href.startswith("#")} <= set(ids)
    assert page.values("alt") and all(page.values("alt"))


def test_what_came_out_and_masks_come_before_setup_and_receipts(page: Page) -> None:
    sections = [name for tag, key, name in page.attributes if tag == "h2" and key == "id"]
    assert sections == ["results", "masks", "clips", "quality", "losses", "setup", "input", "time", "reproduce"]
    assert page.text.index("No pretrained run is better than the untrained network") < page.text.index("Results of all")


def test_untrained_runs_are_named_with_what_they_are_for(made_results: Config, page: Page) -> None:
    assert "3 pretraining runs (untrained: scratch, for comparison)." in page.text
    evaluate = {"linear": {"task": "linear", "runs": ["tube", "text"]}}
    config = make_config(Path(made_results.results), evaluate=evaluate)
    study = collect_study(config, Layout.of(config))
    assert "3 pretraining runs (untrained: scratch, only drawn)." in sentences.introduce(study, study.groups)


def test_charts_and_tiles_fit_a_phone_and_tiles_are_small_on_a_desktop(page: Page, tmp_path: Path) -> None:
    script = """
        const width = (name) => document.querySelector(name).getBoundingClientRect().width;
        const image = document.querySelector(".row.frames img");
        const tiles = Number(getComputedStyle(image.parentElement).getPropertyValue("--tiles"));
        const widths = [document.documentElement.scrollWidth, width("#quality ~ figure .chart"), width(".row.frames img")];
        return [...widths, tiles];
    """
    (tmp_path / "phone").mkdir(), (tmp_path / "desktop").mkdir()
    page_width, chart, image, tiles = run_in_browser(page.source, script, tmp_path / "phone", 390)
    assert page_width == 390 and chart <= 390 and 300 < image <= 390 and tiles > 1
    page_width, _, image, tiles = run_in_browser(page.source, script, tmp_path / "desktop", 1440)
    assert page_width == 1440 and image / tiles <= 150


def test_terms_are_explained_in_the_sections_that_use_them(page: Page) -> None:
    for term in ("Linear probe", "Fine-tuning", "Chance", "Mask ratio", "text_top", "motion_minus_camera"):
        assert f"<dt>{term}</dt>" in page.source
    assert "<dt>R@1</dt>" not in page.source and "<dt>Contrast loss</dt>" not in page.source


def test_every_task_strategy_and_headline_has_a_term() -> None:
    assert set(terms.TASKS) == set(TASKS)
    assert set(terms.STRATEGIES) == set(strategy_names())
    assert {task.headline.label for task in TASKS.values()} == set(terms.METRICS)
    settings = {"mask_probability", "shared_texts", "word_average", *PairSettings.model_fields}  # of losses, not losses
    assert set(Objectives.model_fields) - settings <= set(terms.OBJECTIVES)


def test_every_table_and_chart_can_be_scrolled_and_says_so(page: Page) -> None:
    assert page.source.count("<table>") == len(re.findall(r'class="wide" tabindex="0"><p class="hint"', page.source))


def test_a_run_has_the_same_colour_and_dash_in_tables_legends_and_clips(page: Page) -> None:
    """tube is the config's first run and text its second; the third, untrained, has no losses."""
    lines = re.findall(r'<line [^>]*stroke="(#\w+)" stroke-width="4"(?: stroke-dasharray="([^"]*)")?', page.source)
    expected = [(style["color"], style["dashes"]) for style in map(figures.swatch, range(3))]
    assert set(lines) == set(expected)
    assert [lines.count(style) for style in expected][2] < lines.count(expected[0])


def test_the_page_says_what_made_it(page: Page) -> None:
    text = " ".join(page.text.split())
    assert f"Python{platform.python_version()}" in text and f"torch{version('torch')}" in text
    assert sha256((ROOT / "requirements.lock").read_bytes()).hexdigest() in text
    assert "Save the config below as config.yaml" in text  # no file of config/ contains it


def test_a_config_of_the_repository_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("config/demo.yaml")
    assert find_config_file(config) == Path("config/demo.yaml")
    assert find_config_file(config.model_copy(update={"seed": 7})) is None


def test_code_is_named_by_its_commit_and_changes_are_admitted(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert describe_code(tmp_path).endswith("not from a git checkout")
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert describe_code(tmp_path).endswith(f"commit {commit}")
    (tmp_path / "file").write_text("2")
    assert describe_code(tmp_path).endswith(f"commit {commit}, with uncommitted changes")
    (tmp_path / ".git/index").write_bytes(b"damaged")  # `git status` fails, as it does when it takes too long
    assert describe_code(tmp_path).endswith(f"commit {commit}, with unknown changes")


@pytest.mark.slow
def test_the_printed_commands_run(built: Config, page: Page, tmp_path: Path) -> None:
    """A dry run of both workflow commands, from the repository, as printed but for the file's folder."""
    config = tmp_path / "config.yaml"
    study = built.model_copy(update={"results": str(tmp_path / "results")})
    # The few clips of the test do not fill a default batch, which the plan refuses.
    values = yaml.safe_load(dump_config(study))
    for settings in (*values["pretrain"].values(), *values["evaluate"].values()):
        if "optimisation" in settings or settings.get("task") == "finetune":
            settings.setdefault("optimisation", {})["batch_size"] = 1
    config.write_text(yaml.safe_dump(values))
    (pre,) = re.findall(r"<pre>(snakemake.*?)</pre>", page.source, re.DOTALL)
    lines = [line for line in pre.splitlines() if line.startswith("snakemake")]
    assert len(lines) == 2
    for line in lines:
        words = [str(config) if word == "config.yaml" else word for word in shlex.split(line, comments=True)]
        command = [
            sys.executable,
            "-m",
            *words,
            "--dry-run",
            "--directory",
            str(tmp_path),
            "-s",
            str(ROOT / "workflow/Snakefile"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "dry-run" in done.stdout + done.stderr


def test_text_from_data_is_escaped(page: Page) -> None:
    assert "<b>lost</b>" not in page.source and "<b>lost</b>" in page.text
    assert "<tag>" not in page.source and "a square & a <tag>" in page.text


def test_numbers_on_the_page_are_those_of_the_files(page: Page) -> None:
    text = " ".join(page.text.split())
    for expected in (
        "60.0 [40.0, 80.0]",
        "92.0",
        "[87.0, 96.0]",
        "2m22s",
        "220 MB",
        "ab" * 32,
        "2 truncated (0 dropped)",
    ):
        assert expected in text
    chance = page.source[page.source.index("<td>Chance</td>") :].partition("</tr>")[0]
    assert chance.count("25.0") == 2  # of both evaluations


def test_the_config_on_the_page_parses_to_the_same_config(built: Config, page: Page) -> None:
    shown = re.search(r"Config, without defaults(name: .*?)The receipt of a result", page.text, re.DOTALL)
    assert shown is not None
    assert parse_config(yaml.safe_load(shown.group(1))) == built


REMOVALS: dict[str, Callable[[Layout], list[Path]]] = {
    "truth": lambda layout: [layout.generated],
    "captions": lambda layout: [layout.root / "captions"],
    "quarantine": lambda layout: [layout.quarantine],
    "evaluations": lambda layout: [layout.root / "evaluate"],
    "pretraining": lambda layout: [layout.root / "pretrain"],
    "shards": lambda layout: [layout.root / "shards"],
    "one tar": lambda layout: [layout.shard_tar("test-00000")],
    "frames": lambda layout: [layout.root / "frames"],
    "plan and times": lambda layout: [layout.plan, layout.benchmarks],
    "index": lambda layout: [layout.shard_index],
    "everything": lambda layout: [layout.root],
}
EXPECTED_TEXT = {
    "captions": "There are no captions.",
    "evaluations": "Nothing has been evaluated yet.",
    "pretraining": "There are no trained weights",
    "shards": "No clips to show",
    "one tar": "could not be read",
    "plan and times": "No job was timed and there is no plan.",
    "everything": "No clips yet: there is no manifest.",
}


@pytest.mark.parametrize("missing", list(REMOVALS))
def test_a_missing_part_is_named_and_the_rest_is_shown(missing: str, made_results: Config, tmp_path: Path) -> None:
    shutil.copytree(made_results.results, tmp_path / "copy")
    config = make_config(tmp_path / "copy", report={"clips": 1})
    config = config.model_copy(update={"pretrain": {"text": config.pretrain["text"]}})  # one model is quicker
    layout = Layout.of(config)
    for path in REMOVALS[missing](layout):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    build_report(config, layout)
    assert EXPECTED_TEXT.get(missing, "Reproduce") in " ".join(Page(layout.report).text.split())
    assert {path.name for path in layout.figures.iterdir()} == set(figure_names(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrain": {}, "evaluate": {}, "mask_quality": None},
        {"captions": {}, "pack": {"captions": None}, "pretrain": {}},
        {"report": {"clips": 0}},
        {"pretrain": {}, "report": {"clips": 6, "title": "<i>&amp;"}},
        {"report": {"split": "validation", "clips": 1}},
    ],
)
def test_other_configs_on_the_same_results(changes: dict, made_results: Config, tmp_path: Path) -> None:
    shutil.copytree(made_results.results, tmp_path / "copy")
    config = make_config(tmp_path / "copy", **changes)
    layout = Layout.of(config)
    build_report(config, layout)
    page = Page(layout.report)
    assert config.report.title in page.text
    assert {path.name for path in layout.figures.iterdir()} == set(figure_names(config))


def test_without_runs_frames_and_maps_are_still_shown(made_results: Config) -> None:
    config = make_config(Path(made_results.results), pretrain={}, evaluate={})
    layout = Layout.of(config)
    strips = draw_clip_strips(config, layout, collect(config, layout))
    assert [row.label for row in strips[0].rows] == ["Frames", "Text similarity", "Motion"]


def test_clips_alternate_between_cameras_and_labels(made_results: Config) -> None:
    layout = Layout.of(made_results)
    clips = choose_clips(made_results, layout, find_shards(layout))
    assert [clip.camera for clip in clips] == ["fixed", "moving"]
    assert choose_split(made_results, layout, ["train-00000", "test-00000"]) == "test"
    assert choose_split(made_results, layout, ["train-00000"]) == "train"
    assert choose_split(made_results, layout, ["none-00000"]) is None


def test_boxes_follow_the_stored_frames(made_results: Config) -> None:
    """The truth has boxes for all frames of a video twice as large; every second frame is stored."""
    layout = Layout.of(made_results)
    clip = choose_clips(made_results, layout, find_shards(layout))[0]
    assert clip.boxes is not None
    pixels = clip.boxes * np.tile(clip.size, 2)
    assert np.allclose(pixels, [box_of(0, frame) for frame in range(clip.frames)])


def test_a_mask_from_a_perfect_guide_hides_more_of_the_box_than_a_random_one(rows: list[film_strips.Row]) -> None:
    notes = {row.label: int(re.search(r"\d+", row.note).group()) for row in rows if row.kind == "mask"}
    assert notes["text_top 0.5"] > notes["tube 0.75"]


def test_reconstructions_stand_under_their_mask(rows: list[film_strips.Row]) -> None:
    kinds = [row.kind for row in rows]
    assert kinds == ["frames", "map", "map", "mask", "reconstruction", "reconstruction", "mask", "reconstruction"]
    assert [rows[i].label for i in (3, 4, 5, 6, 7)] == ["tube 0.75", "tube", "scratch", "text_top 0.5", "text"]
    assert [rows[i].run for i in (4, 5, 7)] == [0, 2, 1]


def test_reconstructions_keep_the_visible_patches_and_predict_the_others(rows: list[film_strips.Row]) -> None:
    plain = film_strips.resize(_stored_crop())
    # Only the inside of the 4 x 4 patches of 32 shown pixels: at their edges, enlarging mixes neighbours.
    mask, reconstruction = (
        rows[i].tiles[::2].reshape(2, 4, 32, 4, 32, 3)[:, :, 12:20, :, 12:20].astype(int) for i in (3, 4)
    )
    hidden = (mask == film_strips.HIDDEN).mean(axis=(2, 4, 5)) > 0.5  # the box's outline crosses some
    original = plain.reshape(2, 4, 32, 4, 32, 3)[:, :, 12:20, :, 12:20].astype(int)
    error = np.abs(reconstruction - original).max(axis=(2, 4, 5))
    assert hidden.sum() == 2 * 12
    assert (error[~hidden] <= 2).all() and (error[hidden] > 2).all()


def _stored_crop() -> film_strips.Tiles:
    """The first clip's frames 0 and 4, the central square: the middle window of 4 frames with stride 2 starts at 0."""
    frames = [simplejpeg.decode_jpeg(data, colorspace="RGB") for data in make_frames(0)]
    return np.stack([frames[i][:, 8:40] for i in (0, 4)])


def test_a_copy_of_a_public_dataset_is_compared_with_its_official_size() -> None:
    def describe(dataset: dict[str, Any], statuses: Sequence[tuple[str, str, str]], listed: int = 260_000) -> str:
        refusals = [
            Refusal(stage, f"{n}", "x.mp4", status, policy, "") for n, (stage, status, policy) in enumerate(statuses)
        ]
        results = Results(splits=[Split("train", listed, None, None)] if listed else [], refusals=refusals)
        config = parse_config({"name": "test", "dataset": dataset})
        return sentences.describe_copy(DatasetResults("x", config, Layout.of(config), results))

    k400 = {"source": "kinetics-400", "root": "videos", "annotations": "lists", "partial": True}
    statuses = [("manifest", "missing_file", "drop")] * 3 + [("manifest", "truncated", "keep")]
    statuses += [("manifest", "empty_file", "drop"), ("frames", "crashed", "drop")]
    assert describe(k400, statuses) == (
        "Of 266,440 official clips, 260,000 are in the manifest; 3 have no file in this copy, and 1 were refused for other "
        "reasons."
    )
    assert describe({**k400, "source": "msrvtt"}, []).startswith("Of 10,000 official clips")
    assert describe(k400, statuses, listed=0) == ""
    assert describe({"source": "folder", "root": "videos"}, statuses) == ""


def test_a_page_of_generated_clips_compares_them_with_nothing(page: Page) -> None:
    assert "official clips" not in page.source and "built-in method" not in page.source


@pytest.mark.parametrize(("step", "ordinal"), [(1, "every"), (2, "every 2nd"), (11, "every 11th"), (21, "every 21st")])
def test_steps_read_as_english(step: int, ordinal: str, made_results: Config) -> None:
    config = make_config(Path(made_results.results), frames={"every": step})
    assert dict(sentences.dataset_facts(config))["Frames"].startswith(f"{ordinal} frame,")
