"""A table of the outcomes of damaged inputs, printed after the tests."""

from collections.abc import Callable

import pytest

TALLIES = pytest.StashKey[list[str]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """Add a row to the table that is printed after the tests."""
    lines = request.config.stash.setdefault(TALLIES, [])
    return lambda line: lines.append(str(line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(TALLIES, [])
    if lines:
        terminalreporter.section("damaged inputs")
        terminalreporter.write_line("\n".join(["| stage | inputs | outcomes |", "|---|---|---|", *lines]))
