"""Where the answer is known: paths one can follow by eye, quadratics, proximal points, smoothed functions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

import lightning_entropy as le

DTYPE = torch.float64


def run(
    start: Any,
    gradient: Callable[[Tensor], Tensor],
    relaxation: le.Relaxation,
    steps: int,
    *,
    lr: float = 1.0,
    **sgd: Any,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """SGD with given gradients: y, x and z after every step."""
    w = torch.nn.Parameter(torch.as_tensor(start, dtype=DTYPE).clone())
    optimizer = torch.optim.SGD([w], lr=lr, **sgd)
    loop = le.relax(optimizer, relaxation, seed=0)
    loop.begin()
    ys, xs, zs = [], [], []
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
        ys.append(w.detach().clone())
        xs.append(loop.anchor[0].clone())
        zs.append(loop.average[0].clone())
    return ys, xs, zs


def numbers(tensors: list[Tensor]) -> list[float]:
    return [t.item() for t in tensors]


# Paths: the gradient is 1 and lr is 1, so the optimizer goes down by 1


def test_path_of_lookahead() -> None:
    """3 -> 2 -> 1, half way back to 2 -> 1 -> 0, half way back to 1."""
    ys, xs, _ = run(3.0, torch.ones_like, le.lookahead(2, 0.5), 4)
    assert numbers(ys) == [2, 2, 1, 1]
    assert numbers(xs) == [3, 2, 2, 1]


def test_path_of_the_spring() -> None:
    """gamma = 1 halves the distance to the anchor: 8 -> 7 -> 7.5; -> 6.5 -> 7.25; outer 7.25 -> 6.25 -> 6.75."""
    ys, xs, _ = run(8.0, torch.ones_like, le.hamilton_jacobi(2, 1.0), 3)
    assert numbers(ys) == [7.5, 7.25, 6.75]
    assert numbers(xs) == [8, 7.25, 7.25]


def test_path_of_the_running_mean() -> None:
    """y: 8, 7, 6, 5; z with weight 1/2: 8 -> 7.5 -> 6.75 -> 5.875, which is the next anchor."""
    ys, xs, zs = run(8.0, torch.ones_like, le.entropy_sgd(3, 0.0, 0.0, 0.5), 4)
    assert numbers(zs) == [7.5, 6.75, 5.875, 5.375]
    assert numbers(xs) == [8, 8, 5.875, 5.875]
    assert numbers(ys) == [7, 6, 5.875, 4.875]


def test_path_of_the_coupled_and_the_explicit_spring() -> None:
    """At y = x there is no force; then gamma = 1/2 of the distance: 8 -> 7 -> 7 + 1/2 - 1."""
    for form in ("coupled", "explicit"):
        ys, _, _ = run(8.0, torch.ones_like, le.Relaxation(inner_steps=9, gamma=0.5, **{form: True}), 3)
        assert numbers(ys) == [7, 6.5, 6.25]


def test_path_with_momentum_inside_or_outside() -> None:
    """Momentum 1/2, and the force 1/2 of the distance, which is 0, 1, 2 before the three steps.

    Coupled, it is in the buffer: 1, then 1/2 + 1 - 1/2 = 1, then 1/2 + 1 - 1 = 1/2.
    Explicit, the buffer is 1, 3/2, 7/4, and the pull beside it 0, 1/2, 1.
    """
    for form, path in (("coupled", [7, 6, 5.5]), ("explicit", [7, 6, 5.25])):
        relaxation = le.Relaxation(inner_steps=9, gamma=0.5, **{form: True})
        ys, _, _ = run(8.0, torch.ones_like, relaxation, 3, momentum=0.5)
        assert numbers(ys) == path


def test_path_of_momentum_kept_or_zeroed_at_the_outer_step() -> None:
    for reset, expected in ((False, [7, 5.5, 3.75]), (True, [7, 5.5, 4.5])):
        relaxation = le.Relaxation(inner_steps=2, reset_momentum=reset)
        ys, _, _ = run(8.0, torch.ones_like, relaxation, 3, momentum=0.5)
        assert numbers(ys) == expected


def test_path_of_the_outer_momentum() -> None:
    """Pseudo-gradient 2 every loop; Nesterov 1/2, lr 1: steps 2 + 1 = 3, then buffer 3, 2 + 3/2 = 3.5."""
    _, xs, _ = run(16.0, torch.ones_like, le.diloco(2, outer_lr=1.0, outer_momentum=0.5), 4)
    assert numbers(xs) == [16, 13, 13, 9.5]


def test_path_of_two_time_scales() -> None:
    """y is never reset: 8 -> 7, half way back 7.5, and x half way there, 7.75; then 6.5, 7.125 and 7.4375."""
    ys, xs, _ = run(8.0, torch.ones_like, le.two_timescale(1.0, outer_lr=0.5), 2)
    assert numbers(ys) == [7.5, 7.125]
    assert numbers(xs) == [7.75, 7.4375]


def test_path_of_elastic_sgd() -> None:
    """The other replica stands at 0, so the mean is x / 2; rho = 1/2: 8 -> 7 -> 6 - 2 = 4; 4 -> 3 -> 2 - 1 = 1."""
    w = torch.nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    le.relax(optimizer, le.elastic_sgd(2, 0.5), replica_mean=lambda xs: [x / 2 for x in xs])
    path = []
    for _ in range(4):
        w.grad = torch.ones(1)
        optimizer.step()
        path.append(w.item())
    assert path == [7, 4, 3, 1]


def test_path_of_scoping() -> None:
    """gamma doubles at every outer step: k = 1, then 3."""
    ys, xs, _ = run(8.0, torch.ones_like, le.hamilton_jacobi(1, le.Scoping(1.0, 2.0)), 2)
    assert numbers(xs) == numbers(ys) == [7.5, 7.25]


# Quadratics: f = h/2 y^2, or y H y / 2


@pytest.mark.parametrize("form", ["implicit", "coupled", "explicit"])
@pytest.mark.parametrize(("h", "gamma"), [(1.0, 0.5), (3.0, 2.0), (0.2, 5.0), (-0.5, 2.0)])
def test_a_long_inner_loop_lands_on_the_proximal_point(h: float, gamma: float, form: str) -> None:
    """y* = gamma x / (h + gamma), whatever the step; the implicit spring acts at the updated point.

    Its fixed point, y (1 + k) = (1 - lr h) y + k x, is the same.
    """
    options: dict[str, Any] = {} if form == "implicit" else {form: True}
    relaxation = le.Relaxation(inner_steps=400, gamma=gamma, **options)
    _, xs, _ = run(2.0, lambda y: h * y, relaxation, 400, lr=0.2)
    assert xs[-1].item() == pytest.approx(2 * gamma / (h + gamma), rel=1e-10)


@pytest.mark.parametrize("gamma", [0.5, 4.0])
def test_the_gradient_of_the_envelope(gamma: float) -> None:
    """gamma (x - y*) = (I + H / gamma)^-1 H x, the gradient of the smoothed loss at time t = 1 / gamma."""
    torch.manual_seed(0)
    a = torch.randn(4, 4, dtype=DTYPE)
    h, x = a @ a.T / 4, torch.randn(4, dtype=DTYPE)
    _, _, zs = run(x, lambda y: h @ y, le.hamilton_jacobi(3000, gamma), 2999, lr=0.1)
    identity = torch.eye(4, dtype=DTYPE)
    torch.testing.assert_close(x - zs[-1], torch.linalg.solve(h + gamma * identity, h @ x), rtol=0, atol=1e-9)
    torch.testing.assert_close(gamma * (x - zs[-1]), torch.linalg.solve(identity + h / gamma, h @ x))


def test_the_proximal_point_of_an_absolute_value() -> None:
    """It shrinks by 1 / gamma: sub-gradient steps end within two steps of it."""
    _, _, zs = run([3.0, -3.0, 0.1], torch.sign, le.hamilton_jacobi(3000, 0.5), 2999, lr=1e-2)
    torch.testing.assert_close(zs[-1], torch.tensor([1.0, -1.0, 0.0], dtype=DTYPE), rtol=0, atol=2e-2)


def test_repeated_proximal_points_descend_to_the_minimum() -> None:
    """x <- gamma x / (h + gamma) every outer step."""
    _, xs, _ = run(2.0, lambda y: 1.0 * y, le.hamilton_jacobi(200, 1.0), 1000, lr=0.3)
    assert numbers(xs[199::200]) == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0625], rel=1e-9)


# The Langevin chain on a quadratic: y <- a (y - m) + m + c n, with n ~ N(0, 1)


def test_the_langevin_chain_has_the_exact_mean_and_variance_of_the_discrete_chain() -> None:
    """Implicit spring, then noise: y <- ((1 - lr h) y + k x) / (1 + k) + sqrt(lr) noise n, k = lr gamma.

    So a = (1 - lr h) / (1 + k), the mean is gamma x / (h + gamma) and the variance lr noise^2 / (1 - a^2), which is
    the Gibbs variance noise^2 / (2 (h + gamma)) only as lr -> 0: here it is a third more.
    """
    h, gamma, noise, lr, x = 1.0, 2.0, 0.3, 0.3, 1.5
    chains, steps = 20_000, 40
    relaxation = le.Relaxation(inner_steps=10**6, gamma=gamma, noise=noise)
    w = torch.nn.Parameter(torch.full((chains,), x, dtype=DTYPE))
    optimizer = torch.optim.SGD([w], lr=lr)
    le.relax(optimizer, relaxation, seed=0)
    for _ in range(steps):
        w.grad = h * w.detach()
        optimizer.step()
    y = w.detach()
    a = (1 - lr * h) / (1 + lr * gamma)
    variance = lr * noise**2 / (1 - a**2)
    assert y.mean().item() == pytest.approx(gamma * x / (h + gamma), abs=3.3 * (variance / chains) ** 0.5)
    assert y.var().item() == pytest.approx(variance, rel=3.3 * (2 / chains) ** 0.5)
    assert abs(variance / (noise**2 / (2 * (h + gamma))) - 1) > 0.1  # the test can tell them apart


@pytest.mark.parametrize("form", ["coupled", "explicit"])
def test_the_other_springs_have_their_own_exact_variance(form: str) -> None:
    """Both: a = 1 - lr (h + gamma)."""
    h, gamma, noise, lr, chains = 1.0, 2.0, 0.3, 0.3, 20_000
    relaxation = le.Relaxation(inner_steps=10**6, gamma=gamma, noise=noise, **{form: True})
    ys, _, _ = run(torch.full((chains,), 1.5), lambda y: h * y, relaxation, 40, lr=lr)
    a = 1 - lr * (h + gamma)
    variance = lr * noise**2 / (1 - a**2)
    assert ys[-1].mean().item() == pytest.approx(gamma * 1.5 / (h + gamma), abs=3.3 * (variance / chains) ** 0.5)
    assert ys[-1].var().item() == pytest.approx(variance, rel=3.3 * (2 / chains) ** 0.5)


def test_the_covariance_of_the_chain_over_many_weights() -> None:
    """Sigma = A Sigma A^T + lr noise^2 I with A = (I - lr H) / (1 + k), and its mean (H + gamma I)^-1 gamma x."""
    gamma, noise, lr, chains = 1.0, 0.5, 0.2, 20_000
    h = torch.tensor([[2.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 0.5]], dtype=DTYPE)
    x = torch.tensor([1.0, -2.0, 0.5], dtype=DTYPE)
    relaxation = le.Relaxation(inner_steps=10**6, gamma=gamma, noise=noise)
    ys, _, _ = run(x.repeat(chains, 1), lambda y: y @ h, relaxation, 80, lr=lr)
    y, identity = ys[-1], torch.eye(3, dtype=DTYPE)
    a = (identity - lr * h) / (1 + lr * gamma)
    sigma = torch.from_numpy(scipy.linalg.solve_discrete_lyapunov(a.numpy(), (lr * noise**2 * identity).numpy()))
    scale = sigma.diagonal().sqrt()
    torch.testing.assert_close(
        (x - y.mean(0)) / scale, torch.linalg.solve(h + gamma * identity, h @ x) / scale, rtol=0, atol=3.3 / chains**0.5
    )
    torch.testing.assert_close(torch.cov(y.T), sigma, rtol=0, atol=4 * (2 / chains) ** 0.5 * sigma.max().item())


def test_the_running_mean_of_the_chain_estimates_the_local_entropy_gradient() -> None:
    """gamma (x - E z) = (I + H / gamma)^-1 H x, with the variance of an exponential average of an AR(1) chain."""
    h, gamma, noise, lr, weight, chains = 1.0, 2.0, 0.3, 0.3, 0.25, 20_000
    relaxation = le.entropy_sgd(10**6, gamma, noise, weight)
    _, _, zs = run(torch.full((chains,), 1.5), lambda y: h * y, relaxation, 60, lr=lr)
    a = (1 - lr * h) / (1 + lr * gamma)
    b = 1 - weight
    variance = lr * noise**2 / (1 - a**2) * weight / (1 + b) * (1 + a * b) / (1 - a * b)
    z = zs[-1]
    assert gamma * (1.5 - z.mean().item()) == pytest.approx(
        1.5 / (1 + h / gamma), abs=gamma * 3.3 * (variance / chains) ** 0.5
    )
    assert z.var().item() == pytest.approx(variance, rel=0.04)


# Two time scales: (x, y) together


def test_two_time_scales_follow_the_exact_linear_recursion() -> None:
    """y <- ((1 - lr h) y + k x) / (1 + k), x <- x + s (y - x): a 2 x 2 matrix, and for small s the envelope's flow."""
    h, gamma, lr, s = 1.0, 2.0, 0.3, 0.01
    k = lr * gamma
    top = torch.tensor([(1 - lr * h) / (1 + k), k / (1 + k)], dtype=DTYPE)
    step = torch.stack([top, s * top + torch.tensor([0.0, 1 - s], dtype=DTYPE)])
    state = torch.full((2,), 1.5, dtype=DTYPE)
    ys, xs, _ = run(1.5, lambda y: h * y, le.two_timescale(gamma, outer_lr=s), 300, lr=lr)
    for y, x in zip(ys, xs, strict=True):
        state = step @ state
        torch.testing.assert_close(torch.stack([y, x]), state)
    # x - y* = h x / (h + gamma), so x decays by s h / (h + gamma) a step
    rate = math.log(xs[200].item() / xs[299].item()) / 99
    assert rate == pytest.approx(s * h / (h + gamma), rel=0.02)


# Heat: E grad f(x + n), n ~ N(0, v), v = 1 / gamma


@pytest.mark.parametrize(
    ("gradient", "smoothed"),
    [
        # f = y^4: smoothed x^4 + 6 v x^2 + 3 v^2
        (lambda y: 4 * y**3, lambda x, v: 4 * x**3 + 12 * v * x),
        # f = -cos y: smoothed -exp(-v / 2) cos x
        (torch.sin, lambda x, v: math.exp(-v / 2) * math.sin(x)),
        # f = h/2 y^2: the same gradient
        (lambda y: 3 * y, lambda x, v: 3 * x),
    ],
    ids=["quartic", "sine", "quadratic"],
)
@pytest.mark.parametrize("inner_steps", [1, 5])
def test_heat_descends_the_smoothed_function(
    gradient: Callable[[Tensor], Tensor], smoothed: Callable[[float, float], float], inner_steps: int
) -> None:
    """One step of SGD(lr = 1) by many weights at once: the mean step is the gradient of G * f."""
    x, variance, n = 0.7, 0.25, 200_000
    ys, xs, _ = run(torch.full((n,), x), gradient, le.heat(inner_steps, 1 / variance), inner_steps)
    steps = x - xs[-1]
    assert steps.mean().item() == pytest.approx(smoothed(x, variance), abs=3.3 * steps.std().item() / n**0.5)
    if inner_steps > 1:  # nothing moves before the last gradient, and the mean of five has a fifth of the variance
        assert (xs[-2] == xs[0]).all()
        one = x - run(torch.full((n,), x), gradient, le.heat(1, 1 / variance), 1)[1][-1]
        assert steps.var().item() == pytest.approx(one.var().item() / inner_steps, rel=0.05)
    assert not torch.equal(ys[-1], xs[-1])


def test_heat_finds_the_minimum_of_the_smoothed_double_well() -> None:
    """f = (y^2 - 1)^2: smoothed, its minima are at x^2 = 1 - 3 v, and for v > 1/3 at 0 alone."""
    for variance, expected in ((0.1, 0.7**0.5), (0.5, 0.0)):
        _, xs, _ = run(torch.full((20_000,), 1.2), lambda y: 4 * y * (y**2 - 1), le.heat(1, 1 / variance), 800, lr=0.01)
        # The weights fluctuate about the minimum; their mean over replicas and time does not
        assert torch.stack(xs[400:]).mean().item() == pytest.approx(expected, abs=0.03)


def test_heat_on_lbfgs_finds_the_minimum_seen_through_one_perturbation() -> None:
    """All its evaluations in a step see the same n, so on a quadratic it lands on -n."""
    w = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=DTYPE))
    optimizer = torch.optim.LBFGS([w], line_search_fn="strong_wolfe", max_iter=20)
    loop = le.relax(optimizer, le.heat(1, 4.0), seed=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**2 * torch.tensor([1.0, 5.0])).sum()
        loss.backward()
        return loss

    loop.begin()
    n = w.detach() - torch.tensor([3.0, -2.0], dtype=DTYPE)
    optimizer.step(closure)
    torch.testing.assert_close(loop.anchor[0], -n, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [le.heat(1, 4.0), le.heat(3, 4.0)])
def test_heat_perturbs_the_first_closure_without_being_told(method: le.Relaxation) -> None:
    w = torch.nn.Parameter(torch.zeros(1000, dtype=DTYPE))
    optimizer = torch.optim.SGD([w], lr=1.0)
    le.relax(optimizer, method, seed=0)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen[0].std().item() == pytest.approx(0.5, rel=0.1)
