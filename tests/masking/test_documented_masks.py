"""The strategies of README.md and docs/masking.md train as they are printed, through the config and the command line."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_shards import make_shard

from stm.cli import main
from stm.masking import registry

ROOT = Path(__file__).parents[2]
SECTIONS = {"README.md": "## Your own videos, a paper, a mask", "docs/masking.md": "## A strategy of your own"}
NAMES = {"README.md": "masks/still.py:still", "docs/masking.md": "masks/top_rows.py:top_rows"}
SMALL = {
    "model": "tiny",
    "image_size": 32,
    "patch_size": 8,
    "frames": 4,
    "decoder_depth": 1,
    "workers": 1,
    "optimisation": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0},
}
SETTINGS = {"name": "made", "dataset": {"source": "folder", "root": "videos"}, "pretrain": {"mine": SMALL}}


def blocks(file: str, language: str) -> list[str]:
    """The code blocks of the section on strategies of one's own."""
    section = (ROOT / file).read_text().split(f"{SECTIONS[file]}\n", 1)[1].split("\n## ", 1)[0]
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", section, re.M | re.S)
    return ["".join(line.removeprefix(indent) for line in block.splitlines(True)) for indent, block in found]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with packed shards and the settings beside the documented ones."""
    make_shard(tmp_path / "results/made/shards/train/train-00000.parquet", ["red", "green"] * 4)
    (tmp_path / "results/made/slices.json").write_text(json.dumps({"shards": ["train-00000"]}))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SETTINGS))
    return tmp_path


def pretrain(project: Path, config: str, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    (project / "own.yaml").write_text(config)
    command = [sys.executable, "-m", "stm.cli", "pretrain", "--config", "small.yaml", "own.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(package), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def trained(project: Path, finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The record of a run that must have ended well."""
    assert finished.returncode == 0, finished.stderr[-3000:]
    return record_of(project)


def record_of(project: Path) -> dict[str, Any]:
    assert (project / "results/made/pretrain/mine/weights.safetensors").is_file()
    record: dict[str, Any] = json.loads((project / "results/made/pretrain/mine/config.json").read_text())
    assert record["receipt"]["step"] == 2
    return record


@pytest.fixture
def pretrain_here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """The same command in this process, as if no strategy had been looked up before; returns its status."""

    def pretrain_with(config: str) -> int:
        (project / "own.yaml").write_text(config)
        return main(["pretrain", "--config", "small.yaml", "own.yaml"])

    monkeypatch.chdir(project)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(registry, "_found", {})
    return pretrain_with


def write_strategy(project: Path, name: str, code: str) -> None:
    (project / "masks").mkdir()
    (project / name.partition(":")[0]).write_text(code)


@pytest.mark.parametrize("file", SECTIONS)
def test_the_documented_strategy_trains_from_a_file_of_the_users_own(
    project: Path, file: str, pretrain_here: Callable[[str], int]
) -> None:
    (code,), config = blocks(file, "python"), blocks(file, "yaml")[0]
    name = NAMES[file]
    write_strategy(project, name, code)
    assert pretrain_here(config) == 0
    record = record_of(project)
    assert record["run"]["mask"] == {"strategy": name, "ratio": 0.75}
    assert record["receipt"]["masks"] == {name: hashlib.sha256(code.encode()).hexdigest()}


def test_the_documented_strategy_trains_from_the_packages_folder(project: Path, tmp_path: Path) -> None:
    (code,), config = blocks("docs/masking.md", "python"), blocks("docs/masking.md", "yaml")[1]
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "stm", copy / "stm", copy_function=os.symlink, ignore=ignored)
    (copy / "stm/masking/top_rows.py").write_text(code)
    record = trained(project, pretrain(project, config, copy))
    assert record["run"]["mask"] == {"strategy": "top_rows", "ratio": 0.75}
    assert "masks" not in record["receipt"]


def test_a_strategy_that_hides_too_little_stops_in_the_first_step(
    project: Path, pretrain_here: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = (
        '@register("half")\ndef half(guides, ratio):\n    return hide_highest(guides["noise"], guides["noise"], 0.5)\n'
    )
    (project / "half.py").write_text(f"from stm.masking import hide_highest, register\n\n{wrong}")
    assert pretrain_here("pretrain: {mine: {mask: {strategy: 'half.py:half', ratio: 0.75}}}") != 0
    errors = capfd.readouterr().err
    assert "'half.py:half' at ratio 0.75 must return 4 kept tokens of 16 in each of 2 slots" in errors
    assert "hides 0.5" in errors
    assert not (project / "results/made/pretrain/mine/weights.safetensors").exists()


def test_a_file_that_does_not_exist_stops_before_anything_runs(
    pretrain_here: Callable[[str], int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain_here("pretrain: {mine: {mask: {strategy: 'masks/gone.py:gone'}}}") != 0
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert "pretrain.mine.mask.strategy = 'masks/gone.py:gone': masks/gone.py does not exist" in errors


@pytest.mark.slow
def test_the_file_reaches_several_processes_under_torchrun(project: Path) -> None:
    (code,) = blocks("README.md", "python")
    write_strategy(project, NAMES["README.md"], code)
    mine = f"{{mask: {{strategy: '{NAMES['README.md']}', ratio: 0.75}}, processes: 2}}"
    trained(project, pretrain(project, f"pretrain: {{mine: {mine}}}"))
