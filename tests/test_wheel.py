"""A wheel, installed into an environment of its own and used from a folder outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from stm.cli.extras import EXTRAS

ROOT = Path(__file__).parents[1]
SOURCES = (
    "stm",
    "config",
    "workflow",
    "results/reference",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "environment.yml",
)
# What needs no extra: shards, masks, encoders and their weights, training on shards, pages, videos, the command line.
CORE = (
    *("stm.cli", "stm.data.loader", "stm.data.stream.opening", "stm.masking", "stm.models.vit"),
    *("stm.models.weights.zoo", "stm.methods.mae", "stm.training.pretraining", "stm.evaluation.classification.linear"),
    *("stm.report.page.write", "stm.report.viewer.own_video", "stm.preprocess.frames.extract"),
    *("stm.preprocess.video.random_access", "stm.features.extraction", "stm.features.prediction"),
    *("stm.api.encoders", "stm.api.images", "stm.api.masks", "stm.api.shards"),
)
STUDY = {
    "name": "study",
    "dataset": {"source": "moving-shapes", "clips": {"train": 2}, "frames": 8, "height": 64, "width": 64},
    "frames": {"every": 2, "short_side": 64},
    "pack": {"captions": None, "similarity": False, "motion": False},
    "pretrain": {"tube": {"mask": {"strategy": "tube", "ratio": 0.5}}},
}
STAGES = """
import sys
from pathlib import Path
from stm.cli import main
for stage in ("generate", "manifest", "split", "frames", "shards", "verify"):
    assert main([stage, "--config", sys.argv[1]]) == 0, stage
from stm.shards.index import ClipIndex
from stm.shards.reader import ShardReader
index = ClipIndex([Path("results/study/shards/train/train-00000.parquet")])
frames = [frame.shape for _, frame in ShardReader().frames(index[0], range(4))]
print("read", len(index), frames)
"""
# What the wheel carries besides code, as its functions find it.
CARRIED = """
from stm.datasets.video_text.protocol import protocol_names, read_protocol
from stm.pretrained.local_files import local_model_files
from stm.storage.shipped import shipped_configs, shipped_models
print(*(name for name in protocol_names() if read_protocol(name).title))
print(*shipped_configs())
print(*(model for model in shipped_models() if local_model_files(f"package:{model}")))
"""


class Environment:
    """An environment with the wheel; all other libraries are those of the tests' own."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.package = Path(sysconfig.get_path("purelib", vars={"base": str(folder)})) / "stm"
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(self, folder: Path, *command: str, fails: bool = False) -> str:
        """Run a program of the environment in `folder`, and return everything that it printed."""
        call = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(call, cwd=folder, env=self.variables, capture_output=True, text=True, check=False)
        printed = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, printed[-5000:]
        return printed

    def snakemake(self, folder: Path, *arguments: str) -> str:
        return self.run(folder, "python", "-m", "snakemake", "--cores", "1", *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in SOURCES:  # a build writes into the folder of the source
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheel"], cwd=source, check=True
    )
    venv.create(folder, with_pip=False)
    made = Environment(folder)
    # Python reads no .pth files there, so that an editable installation of the checkout is not found.
    made.package.with_name("libraries.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = (source / "wheel").glob("*.whl")
    install = ["--python", str(folder), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    return made


@pytest.mark.slow
def test_a_new_study_is_planned_and_its_jobs_are_listed_with_the_installed_workflow(
    installed: Environment, tmp_path: Path
) -> None:
    assert "`stm init FOLDER`" in installed.run(tmp_path, "stm", "plan", fails=True)
    installed.run(tmp_path, "stm", "init", "mine", "--config", "demo")
    printed = installed.snakemake(tmp_path / "mine", "-n")
    assert "rule report" in printed and "workflow specific profile workflow/profiles/default" in printed
    # From another folder, into a third: what `package:` names, and the workflow itself, depend on neither.
    snakefile = str(installed.package / "shipped/workflow/Snakefile")
    arguments = ("plan", "-s", snakefile, "--directory", "elsewhere", "--configfile", "mine/config/mine.yaml")
    printed = installed.snakemake(tmp_path, *arguments)
    assert (tmp_path / "elsewhere/results/moving-shapes/plan.json").is_file()
    ours = printed.replace(sys.prefix, "")  # Snakemake prints where it is installed, which may be in the checkout
    assert "workflow/profiles/default" in ours and str(ROOT) not in ours


@pytest.mark.slow
def test_shards_are_made_and_read(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    printed = installed.run(tmp_path, "python", "-c", STAGES, "study.yaml")
    assert "read 2 [(64, 64, 3), (64, 64, 3), (64, 64, 3), (64, 64, 3)]" in printed
    for path in (tmp_path / "results").rglob("*"):  # no result names a folder of this machine
        assert path.is_dir() or os.fsencode(installed.package.parent) not in path.read_bytes(), path


@pytest.mark.slow
def test_protocols_configs_and_models_are_carried(installed: Environment, tmp_path: Path) -> None:
    folders = (ROOT / "config/datasets", ROOT / "config")
    expected = [sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders]
    expected.append(sorted(path.name for path in (ROOT / "stm/assets").iterdir() if path.is_dir()))
    assert [line.split() for line in installed.run(tmp_path, "python", "-c", CARRIED).splitlines()] == expected


def test_the_core_is_imported_without_the_libraries_of_extras() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)}));"  # importing any of them is an error
    code += "".join(f"import {module};" for module in CORE)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
