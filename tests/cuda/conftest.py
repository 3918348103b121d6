"""The device of a test: the CPU, on which its logic is tried everywhere, and a GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Return the device, with algorithms that give the same bits every time."""
    torch.use_deterministic_algorithms(True)
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(False)
