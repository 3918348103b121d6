"""The exchange between replicas on a device: the CPU's numbers, and a begin that does not wait for the device."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.strategies.exchange import Coupling
from lightning_entropy.strategies.links import Links

pytestmark = pytest.mark.processes

FORMATS = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """A group of one process."""
    if request.param == "nccl" and device.type == "cpu":
        pytest.skip("NCCL is for CUDA alone")
    dist.init_process_group(request.param, store=dist.HashStore(), rank=0, world_size=1)
    yield request.param
    dist.destroy_process_group()


def tensors(step: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(device) for shape in ((700, 41), (5,), ())]


@pytest.mark.parametrize("format", FORMATS)
def test_it_brings_what_is_sent(backend: str, device: torch.device, format: Any) -> None:
    coupling = Coupling(Links(1, 1), format=format)
    most = {"float32": 1e-6, "bfloat16": 0.05, "int8": 0.1, "int4": 1.0}[format]
    for step in range(4):
        given = tensors(step, device)
        wait = coupling(given)
        coupling.progress()
        means = wait()
        assert all(mean.device == device or device.index is None for mean in means)
        torch.testing.assert_close(means, given, rtol=0, atol=most if step else 1e-6)
        assert coupling.round is not None and coupling.round.finite is True
    assert coupling.spread is not None and math.isfinite(coupling.spread)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_taken_out_there(backend: str, device: torch.device, format: Any) -> None:
    coupling = Coupling(Links(1, 1), format=format)
    coupling(tensors(0, device))()
    given = tensors(1, device)
    given[0][3, 3] = torch.nan
    wait = coupling(given)
    with pytest.raises(RuntimeError, match="the weights of every replica are nan or inf"):
        wait()
    assert coupling.round is not None and coupling.round.finite in (False, None)


@pytest.mark.parametrize("format", FORMATS)
def test_its_begin_does_not_wait(backend: str, device: torch.device, format: Any) -> None:
    """The device is kept busy for about a second, and has not come to the end of it when the exchange has begun."""
    coupling = Coupling(Links(1, 1), format=format)
    for step in range(3):  # memory is allocated, and kernels are loaded
        coupling(tensors(step, device))()
    given = tensors(3, device)
    if device.type == "cpu":
        coupling(given)()
        return
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    busy = torch.cuda.Event()
    busy.record()
    wait = coupling(given)
    assert not busy.query()
    assert coupling.round is not None and coupling.round.finite is None
    torch.testing.assert_close(wait(), given, rtol=0, atol=1.0)
    assert busy.query() and coupling.round.finite is True
