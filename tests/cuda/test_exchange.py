"""The exchange between replicas on a device: the CPU's numbers, and a begin that does not wait for the device."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_entropy.strategies.compression import BLOCK, EagerCodec, Entry
from lightning_entropy.strategies.exchange import Coupling
from lightning_entropy.strategies.fused import FusedCodec
from lightning_entropy.strategies.links import Links

pytestmark = pytest.mark.processes

ROUNDED = ("bfloat16", "int8", "int4")
FORMATS = [("float32", False), *((f, False) for f in ROUNDED), *((f, True) for f in ROUNDED)]


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


@pytest.mark.parametrize(("format", "compile"), FORMATS)
def test_it_brings_what_is_sent(backend: str, device: torch.device, format: Any, compile: bool) -> None:
    coupling = Coupling(Links(1, 1), format=format, compile=compile)
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


@pytest.mark.parametrize(("format", "compile"), FORMATS)
def test_what_is_not_finite_is_taken_out_there(backend: str, device: torch.device, format: Any, compile: bool) -> None:
    coupling = Coupling(Links(1, 1), format=format, compile=compile)
    coupling(tensors(0, device))()
    given = tensors(1, device)
    given[0][3, 3] = torch.nan
    wait = coupling(given)
    with pytest.raises(RuntimeError, match="the weights of every replica are nan or inf"):
        wait()
    assert coupling.round is not None and coupling.round.finite in (False, None)


@pytest.mark.parametrize(("format", "compile"), FORMATS)
def test_its_begin_does_not_wait(backend: str, device: torch.device, format: Any, compile: bool) -> None:
    """The device is kept busy for about a second, and has not come to the end of it when the exchange has begun."""
    coupling = Coupling(Links(1, 1), format=format, compile=compile)
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


@pytest.mark.cuda
@pytest.mark.parametrize("format", ROUNDED)
def test_kernels_round_as_torch_does(format: Any) -> None:
    """Torch divides by a number by its reciprocal on a card, which may move a scale's last bit."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    values, reference, before = (torch.randn(5 * BLOCK + 3, device=device, generator=generator) for _ in range(3))
    for lost in (False, True):
        entry = Entry(reference, before, torch.tensor([lost], device=device))
        (ours, left), (theirs, other) = (
            codec.enter(values.clone(), entry, 2, 3 * BLOCK) for codec in (FusedCodec(format), EagerCodec(format))
        )
        assert ours.shape == theirs.shape
        read = EagerCodec(format).leave(ours, 3 * BLOCK)
        for codec in (FusedCodec(format), EagerCodec(format)):
            torch.testing.assert_close(codec.leave(ours, 3 * BLOCK).float(), read.float(), rtol=0, atol=0)
            sums = codec.pass_on(ours, 3 * BLOCK, None)
            again = EagerCodec(format).leave(sums[0], 3 * BLOCK) + sums[1][0]
            torch.testing.assert_close(again, read.view(2, -1).float().sum(0), rtol=1e-5, atol=1e-5)
        sent = read[: len(values)].float()
        entered = values - reference + before
        torch.testing.assert_close(left, before if lost else entered - sent, rtol=0, atol=0)
        assert lost or (other.norm() == pytest.approx(left.norm().item(), rel=1e-3))


@pytest.mark.parametrize(("format", "compile"), FORMATS)
def test_beside_a_busy_device_it_brings_the_same(
    backend: str, device: torch.device, format: Any, compile: bool
) -> None:
    """Streams that do not wait for each other, or that use memory too early, would bring other numbers."""

    def run(*, busy: bool) -> list[Tensor]:
        coupling, found = Coupling(Links(1, 1), format=format, compile=compile), list[Tensor]()
        for step in range(12):
            wait = coupling(tensors(step, device))
            for i in range(4 if busy else 0):  # the training: memory of every size is written and given back
                if device.type == "cuda":
                    torch.cuda._sleep(3_000_000)
                for t in tensors(100 + i, device):
                    t.mul_(torch.nan)
                torch.full((coupling.links.replicas * 32768,), 255, dtype=torch.uint8, device=device)
            if not busy and device.type == "cuda":
                torch.cuda.synchronize()
            found += wait()
            if not busy and device.type == "cuda":
                torch.cuda.synchronize()
        return found

    torch.testing.assert_close(run(busy=True), run(busy=False), rtol=0, atol=0)
