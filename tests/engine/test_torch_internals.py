"""What the engine takes from torch's private names is still what it takes it for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_entropy.engine import torch_internals


class Twice(torch.optim.SGD):
    """Its step is torch's step within a step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Between(Twice):
    """Three of them."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def parameter() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return p


def test_the_hooks_of_an_optimizer() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=0.1)
    assert torch_internals.step_hooks(optimizer) == []

    def before(*_: Any) -> None: ...

    def after(*_: Any) -> None: ...

    handles = [optimizer.register_step_post_hook(after), optimizer.register_step_pre_hook(before)]
    assert torch_internals.step_hooks(optimizer) == [before, after]
    handles[0].remove()
    assert torch_internals.step_hooks(optimizer) == [before]


def test_an_object_without_hooks_has_none() -> None:
    class NoOptimizer:
        pass

    assert torch_internals.step_hooks(NoOptimizer()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "depth"), [(torch.optim.SGD, 1), (Twice, 2), (Between, 3)])
def test_the_steps_on_the_stack_are_counted(kind: Callable[..., torch.optim.Optimizer], depth: int) -> None:
    """torch wraps the step of every class that was instantiated once, so the hooks of a subclass fire at each level."""
    for cls in (torch.optim.SGD, Twice, Between):
        cls([parameter()], lr=0.1)
    optimizer, other = kind([parameter()], lr=0.1), torch.optim.SGD([parameter()], lr=0.1)
    seen: list[int] = []

    def count(*_: Any) -> None:
        seen.append(torch_internals.running_steps(optimizer))
        assert torch_internals.running_steps(other) == 0

    optimizer.register_step_pre_hook(count)
    optimizer.step()
    assert seen == list(range(1, depth + 1))
    seen.clear()

    def closure() -> torch.Tensor:
        other.step(within)
        return torch.zeros(())

    def within() -> torch.Tensor:
        assert torch_internals.running_steps(optimizer) == depth
        assert torch_internals.running_steps(other) == 1
        return torch.zeros(())

    optimizer.step(closure)
    assert torch_internals.running_steps(optimizer) == 0


def test_a_version_counts_writes_in_place() -> None:
    p = parameter()
    first = torch_internals.version(p)
    _ = p * 2
    p.grad = torch.zeros(2)
    assert torch_internals.version(p) == first
    with torch.no_grad():
        p.add_(1)
        assert torch_internals.version(p) == first + 1
        p.view(-1)[0] = 5.0  # through a view
        p[1:].zero_()
    assert torch_internals.version(p) == first + 3
    torch._foreach_add_([p.detach()], 1.0)
    assert torch_internals.version(p) == first + 4
    torch.autograd.graph.increment_version([p])
    assert torch_internals.version(p) == first + 5


def test_a_write_through_data_is_not_counted() -> None:
    """As the perturbation's documentation says."""
    p = parameter()
    first = torch_internals.version(p)
    p.data.add_(1)
    assert torch_internals.version(p) == first
