"""The viscous Hamilton-Jacobi equation by finite differences: a check that is independent of the closed forms."""

import math

import numpy as np
from numpy.typing import ArrayLike

from lightning_entropy.pde.grid import Array, grid_values, positive


def viscous_hj(f: ArrayLike, t: float, dx: float, beta: float = 1.0) -> Array:
    r"""Solve u_t = -1/2 |grad u|^2 + 1/(2 beta) Laplacian u, u(., 0) = f, by explicit upwind finite differences.

    Godunov's Hamiltonian, per axis 1/2 max(D- u, -D+ u, 0)^2, central second differences, forward Euler, mirrors at
    the ends. Every step is 0.9 of the largest for which the scheme is monotone,

        dt (sum over axes of max |D u| / dx  +  axes / (beta dx^2))  <=  1,

    so it is stable, keeps min f <= u <= max f, and converges to the viscosity solution, kinks included. First order in
    dx, because of the upwind difference, and about n^2 steps. Use it to check ``cole_hopf`` and ``hopf_lax``, which are
    faster and more accurate.

    Args:
        f: values at cell centres, 1-D or 2-D, loss.
        t: time, weight^2/loss, > 0.
        dx: width of a cell, weight, > 0.
        beta: inverse temperature, 1/loss, > 0; ``math.inf`` for the non-viscous equation of ``hopf_lax``.

    Returns:
        u(., t), same shape as ``f``, loss.

    Raises:
        ValueError: if ``t``, ``dx`` or ``beta`` is not > 0, or ``f`` is not a finite function on a grid.

    Example:
        Two cells of width 1 with f = 0, 1 and beta = inf: only the higher one falls, by u' = -u^2/2, to 1 / (1 + t/2).

        >>> u = viscous_hj([0.0, 1.0], t=0.01, dx=1.0, beta=math.inf)  # one Euler step: 1 - 0.01/2
        >>> u.round(6).tolist()
        [0.0, 0.995]

    References:
        Oberman, Convergent difference schemes for degenerate elliptic and parabolic equations, SINUM 2006.
        The scheme of the one-dimensional picture in Chaudhari et al., Deep Relaxation, 2018, arXiv:1704.04932.
    """
    u = grid_values("f", f).copy()
    t, dx = positive("t", t), positive("dx", dx)
    diffusion = 0.0 if beta == math.inf else 0.5 / positive("beta", beta)
    remaining = t
    while remaining > 0:
        slope_bound = 0.0
        rate = np.zeros_like(u)
        for axis in range(u.ndim):
            ahead = np.diff(u, axis=axis, append=np.take(u, [-1], axis)) / dx
            behind = np.diff(u, axis=axis, prepend=np.take(u, [0], axis)) / dx
            upwind = np.maximum(np.maximum(behind, -ahead), 0.0)
            rate += diffusion / dx * (ahead - behind) - 0.5 * upwind**2
            slope_bound += float(upwind.max())
        inverse_step = slope_bound / dx + 2 * diffusion * u.ndim / dx**2
        if inverse_step == 0:  # flat, and no viscosity: stationary
            break
        step = min(remaining, 0.9 / inverse_step)
        u += step * rate
        remaining -= step
    return u
