"""Sums rounded to bfloat16 or int8."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.strategies.compression import BLOCK, LEVELS, from_int8, to_int8
from tests.strategies.runs import FORK_WARNINGS, fit, strategy

pytestmark = [pytest.mark.filterwarnings(w) for w in FORK_WARNINGS]


def test_int8() -> None:
    x = torch.randn(3, 4 * BLOCK)
    x[1, BLOCK : 2 * BLOCK] = 0
    packed, sent = to_int8(x)
    assert packed.shape == (3, 4 * BLOCK + 16)
    assert torch.equal(from_int8(packed, 4 * BLOCK), sent)
    largest = x.view(3, 4, BLOCK).abs().amax(-1, keepdim=True).expand(3, 4, BLOCK).reshape(3, -1)
    assert ((x - sent).abs() <= largest / LEVELS / 2 * 1.001).all()


@pytest.mark.processes
@pytest.mark.parametrize(("format", "most"), [("bfloat16", 2e-3), ("int8", 2e-3)])
@pytest.mark.parametrize("n", [2, 3])
def test_compression_stays_near_the_exact_run(tmp_path: Path, format: Any, most: float, n: int) -> None:
    relaxation = le.elastic_sgd(2, 0.5)
    exact = fit(tmp_path / "exact", strategy(relaxation), n, max_epochs=4)
    near = fit(tmp_path / format, strategy(relaxation, communication_dtype=format), n, max_epochs=4)
    for left, right in zip(exact, near, strict=True):
        for x, y in zip(left["anchors"][-1], right["anchors"][-1], strict=True):
            assert 0 < (x - y).abs().max() < most
