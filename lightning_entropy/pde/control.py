"""The stochastic-control reading: local entropy is the least cost of steering noise downhill."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lightning_entropy.pde.gaussian import cole_hopf
from lightning_entropy.pde.grid import Array, grid_values, positive


@dataclass(frozen=True)
class Controlled:
    """The paths of one run of ``controlled_sde`` and what they cost. Without control, ``effort`` is zero.

    Attributes:
        times: shape (steps + 1,), from 0 to T.
        paths: positions of the first ``kept`` particles, shape (steps + 1, kept), weight.
        final: x(T) of every particle, shape (particles,), weight.
        terminal: f(x(T)), shape (particles,), loss.
        effort: 1/2 integral of |control|^2 along every path, shape (particles,), loss.
        martingale: integral of control . beta^{-1/2} dW along every path, shape (particles,), loss; mean zero. By Ito,
            terminal + effort + martingale = u(x0, T)  on every single path of the optimal control as steps grow:
            the mean of the sum estimates the same number with about a seventh of the error of ``value``.
    """

    times: Array
    paths: Array
    final: Array
    terminal: Array
    effort: Array
    martingale: Array

    @property
    def value(self) -> float:
        """The estimate of E[f(x(T)) + 1/2 integral |control|^2], loss."""
        return float((self.terminal + self.effort).mean())

    @property
    def standard_error(self) -> float:
        """One standard error of ``value``, loss."""
        cost = self.terminal + self.effort
        return float(cost.std(ddof=1) / np.sqrt(len(cost)))


def controlled_sde(
    f: ArrayLike,
    T: float,
    beta: float,
    x0: float,
    dx: float,
    *,
    left: float = 0.0,
    controlled: bool = True,
    particles: int = 10_000,
    steps: int = 400,
    kept: int = 20,
    seed: int = 0,
) -> Controlled:
    r"""Simulate dx = control ds + beta^{-1/2} dW from x0 with the optimal control -grad u(x, T - s) or with none.

    This control minimizes E[f(x(T)) + 1/2 integral |control|^2], and the minimum is u(x0, T), the viscous
    Hamilton-Jacobi solution ``cole_hopf`` (the Hamilton-Jacobi-Bellman equation run backwards in s). So u(., t) is the
    expected cost with time t left to steer, and scoping, gamma growing from 1/T to infinity, is the optimal control.
    Since zero control is allowed,  E f(x(T)) controlled <= u(x0, T) <= E f(x(T)) uncontrolled.

    Euler-Maruyama at times T - s = T (1 - k/steps)^2, which are densest at the end, where u tends to f. A control that
    is constant during a step is not quite optimal, so the value is high by O(1/steps): by 2.5/steps for the landscape
    of ``recipes.smoothing`` at T = 0.2. Every step recomputes u(., t) on the grid and interpolates its slope linearly;
    paths are reflected at the outer faces of the grid, as u is.

    Args:
        f: terminal loss at cell centres ``left + dx * arange(n)``, shape (n,).
        T: time to steer, weight^2/loss, > 0.
        beta: inverse temperature, 1/loss, > 0.
        x0: where every particle starts, weight, on the grid.
        dx: width of a cell, weight, > 0.
        left: coordinate of the first cell centre, weight.
        controlled: False for no control under the same noise.
        particles: number of paths to simulate, >= 2.
        steps: number of time steps, >= 1.
        kept: number of paths to return.
        seed: seed of numpy's generator. With equal seeds the runs with and without control share their noise.

    Returns:
        Times, paths, final positions and the terms of the cost.

    Raises:
        ValueError: if ``x0`` is off the grid, a number is out of its range, or ``f`` is not finite on a 1-D grid.

    Example:
        f = x^2/2 from x0 = 2, T = 1, beta = 1e6: almost no noise, so u = x0^2 / (2 (1 + T)) = 1, half of it effort.

        >>> x = np.linspace(-4, 4, 161)
        >>> run = controlled_sde(x**2 / 2, 1.0, 1e6, 2.0, 0.05, left=-4, particles=2)
        >>> round(run.value, 2), round(float(run.effort.mean()), 2), round(float(run.final.mean()), 2)
        (1.0, 0.5, 1.0)

    References:
        Chaudhari et al., Deep Relaxation, 2018, arXiv:1704.04932. Fleming and Soner, Controlled Markov Processes, 2006.
    """
    f = grid_values("f", f, (1,))
    T, beta, dx = positive("T", T), positive("beta", beta), positive("dx", dx)
    if particles < 2 or steps < 1:
        raise ValueError(f"particles must be >= 2 and steps >= 1, got {particles} and {steps}")
    right = left + (len(f) - 1) * dx
    if not left <= x0 <= right:
        raise ValueError(f"x0 must be on the grid, [{left}, {right}], got {x0}")
    grid = left + dx * np.arange(len(f))
    generator = np.random.default_rng(seed)
    to_go = T * (1 - np.arange(steps + 1) / steps) ** 2

    x = np.full(particles, float(x0))
    effort, martingale = np.zeros(particles), np.zeros(particles)
    paths = [x[:kept]]
    for remaining, step in zip(to_go[:-1], -np.diff(to_go), strict=True):
        noise = np.sqrt(step / beta) * generator.standard_normal(particles)
        if controlled:
            slope = np.gradient(cole_hopf(f, remaining, dx, beta), dx)
            control = -np.interp(x, grid, slope)
            effort += 0.5 * step * control**2
            martingale += control * noise
            x = x + step * control + noise
        else:
            x = x + noise
        x = _reflect(x, left - dx / 2, right + dx / 2)
        paths.append(x[:kept])
    return Controlled(T - to_go, np.array(paths), x, np.interp(x, grid, f), effort, martingale)


def _reflect(x: Array, low: float, high: float) -> Array:
    """Fold the line onto [low, high], as two facing mirrors would."""
    width = high - low
    return low + width - np.abs((x - low) % (2 * width) - width)
