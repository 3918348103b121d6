"""What several files of tests compare with."""

from typing import Any

import pytest

from tests.strategies.runs import fit
from tests.strategies.streams import Streaming


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the weights that ``elastic_entropy`` trains in forked processes, as every other way to start must."""
    folder = tmp_path_factory.mktemp("fork")
    weights: dict[str, Any] = fit(folder, "elastic_entropy_fork", 2, make=Streaming)[0]["final"]
    return weights
