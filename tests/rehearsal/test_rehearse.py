"""A config of full size, rehearsed from the lists of a benchmark to the tables and the page."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stm.config import parse_config
from stm.rehearsal.rehearse import splits_of
from stm.rehearsal.run import RehearsalError, run_workflow

ROOT = Path(__file__).parents[2]
RUN = {"dataset": "diving48", "model": "base", "workers": 2, "compile": True, "precision": "bf16"}
STUDY: dict[str, Any] = {
    "name": "study",
    "datasets": {
        "diving48": {"dataset": {"source": "diving48", "root": "data/diving48", "annotations": "data/diving48/lists"}}
    },
    "pack": {"captions": None, "similarity": False, "motion": False},
    "pretrain": {"tube": RUN},
    "evaluate": {"linear": {"task": "linear", "views": 2, "crops": 3}},
    "tables": {
        "probes": {
            "title": "Linear probe",
            "columns": [{"title": "Diving48", "task": "linear"}],
            "rows": [{"label": "Tube", "runs": "tube", "paper": [11.3]}],
        }
    },
    "report": {"clips": 0},
}


@pytest.mark.slow
def test_every_job_of_a_config_is_rehearsed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(STUDY))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow/Snakefile"), "--directory", str(tmp_path)]
    command += ["rehearse", "--cores", "1", "--configfile", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "pretrain.*.model" in done.stdout and "base -> tiny" in done.stdout
    inside = tmp_path / "results/study/rehearsal"
    results = inside / "results/study"
    assert (results / "report.html").is_file() and (results / "plan.json").is_file()
    (row,) = csv.DictReader((results / "tables/probes.csv").read_text().splitlines())
    assert "11.3" in row.values()
    record = json.loads((inside / "rehearsal.json").read_text())
    assert record["jobs"] >= 12
    assert record["datasets"]["diving48"]["generated"] == 13
    assert {"key": ["pretrain", "tube", "model"], "full": "base", "rehearsed": "tiny"} in record["differences"]
    # The full run's own folders hold nothing.
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["study"]
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_what_does_not_fit_together_is_an_error_with_the_workflow_s_message(tmp_path: Path) -> None:
    """There are no data: the workflow refuses the config, and the rehearsal passes its message on."""
    with pytest.raises(RehearsalError, match=r"(?s)could not start.*data/diving48"):
        run_workflow(parse_config(STUDY), tmp_path, cores=1, targets=())
    assert (tmp_path / "snakemake.log").is_file()


def test_the_splits_of_a_dataset_are_those_of_its_runs_and_evaluations() -> None:
    labels = {"task": "linear", "dataset": "other", "train_split": "learn", "test_split": "val"}
    datasets = {name: {"dataset": {"source": "folder", "root": name}} for name in ("diving48", "other")}
    config = parse_config({**STUDY, "datasets": datasets, "evaluate": {**STUDY["evaluate"], "labels": labels}})
    assert splits_of(config, "diving48") == ["train", "test"]
    assert splits_of(config, "other") == ["learn", "val"]
