"""The references against hand calculation, closed forms and torch's own optimizers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.reference import SGD, AdamW, Params


def scalar(value: float) -> Params:
    return [torch.tensor(value, dtype=torch.float64)]


def slope(params: Params, batch: float) -> Params:
    """The batch is the gradient, wherever y is."""
    return [torch.full_like(tensor, batch) for tensor in params]


def bowl(params: Params, batch: Any) -> Params:
    """f = |y|^2 / 2."""
    return [tensor.clone() for tensor in params]


def numbers(params: list[Params]) -> list[float]:
    return [tensors[0].item() for tensors in params]


def close(left: list[Params], right: list[Params], atol: float = 1e-13) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


class Problem:
    """Regression on tensors of several shapes: every batch is its own target."""

    def __init__(self, n_batches: int = 24, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.params = self.gaussian(0, 0)
        self.batches = [self.gaussian(0, i) for i in range(n_batches)]

    def gaussian(self, outer_step: int, inner_step: int) -> Params:
        shapes = [(2, 3), (2,), (2, 2, 1), ()]
        return [torch.randn(shape, generator=self.generator, dtype=torch.float64) for shape in shapes]

    def loss(self, params: Params, batch: Params) -> Tensor:
        return sum(((y - b) ** 2 / 2 + (y * b).sin()).sum() for y, b in zip(params, batch, strict=True))

    def grad(self, params: Params, batch: Params) -> Params:
        params = [tensor.clone().requires_grad_() for tensor in params]
        return list(torch.autograd.grad(self.loss(params, batch), params))

    def train(self, make: Callable[[Params], torch.optim.Optimizer]) -> Iterator[Params]:
        """One step of torch's optimizer per batch."""
        params = [tensor.clone().requires_grad_() for tensor in self.params]
        optimizer = make(params)
        for batch in self.batches:
            optimizer.zero_grad()
            self.loss(params, batch).backward()
            optimizer.step()
            yield [tensor.detach().clone() for tensor in params]


# torch's optimizers


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_torch(nesterov: bool) -> None:
    problem = Problem()
    ours = SGD(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    path = reference.lookahead(
        problem.params, problem.grad, batches=problem.batches, outer_steps=1, inner_steps=24, optimizer=ours, alpha=1.0
    )
    torchs = problem.train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01))
    close(path.iterates[0], list(torchs))
    close(path.anchors, path.iterates[0][-1:])
    assert ours.buffer is None  # the caller's value is left alone


@pytest.mark.parametrize(
    ("decoupled", "theirs"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)], ids=["AdamW", "Adam"]
)
def test_adam_is_torch(decoupled: bool, theirs: type[torch.optim.Optimizer]) -> None:
    problem = Problem()
    ours = AdamW(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, decoupled=decoupled)
    path = reference.lookahead(
        problem.params, problem.grad, batches=problem.batches, outer_steps=24, inner_steps=1, optimizer=ours, alpha=1.0
    )
    torchs = problem.train(lambda p: theirs(p, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1))
    close(path.anchors, list(torchs))


@pytest.mark.parametrize("outer_steps", [1, 8])
def test_momentum_kept_over_outer_steps_is_torch_sgd(outer_steps: int) -> None:
    """With no spring, no noise, the last iterate and outer SGD(lr=1), every method is its inner optimizer."""
    problem = Problem()
    schedule = {"outer_steps": outer_steps, "inner_steps": 24 // outer_steps}
    theirs = list(problem.train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)))
    settings = {"average": 1.0, "momentum": 0.9, "weight_decay": 0.01, "inner_lr": 0.1, "outer_lr": 1.0, **schedule}
    optimizer = SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    paths = [
        reference.entropy_sgd(
            problem.params, problem.grad, batches=problem.batches, reset_momentum=False, gamma=0.0, **settings
        ),
        *(
            reference.parle(
                [problem.params],
                problem.grad,
                batches=[problem.batches],
                gamma=0.0,
                rho=0.0,
                outer_momentum=0.0,
                form=form,
                **settings,
            )[0]
            for form in ("paper", "code")
        ),
        reference.elastic_sgd(
            [problem.params], problem.grad, batches=[problem.batches], optimizer=optimizer, rho=0.7, **schedule
        )[0],
        *reference.local_sgd(
            problem.params, problem.grad, batches=[problem.batches] * 2, optimizer=optimizer, **schedule
        ),
        *reference.diloco(
            problem.params,
            problem.grad,
            batches=[problem.batches] * 2,
            optimizer=optimizer,
            outer_lr=1.0,
            outer_momentum=0.0,
            **schedule,
        ),
    ]
    for path in paths:
        close(reference.flatten_iterates(path), theirs)
        close(path.anchors, theirs[24 // outer_steps - 1 :: 24 // outer_steps])


def test_parameters_are_not_written_to() -> None:
    problem = Problem()
    before = [tensor.clone() for tensor in problem.params]
    path = reference.entropy_sgd(
        problem.params, problem.grad, batches=problem.batches, outer_steps=2, inner_steps=3, inner_lr=0.1, gamma=1.0
    )
    close([problem.params], [before])
    assert [tensor.shape for tensor in path.anchors[0]] == [tensor.shape for tensor in before]


# Entropy-SGD


def test_entropy_sgd_counts_down() -> None:
    path = reference.entropy_sgd(
        scalar(3), slope, batches=[1] * 4, outer_steps=2, inner_steps=2, inner_lr=1, outer_lr=0.5, average=1
    )
    assert numbers(reference.flatten_iterates(path)) == [2, 1, 1, 0]
    assert numbers(path.anchors) == [2, 1]


def test_entropy_sgd_spring_mean_and_scoping() -> None:
    """Slope -4, eta' = 1/2, alpha = 1/2. With gamma = 1: y 2, 3 and mu 1, 2. With gamma = 0: y 2, 4 and mu 1, 2.5."""
    settings = {"batches": [-4] * 4, "inner_steps": 2, "inner_lr": 0.5, "average": 0.5, "gamma": lambda t: t}
    path = reference.entropy_sgd(scalar(0), slope, outer_steps=1, start=1, **settings)
    assert numbers(path.iterates[0]) == [2, 3]
    assert numbers(path.anchors) == [2]
    path = reference.entropy_sgd(scalar(0), slope, outer_steps=2, **settings)
    assert numbers(path.iterates[0]) == [2, 4]
    assert numbers(path.anchors) == [2.5, 4.5]  # gamma is 0, then 1
    path = reference.entropy_sgd(scalar(0), slope, outer_steps=1, start=1, scale_by_gamma=True, outer_lr=3, **settings)
    assert numbers(path.anchors) == [6]


def test_entropy_sgd_momentum() -> None:
    """Slope -1, momentum 1/2: m = -1, -1.5; Nesterov directions -1.5, -1.75; zeroed or kept; weight decay on top."""
    settings = {"batches": [-1] * 4, "inner_lr": 1, "average": 1, "momentum": 0.5, "outer_steps": 2}
    path = reference.entropy_sgd(scalar(0), slope, inner_steps=2, **settings)
    assert numbers(reference.flatten_iterates(path)) == [1.5, 3.25, 4.75, 6.5]
    path = reference.entropy_sgd(scalar(0), slope, inner_steps=1, reset_momentum=False, **settings)
    assert numbers(path.anchors) == [1.5, 3.25]
    path = reference.entropy_sgd(scalar(0), slope, inner_steps=1, nesterov=False, outer_momentum=0.5, **settings)
    assert numbers(path.anchors) == [1.5, 3.25]  # the outer loop's Nesterov on two pseudo-gradients of -1
    path = reference.entropy_sgd(scalar(2), slope, inner_steps=1, weight_decay=1.0, **settings)
    assert numbers(path.iterates[0]) == [2 - 1.5 * (2 - 1)]


def test_entropy_sgd_noise() -> None:
    """sqrt(4) * 0.5 * draw, outside the momentum; the draws are asked for by (outer step, inner step)."""
    asked = []

    def gaussian(outer_step: int, inner_step: int) -> Params:
        asked.append((outer_step, inner_step))
        return scalar(1 + inner_step)

    settings = {"batches": [0] * 4, "outer_steps": 2, "inner_steps": 2, "inner_lr": 4, "average": 1, "momentum": 0.9}
    path = reference.entropy_sgd(scalar(0), slope, noise=0.5, gaussian=gaussian, start=7, **settings)
    assert numbers(reference.flatten_iterates(path)) == [1, 3, 4, 6]
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1)]
    reference.entropy_sgd(scalar(0), slope, noise=0.0, gaussian=gaussian, **settings)
    assert len(asked) == 4


def test_entropy_sgd_settles_at_the_proximal_point() -> None:
    """f = h y^2 / 2: y -> gamma x / (h + gamma), so x - y -> h x / (h + gamma)."""
    h = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for momentum, average in [(0.0, 1.0), (0.9, 1.0), (0.9, 0.25)]:
        path = reference.entropy_sgd(
            [x],
            lambda params, batch: [h * params[0]],
            batches=range(2000),
            outer_steps=1,
            inner_steps=2000,
            inner_lr=0.1,
            gamma=2.0,
            momentum=momentum,
            average=average,
        )
        torch.testing.assert_close(path.anchors[0][0], 2 * x / (h + 2), rtol=0, atol=1e-12)


# The released optimizers


def test_released_pytorch() -> None:
    """L = 2, momentum 1/2, gamma = 1; the batch of 100 is the discarded one.

    m = 4, d = 6, y = -6, mu = -1.5; m = 6, d = 7, spring -6, y = -7, mu = -2.875; outer Nesterov 1.5 * 2.875.
    """
    settings = {"outer_steps": 1, "inner_steps": 2, "inner_lr": 1, "outer_lr": 1, "momentum": 0.5, "noise": 0.0}
    path = reference.entropy_sgd_released(scalar(0), slope, batches=[100, 4, 4], gamma=1, **settings)
    assert numbers(path.iterates[0]) == [-6, -7]
    assert numbers(path.anchors) == [-4.3125]
    path = reference.entropy_sgd_released(scalar(0), slope, batches=[100, 4, 4], gamma=1, lua=True, **settings)
    assert numbers(path.iterates[0]) == [-6, -7]
    assert numbers(path.anchors) == [-2.875]


def test_released_weight_decay() -> None:
    """PyTorch: d = 1.5 (4 + 2); y = -7; mu = -0.25; outer 1.5 (2.25 + 2). Lua: d = 1.5 * 4 + 2; y = -6; mu = 0."""
    settings = {"outer_steps": 1, "inner_steps": 1, "inner_lr": 1, "outer_lr": 1, "momentum": 0.5, "noise": 0.0}
    settings |= {"weight_decay": 1.0, "batches": [0, 4], "gamma": 3.0}
    path = reference.entropy_sgd_released(scalar(2), slope, **settings)
    assert (numbers(path.iterates[0]), numbers(path.anchors)) == ([-7], [-4.375])
    path = reference.entropy_sgd_released(scalar(2), slope, lua=True, **settings)
    assert (numbers(path.iterates[0]), numbers(path.anchors)) == ([-6], [0])


def test_released_counts_and_noise() -> None:
    seen: list[int] = []
    settings = {"outer_steps": 3, "inner_steps": 1, "inner_lr": 2, "outer_lr": 0.0, "batches": [0] * 6}
    for lua in (False, True):
        path = reference.entropy_sgd_released(
            scalar(0),
            slope,
            gamma=lambda t: seen.append(t) or 0.0,
            noise=0.5,
            gaussian=lambda outer_step, inner_step: scalar(3),
            lua=lua,
            **settings,
        )
        assert numbers(reference.flatten_iterates(path)) == [3, 3, 3]  # sqrt(2 * 2) * 0.5 * 3
    assert seen == [0, 0, 0, 1, 2, 3]


# Hamilton-Jacobi


def test_fixed_point_by_eye() -> None:
    """f = y^2 / 2, time 1, damping 1/2, x = 4: p = 4, then 0.5 * 4 + 0.5 * 0 = 2, the fixed point x / (1 + t)."""
    settings = {"batches": range(9), "outer_steps": 1, "inner_steps": 2, "gamma": 1.0, "damping": 0.5}
    path = reference.hamilton_jacobi_fixed_point(scalar(4), bowl, outer_lr=1, **settings)
    assert numbers(path.iterates[0]) == [0, 2, 2]
    assert numbers(path.anchors) == [2]
    path = reference.hamilton_jacobi_fixed_point(scalar(4), bowl, outer_lr=1, outer_momentum=0.5, **settings)
    assert numbers(path.anchors) == [1]


def test_fixed_point_is_the_gradient_of_the_envelope() -> None:
    """p -> (I + H / gamma)^-1 H x; the damped map converges for H / gamma up to 7, weight decay added to H."""
    h = torch.tensor([0.5, 1.0, 12.0], dtype=torch.float64)
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    path = reference.hamilton_jacobi_fixed_point(
        [x],
        lambda params, batch: [h * params[0]],
        batches=range(500),
        outer_steps=1,
        inner_steps=400,
        outer_lr=0.5,
        gamma=2.0,
        weight_decay=0.5,
    )
    p = (h + 0.5) * x / (1 + (h + 0.5) / 2)
    torch.testing.assert_close(path.anchors[0][0], x - 0.5 * p, rtol=0, atol=1e-12)


def test_fixed_point_is_the_coupled_loop() -> None:
    """After the first evaluation, y = x - p / gamma follows SGD(lr = damping / gamma) on f plus the spring."""
    problem = Problem()
    settings = {"outer_steps": 1, "gamma": 5.0}
    path = reference.hamilton_jacobi_fixed_point(
        problem.params, problem.grad, batches=problem.batches, inner_steps=20, outer_lr=0.0, **settings
    )
    x, y = problem.params, path.iterates[0][0]
    for batch, want in zip(problem.batches[1:21], path.iterates[0][1:], strict=True):
        g = problem.grad(y, batch)
        y = [yi - 0.25 / 5 * (gi + 5 * (yi - xi)) for xi, yi, gi in zip(x, y, g, strict=True)]
        close([y], [want])


# Replicas


@pytest.mark.parametrize(("form", "anchors"), [("paper", [2, 3]), ("code", [2.25, 3.25])])
def test_parle_by_eye(form: str, anchors: list[float]) -> None:
    """x = 0, 4; y = 2, 4; z = 1, 4; rho 1/2. Mean of the old x: 2 for the paper; mean of z: 2.5 for the code."""
    settings = {"outer_steps": 1, "inner_steps": 1, "inner_lr": 1, "outer_lr": 1, "average": 0.5, "gamma": 7.0}
    paths = reference.parle(
        [scalar(0), scalar(4)],
        slope,
        batches=[[-2], [0]],
        rho=0.5,
        form=form,
        momentum=0.0,
        outer_momentum=0.0,
        **settings,
    )
    assert [numbers(path.iterates[0]) for path in paths] == [[2], [4]]
    assert [numbers(path.anchors)[0] for path in paths] == anchors
    assert numbers(reference.consensus(paths)) == [sum(anchors) / 2]


def test_parle_scoping_starts_where_its_source_does() -> None:
    seen: list[int] = []
    settings = {
        "outer_steps": 2,
        "inner_steps": 1,
        "inner_lr": 1,
        "outer_lr": 1,
        "gamma": lambda t: seen.append(t) or 0,
    }
    for form in ("paper", "code"):
        reference.parle([scalar(0)], slope, batches=[[0, 0]], rho=0.0, form=form, **settings)
    assert seen == [0, 1, 1, 2]


@pytest.mark.parametrize(("form", "multiplier"), [("paper", 1.0), ("code", 1.5)])
def test_parle_mean_moves_by_the_pseudo_gradient(form: str, multiplier: float) -> None:
    """In the mean over replicas: x <- x - eta (x - z), times (1 + rho) in the code's form. Here z = y_L."""
    problems = [Problem(seed=seed) for seed in range(3)]
    paths = reference.parle(
        [problem.params for problem in problems],
        problems[0].grad,
        batches=[problem.batches for problem in problems],
        outer_steps=4,
        inner_steps=6,
        inner_lr=0.1,
        outer_lr=0.4,
        gamma=0.3,
        rho=0.5,
        average=1.0,
        outer_momentum=0.0,
        form=form,
    )
    start = [reference.Path([problem.params], []) for problem in problems]
    before = reference.consensus(start) + reference.consensus(paths)[:-1]
    ends = [reference.Path([ys[-1] for ys in path.iterates], []) for path in paths]
    for x, z, after in zip(before, reference.consensus(ends), reference.consensus(paths), strict=True):
        want = [xi - 0.4 * multiplier * (xi - zi) for xi, zi in zip(x, z, strict=True)]
        close([after], [want])


def test_one_replica_of_parle_is_entropy_sgd() -> None:
    problem = Problem()
    settings = {"outer_steps": 4, "inner_steps": 6, "inner_lr": 0.1, "outer_lr": 0.5, "gamma": lambda t: 0.1 * 2**t}
    settings |= {"average": 0.25, "momentum": 0.9, "outer_momentum": 0.9, "weight_decay": 0.01}
    (path,) = reference.parle([problem.params], problem.grad, batches=[problem.batches], rho=3.0, **settings)
    want = reference.entropy_sgd(
        problem.params, problem.grad, batches=problem.batches, reset_momentum=False, **settings
    )
    close(path.anchors, want.anchors)
    close(reference.flatten_iterates(path), reference.flatten_iterates(want))


def test_elastic_sgd_by_eye() -> None:
    """x = 0, 4 and centre 2; two local steps move replica 0 by 2. Then half, or all, of the way to the old centre."""
    settings = {"batches": [[-1, -1], [0, 0]], "outer_steps": 1, "inner_steps": 2, "optimizer": SGD(lr=1.0)}
    paths = reference.elastic_sgd([scalar(0), scalar(4)], slope, rho=0.5, **settings)
    assert [numbers(path.iterates[0]) for path in paths] == [[1, 2], [4, 4]]
    assert [numbers(path.anchors) for path in paths] == [[3], [3]]
    paths = reference.elastic_sgd([scalar(0), scalar(4)], slope, rho=1.0, **settings)
    assert [numbers(path.anchors) for path in paths] == [[4], [2]]


def test_elastic_sgd_without_inner_loop() -> None:
    """Forces -1 + 0.5 (0 - 2) = -2 and 0.5 (4 - 2) = 1; with one replica, torch's SGD."""
    settings = {"outer_steps": 1, "inner_steps": 0, "rho": lambda t: 0.5 * t}
    replicas, batches = [scalar(0), scalar(4)], [[-1], [0]]
    paths = reference.elastic_sgd(replicas, slope, batches=batches, optimizer=SGD(lr=1.0), **settings)
    assert [numbers(path.anchors) for path in paths] == [[2], [3]]
    paths = reference.elastic_sgd(
        replicas, slope, batches=batches, optimizer=SGD(lr=1.0, momentum=0.5, nesterov=True), **settings
    )
    assert [numbers(path.anchors) for path in paths] == [[3], [2.5]]
    problem = Problem()
    (path,) = reference.elastic_sgd(
        [problem.params],
        problem.grad,
        batches=[problem.batches],
        outer_steps=24,
        inner_steps=0,
        rho=2.0,
        optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True),
    )
    close(path.anchors, list(problem.train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))))


# Two time scales, Lookahead, local SGD, DiLoCo


def test_two_timescale_by_eye() -> None:
    """3 -> 2, half way back to 3, x half way to that; y goes on from where it is: 2.5 -> 1.5, half way to 2.75."""
    path = reference.two_timescale(
        scalar(3), slope, batches=[1] * 2, steps=2, optimizer=SGD(lr=1.0), gamma=1.0, slow_lr=0.5
    )
    assert numbers(reference.flatten_iterates(path)) == [2.5, 2.125]
    assert numbers(path.anchors) == [2.75, 2.4375]


def test_lookahead_by_eye() -> None:
    """3 -> 2 -> 1 -> 2 (slow) -> 1 -> 0 -> 1 (slow); with heavy-ball momentum 1, kept: steps 1, 2, (slow) 3, 4."""
    settings = {"batches": [1] * 4, "outer_steps": 2, "inner_steps": 2, "alpha": 0.5}
    path = reference.lookahead(scalar(3), slope, optimizer=SGD(lr=1.0), **settings)
    assert (numbers(reference.flatten_iterates(path)), numbers(path.anchors)) == ([2, 1, 1, 0], [2, 1])
    path = reference.lookahead(scalar(3), slope, optimizer=SGD(lr=1.0, momentum=1.0), **settings)
    assert (numbers(reference.flatten_iterates(path)), numbers(path.anchors)) == ([2, 0, -1.5, -5.5], [1.5, -2])
    path = reference.lookahead(scalar(3), slope, optimizer=SGD(lr=1.0, momentum=1.0), reset_optimizer=True, **settings)
    assert (numbers(reference.flatten_iterates(path)), numbers(path.anchors)) == ([2, 0, 0.5, -1.5], [1.5, 0])


def test_local_sgd_by_eye() -> None:
    """Workers with slopes 1 and 3 meet in the middle: 8 -> (6, 2) -> 4 -> (2, -2) -> 0."""
    paths = reference.local_sgd(
        scalar(8), slope, batches=[[1] * 4, [3] * 4], outer_steps=2, inner_steps=2, optimizer=SGD(lr=1.0)
    )
    assert [numbers(path.anchors) for path in paths] == [[4, 0], [4, 0]]
    assert [numbers(reference.flatten_iterates(path)) for path in paths] == [[7, 6, 3, 2], [5, 2, 1, -2]]


def test_diloco_by_eye() -> None:
    """Pseudo-gradients 4 and 4, m = 4 and 6, momentum 1/2, eta 1/2: steps 3 and 3.5."""
    settings = {"outer_steps": 2, "inner_steps": 2, "optimizer": SGD(lr=1.0), "outer_lr": 0.5, "outer_momentum": 0.5}
    paths = reference.diloco(scalar(8), slope, batches=[[1] * 4, [3] * 4], **settings)
    assert [numbers(path.anchors) for path in paths] == [[5, 1.5], [5, 1.5]]


def test_diloco_is_torch_adamw_inside_torch_sgd() -> None:
    problems = [Problem(seed=seed) for seed in range(2)]
    paths = reference.diloco(
        problems[0].params,
        problems[0].grad,
        batches=[problem.batches for problem in problems],
        outer_steps=4,
        inner_steps=6,
        optimizer=AdamW(lr=0.05, weight_decay=0.1),
    )
    x = [tensor.clone().requires_grad_() for tensor in problems[0].params]
    outer = torch.optim.SGD(x, lr=0.7, momentum=0.9, nesterov=True)
    workers = [[tensor.detach().clone().requires_grad_() for tensor in x] for _ in problems]
    inners = [torch.optim.AdamW(worker, lr=0.05, weight_decay=0.1) for worker in workers]
    anchors = []
    for t in range(4):
        for worker, inner, problem in zip(workers, inners, problems, strict=True):
            with torch.no_grad():
                for y, xi in zip(worker, x, strict=True):
                    y.copy_(xi)
            for batch in problem.batches[6 * t : 6 * t + 6]:
                inner.zero_grad()
                problem.loss(worker, batch).backward()
                inner.step()
        for i, xi in enumerate(x):
            xi.grad = sum(xi.detach() - worker[i].detach() for worker in workers) / 2
        outer.step()
        anchors.append([xi.detach().clone() for xi in x])
    for path in paths:
        close(path.anchors, anchors)


# Heat


def test_heat_by_eye() -> None:
    """f = y^2 / 2 at x = 8, kernel's deviation 2, draws 1 and 3: gradients 10 and 14, mean 12, half a step."""
    settings = {"batches": range(2), "outer_steps": 1, "inner_steps": 2, "gamma": 0.25}
    settings |= {"gaussian": lambda outer_step, inner_step: scalar(1 + 2 * inner_step)}
    path = reference.heat(scalar(8), bowl, optimizer=SGD(lr=0.5), **settings)
    assert (numbers(path.iterates[0]), numbers(path.anchors)) == ([10, 14], [2])
    path = reference.heat(scalar(8), bowl, optimizer=SGD(lr=0.5, weight_decay=0.5), **settings)
    assert numbers(path.anchors) == [0]  # the decay acts at x: 12 + 0.5 * 8


def test_heat_without_spread_is_torch_sgd() -> None:
    problem = Problem()
    path = reference.heat(
        problem.params,
        problem.grad,
        batches=problem.batches,
        outer_steps=24,
        inner_steps=1,
        gamma=1e40,
        gaussian=problem.gaussian,
        optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True),
    )
    close(path.anchors, list(problem.train(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))))


def test_filter_normalized_noise() -> None:
    """Norms: rows 5 and 0 of the matrix, 3 of the vector, 13 of the one filter of the kernel, 2 of the scalar."""
    params = [
        torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64),
        torch.tensor([[[[5.0], [12.0]]]], dtype=torch.float64),
        torch.tensor(-2.0, dtype=torch.float64),
    ]
    path = reference.heat(
        params,
        bowl,
        batches=[0],
        outer_steps=1,
        inner_steps=1,
        gamma=0.25,
        gaussian=lambda outer_step, inner_step: [torch.ones_like(tensor) for tensor in params],
        filter_normalized=True,
        optimizer=SGD(lr=1.0),
    )
    want = [[[10.0, 10.0], [0.0, 0.0]], [6.0, 6.0, 6.0], [[[[26.0], [26.0]]]], 4.0]
    shifts = [y - x for x, y in zip(params, path.iterates[0][0], strict=True)]
    assert [shift.tolist() for shift in shifts] == want
    assert [(-x).tolist() for x in path.anchors[0]] == want  # x - (x + shift)


def test_average_of_smoothed_gradients() -> None:
    """E sin'(x + s N) = exp(-s^2 / 2) cos x: the heat kernel in closed form."""
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    draws = torch.randn(n, generator=generator, dtype=torch.float64)
    draws = torch.cat([draws, -draws])
    path = reference.heat(
        [torch.full((2 * n,), 0.5, dtype=torch.float64)],
        lambda params, batch: [params[0].cos().mean().expand(2 * n)],
        batches=[0],
        outer_steps=1,
        inner_steps=1,
        gamma=4.0,
        gaussian=lambda outer_step, inner_step: [draws],
        optimizer=SGD(lr=1.0),
    )
    want = 0.5 - torch.exp(torch.tensor(-0.125, dtype=torch.float64)) * torch.tensor(0.5, dtype=torch.float64).cos()
    torch.testing.assert_close(path.anchors[0][0][0], want, rtol=0, atol=1e-3)


# A chain on the smoothed loss


def test_smoothed_chain_by_eye() -> None:
    """f = y^2 / 2, x = 4, width 2: perturbed by 2 to 6; lr 1/2: 4 - 3 = 1; k = 1: (1 + 4) / 2 = 5/2; z half of it.

    Then by 4 to 13/2: 5/2 - 13/4 = -3/4; spring: (4 - 3/4) / 2 = 13/8; noise sqrt(1/2) noise sqrt(2) = 1 each time:
    so 7/2 first, z = 15/4; then 15/2: 7/2 - 15/4 = -1/4; 15/8; 23/8; z = 53/16.
    """
    settings = {"batches": [range(2)], "outer_steps": 1, "inner_steps": 2, "optimizer": SGD(lr=0.5), "gamma": 2.0}
    settings |= {"width": 2.0, "perturbations": [lambda t, k: scalar(1 + k)], "average": 0.5}
    (path,) = reference.smoothed_chain([scalar(4)], bowl, **settings)
    assert (numbers(path.iterates[0]), numbers(path.anchors)) == ([2.5, 1.625], [2.4375])
    settings |= {"noise": 1.0, "gaussians": [lambda t, k: scalar(2**0.5)]}
    (path,) = reference.smoothed_chain([scalar(4)], bowl, **settings)
    assert numbers(path.iterates[0]) == pytest.approx([3.5, 2.875], abs=1e-15)
    assert numbers(path.anchors) == pytest.approx([3.3125], abs=1e-15)


def test_smoothed_chain_scales_by_the_norms_of_the_perturbed_y() -> None:
    """One filter: the norm is |y|. 4 -> perturbed by 1/2 * 4 to 6 -> 1; perturbed by 1/2 * 1 to 3/2 -> 1/4."""
    (path,) = reference.smoothed_chain(
        [scalar(4)], bowl, batches=[range(2)], outer_steps=1, inner_steps=2, optimizer=SGD(lr=0.5), width=0.5,
        perturbations=[lambda t, k: scalar(1)], filter_normalized=True,
    )  # fmt: skip
    assert numbers(path.iterates[0]) == [1, 0.25]


def test_smoothed_chain_with_outer_momentum_by_eye() -> None:
    """Pseudo-gradients 2 and 2 (the slope is 1), eta 1, Nesterov 1/2: 16 - 3 = 13, then 13 - 3.5."""
    (path,) = reference.smoothed_chain(
        [scalar(16)], slope, batches=[[1] * 4], outer_steps=2, inner_steps=2, optimizer=SGD(lr=1.0), width=9.0,
        perturbations=[lambda t, k: scalar(1)], outer_momentum=0.5,
    )  # fmt: skip
    assert numbers(path.anchors) == [13, 9.5]


@pytest.mark.parametrize(
    ("target", "rho", "anchors"),
    [("anchor", 0.5, [3.0, 7.0]), ("average", 0.5, [2.5, 6.5]), ("pseudo_gradient", 0.0, [3.0, 7.0])],
)
def test_smoothed_chain_of_replicas_by_eye(target: str, rho: float, anchors: list[float]) -> None:
    """x = 4, 8 and z = 2, 8 (slopes 2 and 0).

    Half of the way to the mean of x, 6, is +1 and -1; to the mean of z, 5, it is +1/2 and -3/2; the mean of x - z is 1.
    """
    paths = reference.smoothed_chain(
        [scalar(4), scalar(8)], slope, batches=[[2], [0]], outer_steps=1, inner_steps=1, optimizer=SGD(lr=1.0),
        width=1.0, perturbations=[lambda t, k: scalar(1)] * 2, rho=rho, target=target,
    )  # fmt: skip
    assert [numbers(path.anchors)[0] for path in paths] == anchors


def test_smoothed_chain_without_width_is_the_chain() -> None:
    problem = Problem()
    settings = {"outer_steps": 4, "inner_steps": 6}
    (path,) = reference.smoothed_chain(
        [problem.params], problem.grad, batches=[problem.batches], optimizer=AdamW(0.05), width=0.0, outer_lr=0.5,
        perturbations=[problem.gaussian], **settings,
    )  # fmt: skip
    want = reference.lookahead(
        problem.params, problem.grad, batches=problem.batches, optimizer=AdamW(0.05), alpha=0.5, **settings
    )
    close(path.anchors, want.anchors)
    close(reference.flatten_iterates(path), reference.flatten_iterates(want))
