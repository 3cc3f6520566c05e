"""`stm init` writes a folder that works, and commands without a config say how to get one."""

import argparse
import re
from pathlib import Path

import pytest
import yaml

from stm.cli import build_parser, main
from stm.config import load_config, read_values
from stm.config.files import default_file
from stm.stages.journey import all_stages

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))


def init(folder: Path, *arguments: str) -> Path:
    assert main(["init", str(folder), *arguments]) == 0
    return folder / "config/mine.yaml"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_config_of_a_new_study_is_short_and_runs_as_the_shipped_one(name: str, tmp_path: Path) -> None:
    written = {"demo": "package:demo.yaml", "tgm": "tgm.yaml"}.get(name, name)
    text = (path := init(tmp_path / "new", "--config", written)).read_text()
    assert read_values(path) == read_values(ROOT / f"config/{name}.yaml")
    assert len(text.splitlines()) < 80 and str(ROOT) not in text
    assert yaml.safe_load(text)["extends"] == f"package:{name}.yaml"


def test_a_new_study_says_where_its_data_lies_and_takes_other_keys(tmp_path: Path) -> None:
    path = init(tmp_path / "new")  # by default for videos of one's own
    values = yaml.safe_load(path.read_text())
    assert values["dataset"] == {"root": "videos", "annotations": "videos/annotations.csv"}
    example = re.search(r"^# +(pretrain: \{.*\})$", path.read_text(), re.M)[1]
    path.write_text(path.read_text().replace("root: videos", "root: clips") + example)
    config = load_config(path)
    assert config.of("my-videos").dataset.root == "clips"
    assert config.pretrain["text"].workers == 8 and config.pretrain["text"].frames == 16


def test_profiles_are_copied_and_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new"
    init(folder)
    for profile in ("default", "slurm"):
        file = f"workflow/profiles/{profile}/config.yaml"
        assert (folder / file).read_text() == (ROOT / file).read_text()
    assert "snakemake plan --cores 1" in capsys.readouterr().out
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert main(["init", str(folder), "--config", "tgm"]) == 2
    assert "config/mine.yaml" in (message := capsys.readouterr().err) and "nothing is overwritten" in message
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == before
    (linked := tmp_path / "linked/config").mkdir(parents=True)
    (linked / "mine.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    assert main(["init", str(linked.parent)]) == 2
    assert not (tmp_path / "elsewhere.yaml").exists()


@pytest.mark.parametrize(
    ("name", "word"), [("tmg", "tgm"), ("base/video-language", "stm-small"), ("constraints.txt", "demo")]
)
def test_a_config_that_does_not_exist_names_those_that_do(
    name: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path), "--config", name]) == 2
    assert f"must be one of {', '.join(SHIPPED)}" in (message := capsys.readouterr().err) and word in message
    assert list(tmp_path.iterdir()) == []


def test_no_command_without_a_config_fails_without_naming_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for command in (*(stage.command for stage in all_stages().values()), "verify"):
        assert command in commands
        assert main([command]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"stm {command}: ") and "--config FILE" in message and "`stm init FOLDER`" in message


def test_the_config_of_a_checkout_or_of_a_new_study_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert default_file("--config") == "config/mine.yaml"
    monkeypatch.chdir(ROOT)
    assert default_file("--config") == "config/demo.yaml"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("snakemake", "the library snakemake is not installed: pip install 'stm-video[workflow]'"),
        ("transformers.models", "the library transformers is not installed: pip install 'stm-video[language]'"),
        ("stm.nowhere", None),  # a mistake of ours, which needs its traceback
    ],
)
def test_a_missing_library_is_one_message_with_the_command_that_installs_it(
    name: str, advice: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: argparse.Namespace) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("stm.cli.load", fail)
    if advice is None:
        with pytest.raises(ModuleNotFoundError):
            main(["plan"])
    else:
        assert main(["plan"]) == 2
        assert advice in capsys.readouterr().err
