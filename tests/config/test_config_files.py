"""Config files that extend others: merged deeply, with the same result on the command line, in Snakemake and in Python."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.settings.types import ConfigSettings

from stm.cli.common import load
from stm.config import ConfigError, LanguageRun, inherit, load_config, parse_config, read_values, resolve_config

ROOT = Path(__file__).parents[2]
SNAKEMAKE = (sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"))
CONFIGS = sorted(p for folder in ("config", "config/pilots") for p in (ROOT / folder).glob("*.yaml"))
FRAMES = {"every": 4, "short_side": 64}
RUN = {"frames": 8, "optimisation": {"epochs": 3, "betas": [0.9, 0.95], "warmup_epochs": 1}}


def write(folder: Path, **files: dict[str, Any]) -> Path:
    """Write a YAML file per keyword; return the path of the last one."""
    for name, values in files.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def merge_by_snakemake(files: list[Path], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the values that the workflow gets: merged by Snakemake, resolved as in workflow/rules/common.smk."""
    settings = ConfigSettings(config=overrides, configfiles=files)
    return resolve_config(settings.overwrite_config, settings.configfiles, settings.config)


def test_a_file_is_merged_deeply_over_the_one_that_it_extends(tmp_path):
    override = {"optimisation": {"betas": [0.8, 0.9]}, "frames": 4}
    path = write(
        tmp_path,
        base={"seed": 7, "frames": FRAMES, "pretrain": {"a": RUN}},
        top={"extends": "base.yaml", "name": "top", "frames": {"every": 2}, "pretrain": {"a": override}},
    )
    assert read_values(path) == {
        "seed": 7,
        "name": "top",
        "frames": {"every": 2, "short_side": 64},
        "pretrain": {"a": {"frames": 4, "optimisation": {"epochs": 3, "betas": [0.8, 0.9], "warmup_epochs": 1}}},
    }


def test_later_files_override_earlier_ones_and_paths_are_relative_to_each_file(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", root={"seed": 1, "grid": 1, "shard_size": 1}, one={"extends": "root.yaml", "grid": 2})
    write(tmp_path / "base", two={"shard_size": 3})
    path = write(tmp_path, top={"extends": ["base/one.yaml", "base/two.yaml"], "seed": 4})
    assert read_values(path) == {"seed": 4, "grid": 2, "shard_size": 3}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"top": {"extends": "gone.yaml"}}, ["top.yaml", "gone.yaml", "no file"]),
        ({"top": {"extends": "top.yaml"}}, ["top.yaml", "in turn"]),
        ({"a": {"extends": "top.yaml"}, "top": {"extends": ["a.yaml"]}}, ["a.yaml", "top.yaml", "in turn"]),
        ({"top": {"extends": {"a": 1}}}, ["top.yaml", "extends", "a list of such paths"]),
        ({"top": {"extends": [1]}}, ["top.yaml", "extends = [1]"]),
    ],
)
def test_the_error_names_a_file_that_cannot_be_extended(tmp_path, files, words):
    with pytest.raises(ConfigError) as caught:
        read_values(write(tmp_path, **files))
    for word in words:
        assert word in str(caught.value)


BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "a key twice": (
        b"name: a\nseed: 1\nname: b\n",
        "line 3: the key `name` is given twice; its first value is in line 1",
    ),
    "a nested key twice": (b"frames:\n  every: 1\n  grid: 2\n  every: 1\n", "line 4: the key `every` is given twice"),
    "a key twice in one line": (b"frames: {every: 1, every: 2}\n", "line 1: the key `every` is given twice"),
    "a key twice in a list": (b"seeds: [{a: 1, a: 1}]\n", "line 1: the key `a` is given twice"),
    "tabs": (b"frames:\n\tevery: 1\n", "indented with blanks, not tabs"),
    "no bytes": (b"", "has no keys"),
    "comments": (b"# name: a\n---\n", "has no keys"),
    "a list": (b"- a\n", "must be a mapping of keys to values, is list ['a']"),
    "text": (b"name\n", "must be a mapping of keys to values, is str 'name'"),
    "two documents": (b"name: a\n---\nname: b\n", "not valid YAML"),
    "Latin-1": ("# \u00e9\nname: a\n".encode("latin-1"), "save it as UTF-8"),
    "UTF-16": ("name: a\n".encode("utf-16"), "save it as UTF-8"),
    "a date that is none": (b"name: 2024-13-45\n", "month must be in 1..12"),
    "a number of 5,000 digits": (b"seed: " + b"1" * 5000, "not valid YAML: Exceeds the limit"),
    "a Python object": (b"name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_file_that_is_no_config_is_named_with_the_reason(kind, tmp_path):
    path = tmp_path / "mine.yaml"
    content, reason = BROKEN_FILES[kind]
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_values(path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)


def test_a_key_may_override_the_one_that_an_alias_merges(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {y: 3}\nc: {<<: *a, x: 4}\nd: {<<: [*a, *b], y: 5}\n")
    assert read_values(path)["c"] == {"x": 4, "y": 2} and read_values(path)["d"] == {"x": 1, "y": 5}


def test_byte_order_marks_and_line_ends_of_other_systems_do_no_harm(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: a\r\nframes:\r\n  every: 2\r\n")
    assert read_values(path) == {"name": "a", "frames": {"every": 2}}


def test_folders_and_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    reasons = {
        str(tmp_path): "is a folder; name a YAML file",
        "none.yaml": f"there is no such file in {tmp_path}",
        str(tmp_path / "none.yaml"): "there is no such file",
        "loop.yaml": "cannot be read (Too many levels of symbolic links)",
    }
    for path, reason in reasons.items():
        with pytest.raises(ConfigError) as caught:
            read_values(path)
        assert str(caught.value) == f"{path}: {reason}"


def test_the_workflow_refuses_a_key_that_is_given_twice(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: line 2: the key `name` is given twice"):
        merge_by_snakemake([tmp_path / "mine.yaml"], {})


@pytest.mark.slow
def test_the_workflow_names_a_file_in_the_place_of_the_results(tmp_path):
    snakemake = [*SNAKEMAKE, "--directory", str(tmp_path)]
    (tmp_path / "out").touch()
    values = {"name": "a", "results": str(tmp_path / "out"), "dataset": {"source": "moving-shapes"}}
    command = [*snakemake, "--dry-run", "--cores", "1", "--configfile", str(write(tmp_path, mine=values))]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 1 and "Traceback" not in output
    assert f"{tmp_path / 'out'} is a file, and results need a folder" in output


def test_an_entry_inherits_missing_keys_from_the_one_that_it_extends():
    runs = {
        "a": RUN,
        "b": {"extends": "a", "optimisation": {"epochs": 5}},
        "c": {"extends": "b", "frames": 16, "optimisation": {"warmup_epochs": 0}},
    }
    resolved = inherit({"name": "x", "pretrain": runs})["pretrain"]
    assert resolved["a"] == RUN
    assert resolved["b"] == {"frames": 8, "optimisation": {"epochs": 5, "betas": [0.9, 0.95], "warmup_epochs": 1}}
    assert resolved["c"] == {"frames": 16, "optimisation": {"epochs": 5, "betas": [0.9, 0.95], "warmup_epochs": 0}}
    assert runs["b"] == {"extends": "a", "optimisation": {"epochs": 5}}, "the input is not modified"


@pytest.mark.parametrize("kind", ["pretrain", "evaluate", "tables", "figures"])
def test_an_entry_whose_name_begins_with_a_dot_is_a_template(kind):
    entries = {".common": {"title": "T", "clips": 2}, "one": {"extends": ".common", "clips": 3}}
    assert inherit({kind: entries}) == {kind: {"one": {"title": "T", "clips": 3}}}


def test_an_entry_or_a_dataset_that_is_null_is_left_out():
    values = {
        "pretrain": {"a": RUN, "b": None, "c": {"extends": "a"}},
        "datasets": {"one": None, "two": {}},
        "seeds": None,
    }
    expected = {"pretrain": {"a": RUN, "c": RUN}, "datasets": {"two": {}}, "seeds": None}
    assert inherit(values) == expected
    with pytest.raises(ConfigError, match=r"pretrain\.c\.extends = 'b': must be one of a"):
        inherit({"pretrain": {"a": RUN, "b": None, "c": {"extends": "b"}}})


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"a": {"extends": "b"}, "c": {}}, ["pretrain.a.extends = 'b'", "must be one of c"]),
        ({"a": {"extends": "b"}, "b": {"extends": "a"}}, ["pretrain", "in turn"]),
        ({"a": {"extends": "a"}, "b": {}}, ["pretrain.a.extends = 'a'", "in turn"]),
        ({"a": {"extends": ["b"]}, "b": {}}, ["pretrain.a.extends = ['b']"]),
        ({"a": {"extends": "b"}, "b": 3}, ["pretrain.b is not a mapping"]),
    ],
)
def test_the_error_names_an_entry_that_cannot_be_extended(runs, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "x", "dataset": {"source": "moving-shapes"}, "pretrain": runs}, "mine.yaml")
    for word in ["mine.yaml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_snakemake_command_line_and_python_read_the_same_config(path):
    values = merge_by_snakemake([path], {"seed": 3})
    assert parse_config(values) == load(argparse.Namespace(config=[str(path)], set=["seed=3"]))
    assert parse_config(merge_by_snakemake([path], {})) == load_config(path)
    assert "extends" not in yaml.safe_dump(values)


def test_files_and_overrides_keep_their_order_if_a_later_file_extends_another(tmp_path):
    dataset = {"source": "moving-shapes"}
    write(tmp_path, base={"grid": 2, "seed": 1}, first={"name": "x", "dataset": dataset, "grid": 3, "seed": 2})
    write(tmp_path, last={"extends": "base.yaml", "pretrain": {"a": RUN, "b": {"extends": "a"}}})
    files = [tmp_path / "first.yaml", tmp_path / "last.yaml"]
    overrides = {"pretrain": {"a": {"frames": 16}}}
    config = parse_config(merge_by_snakemake(files, overrides))
    assert (config.grid, config.seed) == (2, 1), "the file that the second one extends overrides the first"
    assert config.pretrain["a"].frames == config.pretrain["b"].frames == 16, "b inherits an override of a, too"
    arguments = argparse.Namespace(config=[str(file) for file in files], set=["pretrain.a.frames=16"])
    assert load(arguments) == config


def test_the_papers_settings_survive_the_merge():
    """Covers the keys that a shallow merge would lose."""
    stm, clusterstm = (load_config(ROOT / f"config/{name}.yaml") for name in ("stm", "clusterstm"))
    assert stm.pretrain["umt"] == clusterstm.pretrain["umt"]
    # Of the evaluations that both have, config/stm.yaml limits three to UMT: STM's release has batches of its own there.
    own = {"msrvtt-stm", "didemo-stm", "msrvtt-qa-stm", "msrvtt-captioning", "msvd-captioning"}
    shared = stm.evaluate.keys() & clusterstm.evaluate.keys()
    assert shared == (stm.evaluate.keys() | clusterstm.evaluate.keys()) - own
    one, two = (
        {name: c.evaluate[name].model_copy(update={"runs": None}) for name in shared} for c in (stm, clusterstm)
    )
    assert one == two and {n for n in shared if stm.evaluate[n].runs} == {"msrvtt", "didemo", "msrvtt-qa"}
    run, other = stm.pretrain["stm"], clusterstm.pretrain["clusterstm"]
    assert isinstance(run, LanguageRun) and isinstance(other, LanguageRun)
    rates = run.optimisation.learning_rate, run.optimisation.betas, run.optimisation.scale_by_batch
    assert rates == (1e-4, (0.9, 0.999), False) and run.optimisation.epochs == 15
    assert run.images is not None and run.images.datasets == ("cc3m",) and run.images.batch_size == 1024
    assert run.teacher.model == f"actionclip:{run.teacher.temporal_fusion}" and run.teacher.layers == 6
    assert other.teacher.model == "ViT-B-16-SigLIP@webli" and other.teacher.layers == 6
    assert not stm.pack.text and clusterstm.pack.text and stm.pack.sources == clusterstm.pack.sources == ("human",)
    small = load_config(ROOT / "config/stm-small.yaml")
    released = small.pretrain["stm-released"]
    assert isinstance(released, LanguageRun) and released.spatio_temporal is not None
    assert (released.spatio_temporal.sampling, released.spatio_temporal.width) == ("as_released", 64)


@pytest.mark.slow
def test_the_workflow_takes_a_config_that_extends_another(tmp_path):
    """The jobs come from a run and evaluations that only the extended file has."""
    (tmp_path / "stm").symlink_to(ROOT / "stm")  # the config's models lie there, relative to the working folder
    snakemake = [*SNAKEMAKE, "--directory", str(tmp_path)]
    files = ["--configfile", str(ROOT / "config/clusterstm-small.yaml"), str(write(tmp_path, mine={"seeds": [5]}))]
    command = [*snakemake, "--dry-run", "--cores", "1", "clusterstm_table1", *files]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-4000:]
    assert "umt-seed5" in output and "-seed0" not in output


@pytest.mark.slow
def test_the_parts_of_a_figure_are_one_target_even_if_they_are_tables(tmp_path):
    (tmp_path / "stm").symlink_to(ROOT / "stm")  # the config's models lie there, relative to the working folder
    snakemake = [*SNAKEMAKE, "--directory", str(tmp_path)]
    command = [*snakemake, "--dry-run", "--cores", "1", "tgm_figure3"]
    command += ["--configfile", str(ROOT / "config/tgm-small.yaml")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-4000:]
    assert all(f"tables/tgm_figure3{part}.csv" in finished.stdout + finished.stderr for part in "abc")
