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
SOURCES = ("stm", "config", "workflow", "pyproject.toml", "setup.py", "README.md", "LICENSE", "environment.yml")
# What needs no extra: shards, masks, encoders and their weights, training on shards, pages, videos, the command line.
CORE = (
    *(
        "stm.cli",
        "stm.data.loader",
        "stm.data.stream.opening",
        "stm.masking",
        "stm.models.vit",
        "stm.models.weights.zoo",
    ),
    *("stm.methods.mae", "stm.training.pretraining", "stm.evaluation.classification.linear", "stm.report.page.write"),
    *("stm.report.viewer.own_video", "stm.preprocess.video.random_access", "stm.preprocess.frames.extract"),
)
STUDY = {
    "name": "study",
    "dataset": {"source": "moving-shapes", "clips": {"train": 2}, "frames": 8, "height": 64, "width": 64},
    "grid": 4,
    "frames": {"every": 2, "short_side": 64},
    "similarity": {"model": "package:demo-clip"},
    "text": {"model": "package:demo-clip"},
    "captions": {"blip2": {"kind": "blip2", "model": "package:demo-blip2", "key_frames": 1, "max_new_tokens": 4}},
    "pack": {"captions": "blip2", "similarity": False, "motion": False},
    "pretrain": {
        "tube": {"model": "tiny", "image_size": 32, "patch_size": 8, "frames": 4, "init": "clip:package:demo-clip"}
    },
}
STAGES = """
import sys
from pathlib import Path
from stm.cli import main
for stage in ("generate", "manifest", "split", "frames", "captions", "shards", "verify"):
    assert main([stage, "--config", sys.argv[1]]) == 0, stage
from stm.shards.index import ClipIndex
from stm.shards.reader import ShardReader
index = ClipIndex([Path("results/study/shards/train/train-00000.parquet")])
frames = [frame.shape for _, frame in ShardReader().frames(index[0], range(4))]
print("read", len(index), frames)
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
    assert "init" in installed.run(tmp_path, "stm", "--help")
    assert "`stm init FOLDER`" in installed.run(tmp_path, "stm", "plan", fails=True)
    installed.run(tmp_path, "stm", "init", "mine", "--config", "demo")
    mine = tmp_path / "mine"
    printed = installed.snakemake(mine, "plan", "--configfile", "config/mine.yaml")  # a real job
    assert (mine / "results/moving-shapes/plan.json").is_file()
    assert "workflow specific profile workflow/profiles/default" in printed
    assert "rule report" in installed.snakemake(mine, "-n")
    # From another folder, into a third: only what `package:` names and the workflow itself are independent of both.
    snakefile = str(installed.package / "shipped/workflow/Snakefile")
    arguments = ("-s", snakefile, "--directory", "elsewhere", "-n", "--configfile", "mine/config/mine.yaml")
    printed = installed.snakemake(tmp_path, *arguments)
    assert "rule report" in printed and str(ROOT) not in printed


@pytest.mark.slow
def test_stages_use_the_shipped_models_and_their_shards_can_be_read(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    printed = installed.run(tmp_path, "python", "-c", STAGES, "study.yaml")
    assert "read 2 [(64, 64, 3), (64, 64, 3), (64, 64, 3), (64, 64, 3)]" in printed
    # The model is recorded by its name, and no folder of this machine is.
    (captions,) = (tmp_path / "results/study/captions").rglob("*.parquet")
    assert b"package:demo-blip2" in captions.read_bytes()
    for path in (tmp_path / "results").rglob("*"):
        assert path.is_dir() or os.fsencode(installed.package.parent) not in path.read_bytes(), path


@pytest.mark.slow
def test_the_protocols_of_benchmarks_are_installed(installed: Environment, tmp_path: Path) -> None:
    code = "from stm.datasets.video_text.protocol import protocol_names, read_protocol;"
    code += "print(*(name for name in protocol_names() if read_protocol(name).title))"
    names = sorted(path.stem for path in (ROOT / "config/datasets").glob("*.yaml"))
    assert installed.run(tmp_path, "python", "-c", code).split() == names


def test_the_core_is_imported_without_the_libraries_of_extras() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)}));"  # importing any of them is an error
    code += "".join(f"import {module};" for module in CORE)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
