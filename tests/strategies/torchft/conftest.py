"""What the replicas' meetings bring, for several files of tests."""

import pytest

from tests.strategies.torchft import meetings


@pytest.fixture(scope="session")
def met() -> meetings.Met:
    """Return the results of scenarios of meetings, which one process has played, and what it wrote to stderr."""
    results, said = meetings.run(*meetings.SCENARIOS)
    return lambda name: (results[name], said)
