"""The share of a path that the spring takes back, against the steps written out, and against other solvers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch

import lightning_entropy as le
from lightning_entropy.methods.pull import share_of, stiffness_of

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("inner_steps", [1, 2, 20])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_loop_of_equal_updates_goes_the_rest_of_its_way(share: float, inner_steps: int, name: str) -> None:
    """Under a gradient that is the same at every step SGD's updates are equal, and AdamW's too."""
    ends = []
    for gamma in (0.0, le.Pull(share)):
        w = torch.nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
        optimizer = OPTIMIZERS[name]([w])
        le.relax(optimizer, le.Relaxation(inner_steps=inner_steps, gamma=gamma))
        for _ in range(inner_steps):
            w.grad = torch.tensor([2.0, -0.5], dtype=torch.float64)
            optimizer.step()
        ends.append(w.detach() - torch.tensor([3.0, -1.0], dtype=torch.float64))
    free, held = ends
    assert free.abs().min() > 0
    torch.testing.assert_close(held, (1 - share) * free, rtol=1e-7, atol=0)


@pytest.mark.parametrize("inner_steps", [1, 5, 500])
@pytest.mark.parametrize("stiffness", [1e-4, 0.03, 1.0, 50.0])
def test_the_share_is_that_of_the_steps_written_out(stiffness: float, inner_steps: int) -> None:
    y = 0.0
    for _ in range(inner_steps):
        y = (y + 1.0) / (1 + stiffness)
    assert share_of(stiffness, inner_steps) == pytest.approx(1 - y / inner_steps, rel=1e-9)


@pytest.mark.parametrize("inner_steps", [1, 20, 1000])
@pytest.mark.parametrize("share", [1e-6, 0.03, 0.5, 0.999])
def test_the_stiffness_is_another_solvers(share: float, inner_steps: int) -> None:
    found = scipy.optimize.brentq(lambda u: share_of(math.exp(u), inner_steps) - share, -30.0, 30.0, xtol=1e-14)
    assert stiffness_of(share, inner_steps) == pytest.approx(math.exp(found), rel=1e-6)
    assert stiffness_of(0.0, inner_steps) == 0.0


def test_one_step_is_by_hand() -> None:
    assert le.Pull(0.75).stiffness(0, inner_steps=1) == pytest.approx(3.0, rel=1e-12)  # y <- (y + u + 3 x) / 4


def test_the_papers_gamma_holds_back_three_per_cent() -> None:
    assert share_of(0.1 * 0.03, 20) == pytest.approx(0.03, abs=2e-3)


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan, math.inf])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"^share must be in \[0, 1\), got "):
        le.Pull(share)
    with pytest.raises(ValueError, match=r"^share\(t=3\) must be in \[0, 1\), got "):
        le.Pull(lambda t: share).stiffness(3, inner_steps=2)
    with pytest.raises(TypeError, match=r"^share must be"):
        le.Pull("half")  # type: ignore[arg-type]


def test_the_learning_rate_changes_nothing_and_need_not_be_there() -> None:
    """A group without a rate is refused for a gamma, which needs one."""

    class Plain(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1.0)
            for group in self.param_groups:
                group.pop("lr")

    w = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="'lr'"):
        le.relax(Plain([w]), le.Relaxation(gamma=0.5))
    le.relax(Plain([w]), le.Relaxation(gamma=le.Pull(0.5)))
