"""The way in refuses what cannot work, and leaves the optimizer alone."""

import functools
from typing import Any

import pytest
import torch

import lightning_entropy as le


def test_sparse_adam_takes_no_mean_of_gradients() -> None:
    optimizer = torch.optim.SparseAdam(torch.nn.Embedding(5, 2, sparse=True).parameters())
    with pytest.raises(ValueError, match="inner_steps must be 1 for the heat variant with SparseAdam"):
        le.relax(optimizer, le.heat(3))
    le.relax(optimizer, le.heat(1))


def test_relax_refuses_nonsense() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got str"):
        le.relax("sgd", le.lookahead())  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"relaxation must be a Relaxation, as .*, got 'lookahead': a method is a value"
    ):
        le.relax(optimizer, "lookahead")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"outer must return a torch\.optim\.Optimizer.*, got list"):
        le.relax(optimizer, le.lookahead(), outer=lambda params: params)  # type: ignore[arg-type, return-value]
    for seed, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError), ("0", TypeError)):
        with pytest.raises(error, match=f"seed must be an int >= 0, got {seed!r}"):
            le.relax(optimizer, le.lookahead(), seed=seed)  # type: ignore[arg-type]
    lbfgs = torch.optim.LBFGS([w])
    with pytest.raises(ValueError, match="coupled must be False with LBFGS"):
        le.relax(lbfgs, le.entropy_sgd(coupled=True))
    with pytest.raises(ValueError, match="inner_steps must be 1 for the heat variant with LBFGS, got 2"):
        le.relax(lbfgs, le.heat(inner_steps=2))
    with pytest.raises(ValueError, match="outer has no meaning with perturb=True"):
        le.relax(optimizer, le.heat(), outer=torch.optim.Adam)
    with pytest.raises(ValueError, match="replica_mean has no meaning with perturb=True"):
        le.relax(optimizer, le.heat(), replica_mean=lambda tensors: tensors)
    # Every refusal left the optimizer alone.
    assert not optimizer._optimizer_step_pre_hooks
    assert not lbfgs._optimizer_step_pre_hooks
    le.relax(optimizer, le.lookahead()).detach()


class NoRate(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad)


def test_a_spring_needs_a_learning_rate() -> None:
    optimizer = NoRate([torch.nn.Parameter(torch.ones(2))])
    for relaxation in (le.hamilton_jacobi(), le.Relaxation(noise=0.1)):
        with pytest.raises(ValueError, match="optimizer must have an 'lr' in every param group"):
            le.relax(optimizer, relaxation)
    le.relax(optimizer, le.lookahead())


def test_every_argument_arrives() -> None:
    w = torch.nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    relaxation = le.elastic_sgd(1, 0.5)
    outer = functools.partial(torch.optim.SGD, lr=0.5)
    loop = le.relax(optimizer, relaxation, outer=outer, replica_mean=lambda xs: [x / 2 for x in xs], seed=11)
    assert loop.optimizer is optimizer
    assert loop.relaxation is relaxation
    assert loop.state_dict()["seed"] == 11
    w.grad = torch.ones(1)
    optimizer.step()
    assert w.item() == 6.5  # 8 - (1 + (8 - 4) / 2) / 2


def test_what_only_a_perturbing_chain_may_have() -> None:
    """It has an anchor and outer steps, unlike the heat equation, and LBFGS may have it, unlike a mean of gradients."""
    w = torch.nn.Parameter(torch.ones(2))
    chain = le.Relaxation(inner_steps=3, gamma=0.5, width=0.1)
    le.relax(torch.optim.SGD([w], lr=0.1), chain, outer=torch.optim.Adam, replica_mean=lambda xs: xs)
    le.relax(torch.optim.LBFGS([w]), chain)
    le.relax(NoRate([w]), le.Relaxation(inner_steps=3, width=0.1))
    with pytest.raises(ValueError, match="optimizer must have an 'lr' in every param group"):
        le.relax(NoRate([w]), chain)
    with pytest.raises(ValueError, match="explicit must be False with LBFGS"):
        le.relax(torch.optim.LBFGS([w]), le.Relaxation(gamma=0.5, explicit=True, width=0.1))
    with pytest.raises(TypeError, match="compile must be True or False, got 1"):
        le.relax(torch.optim.SGD([w], lr=0.1), chain, compile=1)  # type: ignore[arg-type]
