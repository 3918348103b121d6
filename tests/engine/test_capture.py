"""A loop beside torch.compile, CUDA graphs and learning rates on a device: exact, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.engine.methods_table import METHODS, part
from tests.engine.training import assert_equal, batch, start, values

# Whose compiled step has the numbers of the eager one, with Dynamo's eager backend.
SGD = part(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def train(method: str, make: Any, compiled: str, steps: int = 8) -> tuple[list[Tensor], tuple[int, int], int]:
    """Return the weights, (t, k), and how many graphs were compiled."""
    net, optimizer, loop = start(make, METHODS[method])
    count = CompileCounter()

    def through(closure: Callable[[], Tensor]) -> None:
        optimizer.step(closure)

    take = torch.compile(optimizer.step, backend=count) if compiled == "the optimizer's step" else optimizer.step
    take_through = torch.compile(through, backend=count) if compiled == "a closure" else through

    def training_step(x: Tensor, target: Tensor) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (net(x) - target).square().sum()
            loss.backward()
            return loss

        if compiled == "a closure":
            take_through(closure)
            return x
        loss = closure()
        take()
        return loss

    step = torch.compile(training_step, backend=count) if compiled == "the training step" else training_step
    for i in range(steps):
        step(*batch(i))
    return values(net.parameters()), (loop.outer_step, loop.inner_step), count.frame_count


# Dynamo looks at every tensor it resumes with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compiled", ["the training step", "the optimizer's step", "a closure"])
@pytest.mark.parametrize("method", ["lookahead", "entropy_sgd", "entropy_sgd_coupled", "heat_averaged", "smoothed"])
def test_a_compiled_step_is_the_eager_one(method: str, compiled: str) -> None:
    expected, counted, _ = train(method, SGD, "nothing")
    found, counted_too, _ = train(method, SGD, compiled)
    assert_equal(found, expected)
    assert counted_too == counted


def test_a_capture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay has no host to count steps."""
    _, optimizer, loop = start(SGD, METHODS["lookahead"])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"optimizer.step\(\) must not be captured in a CUDA graph"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"prepare\(\) must not be captured in a CUDA graph"):
        loop.prepare()
    loop.detach()
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_weights_stay_where_a_graph_of_the_module_has_found_them(method: str) -> None:
    net, optimizer, loop = start(SGD, METHODS[method])
    addresses = [p.data_ptr() for p in net.parameters()]
    for i in range(8):
        loop.prepare()
        x, target = batch(i)
        optimizer.zero_grad()
        (net(x) - target).square().sum().backward()
        optimizer.step()
        with loop.at_anchor():
            assert [p.data_ptr() for p in net.parameters()] == addresses
    assert [p.data_ptr() for p in net.parameters()] == addresses
