"""The made results folder, once for all tests of the report."""

import pytest
from report_results import make_results

from stm.config import Config


@pytest.fixture(scope="session")
def made_results(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of a full results folder; do not write into it."""
    return make_results(tmp_path_factory.mktemp("results"))
