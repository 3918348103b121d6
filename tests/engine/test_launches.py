"""What a step asks of a GPU: few calls whatever the number of tensors, and no wait for what it computes.

No GPU is needed: calls are counted on the CPU with the choices that a GPU's parameters get, and tensors on the device
"meta" have no values to tell the host. (Fake ones on "cuda" would make a later fork of the process fail.)
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

import lightning_entropy as le
from lightning_entropy.engine.weights import Weights
from tests.device_calls import WAITS, Calls, as_on_a_gpu
from tests.engine.methods_table import METHODS, part, perturbs

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": part(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adamw": part(torch.optim.AdamW, lr=1e-2, foreach=True),
}
STEPS = 10
NO_VALUE = "called on meta tensors|out of meta tensor"
MOST = 20  # beyond the optimizer's own calls
# With less precision a parameter is widened and rounded besides. A mean over several gradients is so too, and where
# the optimizer steps at x it has to be found out which of the rounded weights it has moved.
MOST_IN_HALF = {"heat_filter": 23, "heat_relative": 24, "smoothed_filter": 23}


def resnet50(width: int) -> list[tuple[int, ...]]:
    """The 161 shapes of a ResNet-50, its channels divided by 64 and multiplied by ``width``."""
    shapes: list[tuple[int, ...]] = []
    channels = width

    def convolution(out: int, inputs: int, kernel: int) -> None:
        shapes.extend([(out, inputs, kernel, kernel), (out,), (out,)])  # and BatchNorm

    convolution(width, 3, 7)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width << stage
        for block in range(blocks):
            convolution(inner, channels, 1)
            convolution(inner, inner, 3)
            convolution(4 * inner, inner, 1)
            if block == 0:
                convolution(4 * inner, channels, 1)
            channels = 4 * inner
    return [*shapes, (10, channels), (10,)]


@pytest.fixture
def on_a_gpu() -> Iterator[None]:
    with as_on_a_gpu():
        yield


def steps(
    make: Make,
    relaxation: le.Relaxation | None,
    *,
    tensors: int = 161,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Counter[str]]:
    """What ten steps call, from the first on."""
    shapes = resnet50(1)
    assert len(shapes) == 161
    params = [torch.nn.Parameter(torch.ones(s, device=device, dtype=dtype)) for s in shapes[:tensors]]
    optimizer = make(params)
    loop = None if relaxation is None else le.relax(optimizer, relaxation, seed=0)
    if loop is not None:
        loop.prepare()
    found = []
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.ones_like(p)
        with Calls() as calls:
            optimizer.step()
        found.append(calls.counted)
    return found


@functools.cache
def plain(name: str, dtype: torch.dtype) -> Counter[str]:
    """What a step of the optimizer alone calls."""
    return steps(OPTIMIZERS[name], None, dtype=dtype)[-1]


def beyond(name: str, relaxation: le.Relaxation, dtype: torch.dtype = torch.float32) -> list[Counter[str]]:
    """What the steps after the first two outer ones, which make the state, call beyond the optimizer's own."""
    warm = 2 * relaxation.inner_steps
    assert warm + relaxation.inner_steps <= STEPS
    found = []
    for counted in steps(OPTIMIZERS[name], relaxation, dtype=dtype)[warm:]:
        left = counted.copy()
        left.subtract(plain(name, dtype))
        found.append(+left)
    return found


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_makes_few_calls_whatever_the_number_of_tensors(method: str, name: str) -> None:
    for counted in beyond(name, METHODS[method]):
        # A gradient taken away in the middle of a mean leaves the optimizer nothing to do.
        assert counted.total() <= MOST, counted


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("method", METHODS)
def test_so_it_does_where_weights_have_less_precision(method: str) -> None:
    for counted in beyond("sgd", METHODS[method], torch.bfloat16):
        assert counted.total() <= MOST_IN_HALF.get(method, MOST), counted


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [name for name, relaxation in METHODS.items() if perturbs(relaxation)])
def test_what_a_hook_has_just_made_the_same_need_not_be_compared(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comparing it nevertheless, as where somebody may have written in between, changes no bit."""

    def run() -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((4, 3), (5,), (2, 3, 3, 3))]
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        loop = le.relax(optimizer, METHODS[method], seed=0)
        loop.prepare()
        for i in range(10):
            for p in params:
                p.grad = None if i in (4, 5) and p.dim() == 1 else p.detach() * (i + 1)
            optimizer.step()
        return [*loop.anchor, *loop.average, *params]

    torch.manual_seed(0)
    found = run()
    monkeypatch.setattr(Weights, "alone", lambda self: contextlib.nullcontext())
    torch.manual_seed(0)
    assert all(map(torch.equal, run(), found))


@pytest.mark.parametrize("method", METHODS)
def test_on_the_cpu_only_draws_and_norms_go_one_by_one(method: str) -> None:
    """A stream per parameter gives numbers that do not depend on which others move."""
    for counted in beyond("sgd", METHODS[method]):
        draws = counted.pop("normal_", 0)
        norms = counted.pop("linalg_vector_norm", 0)
        assert draws <= 161 * 2 and norms <= 161
        assert counted.total() <= MOST, counted


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(method: str, name: str) -> None:
    """Neither between outer steps nor at one: a meta tensor raises an error where its value is asked for."""
    own = steps(OPTIMIZERS[name], None, device="meta", tensors=6)  # AdamW's counters are on the host
    found = steps(OPTIMIZERS[name], METHODS[method], device="meta", tensors=6)
    for counted, plain in zip(found, own, strict=True):
        assert all(counted[wait] <= plain[wait] for wait in WAITS)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_wait_would_be_noticed() -> None:
    w = torch.ones(3)
    with Calls() as calls:
        assert w.sum().item() == 3.0
    assert calls.counted["_local_scalar_dense"] == 1
    meta = torch.ones(3, device="meta")
    for wait in (lambda: bool(meta.sum() > 0), meta.tolist, meta.cpu, lambda: torch.ones(3).copy_(meta)):
        with pytest.raises(RuntimeError, match=NO_VALUE):
            wait()
    for data_dependent in (meta.nonzero, meta.unique, lambda: torch.equal(meta, meta), lambda: meta[meta > 0]):
        with pytest.raises(NotImplementedError):
            data_dependent()
    with Calls() as calls:
        w.tolist(), w.numpy(), w.cpu(), w.to("cpu"), w.to(device="cpu")
    assert calls.waits == {"tolist": 1, "numpy": 1, "cpu": 3}
