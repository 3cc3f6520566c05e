"""Messages: who sees them, at which level, from which process."""

import io
import logging
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest

import stm
from stm.cli import main
from stm.jobs.messages import LogLevelError, configure_messages, is_configured
from stm.jobs.progress import Progress, log_to
from stm.jobs.workers import run_isolated

LOG = logging.getLogger("stm.somewhere")


@pytest.fixture(autouse=True)
def level(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The level of the tests, whatever a test sets."""
    monkeypatch.delenv("STM_LOG")
    yield
    configure_messages("info")


def say_all() -> None:
    LOG.debug("small")
    LOG.info("plain, 100%s")
    LOG.warning("strange")


@pytest.mark.parametrize(
    ("chosen", "lines"),
    [
        ("debug", ["debug TIME stm.somewhere: small", "plain, 100%s", "warning: strange"]),
        ("info", ["plain, 100%s", "warning: strange"]),
        ("warning", ["warning: strange"]),
    ],
)
def test_levels(
    chosen: str, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.Formatter.formatTime", lambda *_: "TIME")
    configure_messages(chosen)
    configure_messages()  # a second time prints nothing twice, and keeps the level
    say_all()
    assert capsys.readouterr().err.splitlines() == lines
    assert os.environ["STM_LOG"] == chosen


def test_progress_is_information(capsys: pytest.CaptureFixture[str]) -> None:
    for chosen, printed in (("info", "clips: 1/2 clips in 0s"), ("warning", "")):
        configure_messages(chosen)
        with Progress("clips", 2, "clips") as progress:
            progress.advance()
        assert capsys.readouterr().err.startswith(printed)
        assert bool(printed) == (chosen == "info")


def test_a_terminal_is_drawn_on_only_where_messages_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, ends in (("info", "\n"), ("warning", "")):
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        configure_messages(chosen)
        with redirect_stderr(terminal), Progress("clips", 2, "clips", every=0) as progress:
            progress.advance(2)
        assert terminal.getvalue().endswith(ends) and terminal.getvalue().startswith(
            "\r\x1b[2Kclips: 2/2"[: 5 * len(ends)]
        )


def test_another_process_of_a_run_gives_its_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, line in (("0", "warning: strange\n"), ("3", "[rank 3] warning: strange\n")):
        monkeypatch.setenv("RANK", rank)
        LOG.warning("strange")
        assert capsys.readouterr().err == line


def test_a_job_log_receives_messages_and_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_messages()
    with log_to(tmp_path / "job.log"):
        say_all()
        with warnings.catch_warnings():  # what pytest collects otherwise
            logging.captureWarnings(capture=False)
            logging.captureWarnings(capture=True)
            warnings.warn("odd", stacklevel=1)
    written = (tmp_path / "job.log").read_text()
    assert written == capsys.readouterr().err
    assert written.startswith("plain, 100%s\nwarning: strange\n") and "UserWarning: odd" in written


def chosen_level(item: int) -> tuple[bool, int]:
    return is_configured(), logging.getLogger("stm").level


def test_worker_processes_keep_the_level() -> None:
    configure_messages("warning")
    assert list(run_isolated(chosen_level, [0], 1, 60)) == [(0, (True, logging.WARNING))]
    assert multiprocessing.active_children() == []


def test_an_unknown_level_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STM_LOG", "loud")
    with pytest.raises(LogLevelError, match="STM_LOG is 'loud'; it must be one of debug, info, warning"):
        configure_messages()
    assert main(["schema"]) == 2
    assert capsys.readouterr().err == "stm schema: STM_LOG is 'loud'; it must be one of debug, info, warning\n"


def test_any_name_of_a_file_can_be_logged(tmp_path: Path) -> None:
    """Names on a disk are bytes, which Python turns into characters that UTF-8 cannot encode."""
    # In a process of its own: pytest-xdist cannot send what pytest records of such a message.
    code = (
        "from stm.jobs.messages import configure_messages; from stm.jobs.progress import log_to, say\n"
        "configure_messages('info')\n"
        "with log_to('job.log'): say('clip \\udcff 100%s.mp4\\nis short')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(stm.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "job.log").read_text() == "clip \\udcff 100%s.mp4\nis short\n"


@pytest.mark.parametrize("words", [["-v", "-q", "schema"], ["-v", "schema", "-q"], ["-q", "schema", "-v"]])
def test_both_levels_at_once_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "chosen"), [(["-v", "schema"], "debug"), (["schema", "-q"], "warning"), (["schema"], "info")]
)
def test_the_command_line_sets_the_level(words: list[str], chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert os.environ["STM_LOG"] == chosen
    assert capsys.readouterr().err == ""


def test_whoever_imports_stm_decides() -> None:
    """Nothing is printed, not even warnings, until the program asks for it by logging's own means."""
    code = """
import logging, stm
from stm.jobs.progress import Progress
log = logging.getLogger("stm.x")
def say():
    log.warning("strange"); log.info("plain")
    with Progress("clips", 1, "clips") as progress:
        progress.advance()
assert [type(h) for h in logging.getLogger("stm").handlers] == [logging.NullHandler]
assert not logging.getLogger().handlers
say()
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
say()
"""
    environment = {name: value for name, value in os.environ.items() if name != "STM_LOG"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        "stm.x strange",
        "stm.x plain",
        "stm.jobs.progress clips",
    ]
