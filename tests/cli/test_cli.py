"""The command line reports mistakes in one message, and covers every stage of the workflow."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stm.cli
from stm.cli import main
from stm.cli.common import select, select_jobs
from stm.config import ConfigError, parse_config
from stm.manifest import ChangedVideoError
from stm.stages.journey import all_stages

ROOT = Path(__file__).parents[2]


def test_every_rule_of_the_workflow_is_a_stage_by_hand(capsys):
    rules = {
        rule.replace("_", "-")
        for path in (ROOT / "workflow/rules").glob("*.smk")
        for rule in re.findall(r"^ *(?:rule|checkpoint) (\w+):", path.read_text(), re.M)
    }
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = re.findall(r"^    ([a-z-]+)(?: |$)", capsys.readouterr().out, re.M)
    assert len(rules) > 15 and rules <= set(offered)


def test_a_command_by_its_former_name_runs_and_says_the_new_one(capsys):
    assert main(["faithfulness", "--config", str(ROOT / "config/stm-small.yaml")]) == 2
    renamed, refused = capsys.readouterr().err.splitlines()
    assert "stm crop-agreement" in renamed
    assert refused.startswith("stm crop-agreement: ") and "mask_quality" in refused


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("plan", set()),
        ("rehearse", {"processes"}),
        ("manifest", {"dataset", "processes"}),
        ("split", {"dataset"}),
        ("frames", {"dataset", "shard", "processes"}),
        ("captions", {"dataset", "shard", "source"}),
        ("shards", {"dataset", "shard"}),
        ("verify", {"dataset", "shard"}),
        ("pretrain", {"run"}),
        ("evaluate", {"run", "task"}),
        ("crop-agreement", {"dataset"}),
        ("table", {"table"}),
        ("schema", set()),
    ],
)
def test_the_options_of_a_command_are_what_tells_its_jobs_apart(command, options, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    offered = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M))
    assert offered - {"help", "config", "set"} == options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frames", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["plan", "--config", "CONFIG", "--set", "motion.backend=raft"], ["motion.backend", "raft", "codec"]),
        (["plan", "--config", "CONFIG", "--set", "motion"], ["key=value"]),
        (["plan", "--config", "CONFIG", "--set", "frames=[1"], ["frames=[1", "YAML"]),
        (["manifest", "--config", "FOLDER", "--set", "dataset.root=nowhere"], ["nowhere is not a folder"]),
        (
            ["manifest", "--config", "FOLDER", "--set", "dataset.root=~/videos"],
            ["dataset.folder.root", "~", "whole path"],
        ),
        (
            ["manifest", "--config", "FOLDER", "--set", f"dataset.root={__file__}"],
            ["test_cli.py is not a folder, but a file"],
        ),
        (["plan", "--config", "CONFIG", "--set", "results=out{x}"], ["results = 'out{x}'", "braces"]),
        (["plan", "--config", "CONFIG", "--set", f"results={__file__}"], ["results = ", "test_cli.py is a file"]),
        (["plan", "--config", "nowhere/tgm.yaml"], ["there is no such file in", "comes with stm is package:tgm.yaml"]),
        (["plan", "--config", "package:tmg.yaml"], ["package:tmg.yaml", "package:tgm.yaml", "package:folder.yaml"]),
        (["plan", "--config", "package:../config/demo.yaml"], ["no config of this name", "package:demo.yaml"]),
        (["plan", "--config", f"package:{ROOT}/environment.yml"], ["no config of this name", "package:demo.yaml"]),
        (["plan", "--config", "tests"], ["tests: is a folder; name a YAML file"]),
        (["plan", "--config", "CONFIG", "--set", "=3"], ["--set =3", "key=value"]),
        (["plan", "--config", "CONFIG", "--set", "a..b=3"], ["--set a..b=3", "key=value"]),
        (
            ["plan", "--config", "CONFIG", "--set", "frames={every: 1, every: 2}"],
            ["--set frames", "`every` is given twice"],
        ),
        (["plan", "--config", "CONFIG", "--set", f"seed={'1' * 5000}"], ["seed=", "not valid YAML", "5000 digits"]),
        (["pretrain", "--config", "CONFIG", "--set", "results=none"], ["stm manifest", "stm split"]),
        (["mask-quality", "--config", "CONFIG", "--set", "results=none"], ["stm manifest", "stm split"]),
        (["frames", "--config", "CONFIG", "--set", "results=none"], ["stm manifest", "stm split"]),
        (["captions", "--config", "CONFIG", "--source", "gpt"], ["gpt", "blip2", "human"]),
        (["pretrain", "--config", "CONFIG", "--run", "tubes"], ["tubes", "tube"]),
        (["evaluate", "--config", "CONFIG", "--run", "tube", "--task", "retrieval"], ["retrieval", "tube", "contrast"]),
        (["generate", "--config", "FOLDER"], ["nothing to generate"]),
        (["mask-quality", "--config", "FOLDER"], ["mask_quality"]),
        (["view", "nowhere.mp4"], ["stm view: nowhere.mp4: there is no such file"]),
        (["view", "CONFIG", "--frames", "5"], ["--frames 5", "--tubelet 2"]),
    ],
)
def test_mistakes_are_one_message_not_a_traceback(arguments, words, capsys):
    known = {"CONFIG": str(ROOT / "config/demo.yaml"), "FOLDER": str(ROOT / "config/folder.yaml")}
    assert main([known.get(argument, argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", ""])
@pytest.mark.parametrize(
    "option", [["manifest", "--processes"], ["view", "a.mp4", "--frames"], ["view", "a.mp4", "--every"]]
)
def test_counts_of_the_command_line_are_positive(option, count, capsys):
    with pytest.raises(SystemExit):
        main([*option, count])
    assert f"{option[-1]}: must be a positive integer, is {count!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            "/x: Permission denied: you may not read or write it",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), "/x: Is a directory: it is a folder, not a file"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"),
            "/x: Not a directory: a part of its path is a file",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
            "/x: No such file or directory: it does not",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/x"),
            "/x: Read-only file system: its file system is read-only",
        ),
        (OSError(errno.EIO, "Input/output error", "/x"), "/x: Input/output error\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (ChangedVideoError("/x is not the video of the manifest"), "/x is not the video of the manifest\n"),
    ],
)
def test_errors_of_files_and_machines_are_one_message(error, message, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(stm.cli, "json_schema", fail)
    assert main(["schema"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("stm schema: ") and printed.count("\n") == 1
    assert message in printed


def test_an_error_that_names_no_file_keeps_its_traceback(monkeypatch):
    def fail():
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(stm.cli, "json_schema", fail)
    with pytest.raises(OSError, match="Invalid argument"):
        main(["schema"])


def test_the_schema_is_printed(capsys):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "config/schema.json").read_text()


# argparse itself ignores errors while it writes the help, unless it all fits into the buffer.
@pytest.mark.parametrize(("arguments", "statuses"), [(["schema"], {141}), (["--help"], {0, 141})])
def test_a_reader_that_ends_early_ends_the_command_quietly(arguments, statuses):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "stm.cli", *arguments]
    finished = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, cwd=ROOT)
    os.close(writing)
    assert finished.returncode in statuses and finished.stderr == b""


def test_a_broken_pipe_to_another_process_is_an_error(monkeypatch, capfd):
    def fail():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(stm.cli, "json_schema", fail)
    with Path(os.devnull).open("w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["schema"]) == 2
    assert "Broken pipe" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("named", "selected"),
    [
        (["tube"], ["tube-seed0", "tube-seed3"]),
        (["text", "tube-seed3"], ["tube-seed3", "text"]),
        (["tube-seed0"], ["tube-seed0"]),
        ([], ["tube-seed0", "tube-seed3", "text"]),
    ],
)
def test_a_run_is_named_with_all_of_its_seeds_or_with_one(named, selected):
    mask = {"strategy": "tube", "ratio": 0.9}
    runs = {"tube": {"mask": mask, "seeds": [0, 3]}, "text": {"mask": {"strategy": "random", "ratio": 0.6}}}
    config = parse_config({"name": "seeds", "dataset": {"source": "moving-shapes"}, "pretrain": runs})
    assert [job.run for job in select_jobs(all_stages()["pretrain"], config, {"run": named})] == selected


def test_an_unknown_name_among_many_is_answered_with_the_closest():
    shards = [f"train-{number:05d}" for number in range(3000)]
    with pytest.raises(ConfigError) as error:
        select("shard", ["trian-00042"], shards)
    message = str(error.value)
    assert "train-00042" in message and "3,000" in message and len(message) < 200
    with pytest.raises(ConfigError, match="there are: a, b"):
        select("run", ["c"], ["a", "b"])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(13, "Permission denied", "/a"), "/a: Permission denied: you may not read or write it"),
        (
            OSError(5, "Input/output error; while processing clip 7"),
            "[Errno 5] Input/output error; while processing clip 7",
        ),
        (OSError(22, "a bug"), None),
    ],
    ids=str,
)
def test_errors_of_files_and_of_the_machine_are_messages(error, text, monkeypatch, capsys):
    def fail(arguments: object) -> None:
        raise error

    monkeypatch.setattr("stm.cli._print_schema", fail)
    if text is None:
        with pytest.raises(OSError, match="a bug"):
            main(["schema"])
    else:
        assert main(["schema"]) == 2
        assert capsys.readouterr().err == f"stm schema: {text}\n"
