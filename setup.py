"""Puts the workflow, the configs and the reference results into `stm/shipped/` of a wheel; see `stm.storage.shipped`.

Everything else about the package is in pyproject.toml. An editable installation uses the files of the checkout.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS, FILES = ("config", "workflow"), ("environment.yml",)  # rules name environment.yml as their software
REFERENCE = "results/reference"


class BuildWithWorkflow(build_py):
    """Copies the package, and then what lies beside it."""

    def run(self) -> None:
        """Build the package's folder."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "stm/shipped"
        shutil.rmtree(target, ignore_errors=True)  # an earlier build may have left files that no longer exist
        for folder in FOLDERS:
            shutil.copytree(folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        # Reference results, which `stm compare` reads, without their figures.
        shutil.copytree(REFERENCE, target / REFERENCE, ignore=shutil.ignore_patterns("figures"))
        for file in FILES:
            shutil.copy2(file, target / file)


setup(cmdclass={"build_py": BuildWithWorkflow})
