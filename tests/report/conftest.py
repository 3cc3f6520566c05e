"""A generated results folder, shared by all tests of the report."""

import pytest
from report_results import make_results

from stm.config import Config


@pytest.fixture(scope="session")
def made_results(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a complete results folder; read-only."""
    return make_results(tmp_path_factory.mktemp("results"))
