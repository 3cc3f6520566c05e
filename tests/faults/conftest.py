"""Damaged input, kills and full disks; the tests use what the tests of the stages make."""

from collections.abc import Callable

import pytest

TALLIES = pytest.StashKey[list[str]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """Adds a line to the table that is shown after the tests."""
    lines = request.config.stash.setdefault(TALLIES, [])
    return lambda line: lines.append(str(line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(TALLIES, [])
    if lines:
        terminalreporter.section("damaged inputs")
        terminalreporter.write_line("\n".join(["| stage | inputs | how it ended |", "|---|---|---|", *lines]))
