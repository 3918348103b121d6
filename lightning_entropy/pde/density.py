"""The Fokker-Planck equation of a population of noisy descents, by a scheme that keeps densities positive and mass."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_banded
from scipy.special import exprel

from lightning_entropy.pde.grid import Array, grid_values, positive

Field = ArrayLike | Callable[[float], ArrayLike]


def fokker_planck(
    rho0: ArrayLike,
    T: float | ArrayLike,
    dx: float,
    *,
    diffusion: float,
    potential: Field | None = None,
    drift: Field | None = None,
    dt: float | None = None,
) -> Array:
    r"""Evolve a density by rho_t = (V' rho)_x + diffusion rho_xx, for dx = -V'(x, t) dt + sqrt(2 diffusion) dW.

    Finite volumes with the Scharfetter-Gummel flux between cells i and i + 1,

        J = diffusion/dx [B(w) rho_i - B(-w) rho_{i+1}],   w = (V_{i+1} - V_i) / diffusion,   B(z) = z / (e^z - 1),

    no flux through the ends, and implicit Euler in time. The matrix is an M-matrix whose columns sum to one for *every*
    dt, dx and diffusion: densities stay nonnegative, mass is conserved, and the Gibbs density exp(-V/diffusion)/Z is a
    fixed point up to rounding. (On the rough landscape of ``recipes.smoothing`` at diffusion 0.1, central differences
    become negative and explicit ones blow up.) First order in dt; in dx second order where V changes by less than
    ``diffusion`` over a cell, and first order, like upwinding, where it changes by more.

    Args:
        rho0: initial density, shape (n,), 1/weight, >= 0, not all zero. It need not have mass one.
        T: final time, > 0; or an increasing sequence of k times, all > 0.
        dx: width of a cell, weight, > 0.
        diffusion: temperature, loss, > 0: noise^2 / 2 of the optimizers, 1 / (2 beta) of the Hamilton-Jacobi equation.
        potential: V, shape (n,) at cell centres, loss, or a callable of the time s in [0, T] returning it. A potential
            that changes is scoping; V(s) = u(., T - s), u(., t) played backwards, is the optimal control.
        drift: the drift itself instead of ``potential``, at the n - 1 faces between cells, loss/weight, or a callable
            returning it. A positive drift moves mass to the right.
        dt: largest time step, > 0; default T/1000.

    Returns:
        The density at T, shape (n,), or at each of the times, shape (k, n).

    Raises:
        ValueError: if both or neither of ``potential`` and ``drift`` are given, a shape does not match, ``rho0`` is
            negative somewhere or zero everywhere, the times do not increase, or a number is not > 0.

    Example:
        Two cells, no drift: the difference halves with dt = 1/2 (rate 2 diffusion/dx^2, implicit: 1 / (1 + 1)).

        >>> fokker_planck([1.0, 0.0], 0.5, 1.0, diffusion=1.0, potential=[0.0, 0.0], dt=0.5).round(12)
        array([0.75, 0.25])

    References:
        Scharfetter and Gummel, IEEE Trans. Electron Devices 1969. Chang and Cooper, J. Comput. Phys. 1970.
    """
    rho = grid_values("rho0", rho0, (1,))
    if (rho < 0).any() or not rho.any():
        raise ValueError(f"rho0 must be >= 0 and not all zero, got a minimum of {rho.min()} and a sum of {rho.sum()}")
    times = np.atleast_1d(np.asarray(T, dtype=np.float64))
    if (
        times.ndim != 1
        or len(times) == 0
        or not np.isfinite(times).all()
        or not (np.diff(times, prepend=0.0) > 0).all()
    ):
        raise ValueError(f"T must be > 0 and increasing, got {times}")
    dx, diffusion = positive("dx", dx), positive("diffusion", diffusion)
    dt = float(times[-1]) / 1000 if dt is None else positive("dt", dt)
    barrier = _barrier(len(rho), dx, diffusion, potential, drift)

    mass = rho.sum()
    frames = np.empty((len(times), len(rho)))
    now = 0.0
    for k, end in enumerate(times):
        steps = math.ceil((end - now) / dt * (1 - 1e-12))  # the T/1000 default makes 1000 steps, not 1001
        step = (end - now) / steps
        for s in now + step * np.arange(1, steps + 1):
            rho = _implicit_step(rho, barrier(s), step * diffusion / dx**2)
            rho *= mass / rho.sum()  # rounding only, of 1 + courant: 1e-12 a step where courant is 1e4
        frames[k] = rho
        now = float(end)
    return frames if np.ndim(T) else frames[0]


def gibbs(potential: ArrayLike, dx: float, *, diffusion: float) -> Array:
    """Return the density exp(-V/diffusion)/Z of mass one, the stationary state of ``fokker_planck``.

    Args:
        potential: V at cell centres, any shape of one or two axes, loss.
        dx: width of a cell, weight, > 0.
        diffusion: temperature, loss, > 0.

    Returns:
        A density of the same shape, 1/weight per axis.

    Raises:
        ValueError: if ``dx`` or ``diffusion`` is not > 0, or ``potential`` is not finite on a grid.

    Example:
        >>> gibbs([0.0, np.log(3.0)], 1.0, diffusion=1.0).round(12)
        array([0.75, 0.25])
    """
    potential = grid_values("potential", potential)
    rho = np.exp((potential.min() - potential) / positive("diffusion", diffusion))
    return rho / (rho.sum() * positive("dx", dx) ** rho.ndim)


def _barrier(
    n: int, dx: float, diffusion: float, potential: Field | None, drift: Field | None
) -> Callable[[float], Array]:
    """Return the function of time that computes w = (V_{i+1} - V_i)/diffusion at the n - 1 faces."""
    if (potential is None) == (drift is None):
        raise ValueError("exactly one of potential and drift must be given, got both or neither")
    name, field, length = ("potential", potential, n) if drift is None else ("drift", drift, n - 1)

    def barrier(s: float) -> Array:
        values = np.asarray(field(s) if callable(field) else field, dtype=np.float64)
        if values.shape != (length,):
            raise ValueError(f"{name} must have shape ({length},) for a density of {n} cells, got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(values))} values that are not")
        return np.diff(values) / diffusion if drift is None else values * (-dx / diffusion)

    if callable(field):
        return barrier
    constant = barrier(0.0)
    return lambda s: constant


def _implicit_step(rho: Array, barrier: Array, courant: float) -> Array:
    """Solve (1 - dt A) rho' = rho; ``courant`` = dt diffusion / dx^2."""
    right = courant / exprel(barrier)  # B(w), the rate from i to i + 1; exprel(z) = (e^z - 1)/z
    left = courant / exprel(-barrier)
    bands = np.zeros((3, len(rho)))
    bands[0, 1:] = -left
    bands[1] = 1.0
    bands[1, :-1] += right
    bands[1, 1:] += left
    bands[2, :-1] = -right
    return solve_banded((1, 1), bands, rho, check_finite=False)
