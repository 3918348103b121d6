"""The Triton kernels of rounding in Triton's interpreter. test_fused.py runs this file with TRITON_INTERPRET=1."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_entropy.strategies import exchange
from lightning_entropy.strategies.compression import BLOCK, EagerCodec, Entry
from lightning_entropy.strategies.exchange import Coupling
from lightning_entropy.strategies.fused import FusedCodec
from lightning_entropy.strategies.links import Links
from tests.strategies.runs import FORK_WARNINGS
from tests.strategies.test_exchange import meet, values

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in FORK_WARNINGS),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]
FORMATS = ("bfloat16", "int8", "int4")


def same(ours: Any, theirs: Any, format: str = "") -> None:
    """To the bit; but a nan of bfloat16 is any nan."""
    if format == "bfloat16":
        ours, theirs = (
            [t.view(torch.bfloat16) if t.dtype == torch.uint8 else t for t in found] for found in (ours, theirs)
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def odd(size: int) -> Tensor:
    """Of every magnitude, with blocks of zeros and of numbers that are not finite."""
    g = torch.Generator().manual_seed(size)
    found = torch.randn(size, generator=g) * torch.logspace(-45, 38, size, dtype=torch.float64).float()
    found[torch.randint(size, (size // 8,), generator=g)] *= 1e-3
    for at, value in ((1, torch.inf), (2, -torch.inf), (3, torch.nan)):
        found[min(at * BLOCK + at, size - 1)] = value if size > 4 * BLOCK else 1.0
    found[4 * BLOCK : 5 * BLOCK] = 0.0
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "n", "size"), [(1, BLOCK, BLOCK), (2, 3 * BLOCK, 5 * BLOCK + 3), (3, BLOCK, 5)])
@pytest.mark.parametrize("given", ["values", "difference", "nothing"])
def test_the_bytes_and_what_they_leave_out(format: Any, rows: int, n: int, size: int, given: str) -> None:
    entry = Entry()
    if given != "values":
        entry = Entry(torch.randn(size), torch.randn(size), torch.tensor([given == "nothing"]))
    kinds = [kind(format) for kind in (FusedCodec, EagerCodec)]
    ours, theirs = (codec.enter(odd(size), entry, rows, n) for codec in kinds)
    same(list(ours), list(theirs), format)
    assert theirs[1].isfinite().all() == (given == "nothing" or size < 4 * BLOCK)
    received = torch.cat([kinds[1].enter(odd(n + i)[:n], Entry(), 1, n)[0] for i in range(rows)])
    for residual in (None, torch.randn(1, n)):
        same(*(list(codec.pass_on(received, n, residual)) for codec in kinds), format)
    same(*(codec.leave(received, n).float() for codec in kinds))


@pytest.mark.processes
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_an_exchange_brings_the_same(
    tmp_path: Path, format: Any, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over rounds with what is left over, of which a replica sits one out."""
    monkeypatch.setattr(exchange, "is_fusible", lambda values: True)

    def work(rank: int) -> list[list[Tensor]]:
        found = []
        for compile in (True, False):
            coupling = Coupling(Links(replicas, 1), format=format, compile=compile)
            means = []
            for step in range(4):
                tensors = values(10 * step + rank)
                if step == 2 and rank == 1:
                    tensors[0][3, 3] = torch.nan
                means += coupling(tensors)()
            found.append([*means, *(t for t in vars(coupling.memory).values() if t is not None)])
        return found

    for ours, theirs in meet(replicas, work, tmp_path):
        same(ours, theirs)
