"""The non-viscous Hamilton-Jacobi equation: the Moreau envelope, its proximal map and its gradient."""

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates

from lightning_entropy.pde.grid import Array, grid_values, positive


def hopf_lax(f: ArrayLike, t: float, dx: float) -> tuple[Array, tuple[NDArray[np.intp], ...]]:
    r"""Solve u_t = -1/2 |grad u|^2 by the Hopf-Lax formula:  u(x, t) = min_y f(y) + |x - y|^2 / 2t.

    The Moreau envelope of f, and the limit of ``cole_hopf`` as beta grows. The minimum over the grid points is exact:
    every point y carries a parabola, and the lower envelope of the parabolas is built from left to right, in linear
    time per line, one axis after another. It exceeds the minimum over the continuum by at most (M + 1/t) dx^2 / 8 per
    dimension, where M bounds f'': second order.

    u <= f, min u = min f at the same points, and sup u'' <= 1/t. The minimizers increase with x.

    Args:
        f: values at cell centres, 1-D or 2-D, loss.
        t: time, weight^2/loss, > 0; 1/gamma of the optimizers.
        dx: width of a cell, weight, > 0, the same along every axis.

    Returns:
        u(., t), same shape as ``f``, loss; and the proximal map as numpy indexes, one integer array per axis:
        ``f[prox]`` is f at the minimizer y*(x), ``x[prox]`` its coordinate. Ties are broken deterministically.

    Raises:
        ValueError: if ``t`` or ``dx`` is not > 0, or ``f`` is not a finite function on a grid.

    Example:
        The envelope of |x| is the Huber function: x^2 / 2t inside |x| <= t, |x| - t/2 outside; its
        prox is soft thresholding.

        >>> x = np.array([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
        >>> u, prox = hopf_lax(np.abs(x), t=1.0, dx=1.0)
        >>> u
        array([2.5, 1.5, 0.5, 0. , 0.5, 1.5, 2.5])
        >>> x[prox]
        array([-2., -1.,  0.,  0.,  0.,  1.,  2.])

    References:
        Chaudhari et al., Deep Relaxation, 2018, arXiv:1704.04932.
        Felzenszwalb and Huttenlocher, Distance transforms of sampled functions, Theory of Computing 2012.
    """
    u = grid_values("f", f)
    cells = positive("t", t) / positive("dx", dx) ** 2
    chosen: list[NDArray[np.intp]] = []
    for axis in reversed(range(u.ndim)):
        lines = np.moveaxis(u, axis, -1)
        best = np.empty(lines.shape, dtype=np.intp)
        for line in np.ndindex(lines.shape[:-1]):
            best[line] = _lowest_parabola(lines[line], cells)
        best = np.moveaxis(best, -1, axis)
        here = np.arange(u.shape[axis]).reshape([-1 if a == axis else 1 for a in range(u.ndim)])
        # Without the minimum, rounding may exceed f in the last bit where the two are equal.
        u = np.minimum(u, np.take_along_axis(u, best, axis) + (here - best) ** 2 / (2 * cells))
        # The later axes were minimized for every value of this one: read their minimizers at the point now chosen.
        chosen = [best] + [np.take_along_axis(later, best, axis) for later in chosen]
    return u, tuple(chosen)


def _lowest_parabola(line: Array, cells: float) -> NDArray[np.intp]:
    """Return, for every point p of a line, the q whose parabola line[q] + (p - q)^2 / (2 cells) is the lowest."""
    values = line.tolist()
    envelope = [0]
    starts = [-np.inf]  # where each parabola of the envelope becomes the lowest
    for q in range(1, len(values)):
        while True:
            v = envelope[-1]
            # From here on q is below v. Adding the midpoint last keeps all digits for small t.
            crossing = cells * ((values[q] - values[v]) / (q - v)) + 0.5 * (q + v)
            if crossing > starts[-1]:
                break
            envelope.pop()
            starts.pop()
        envelope.append(q)
        starts.append(crossing)
    lowest = np.searchsorted(np.array(starts), np.arange(len(values)), side="right") - 1
    return np.array(envelope, dtype=np.intp)[lowest]


def gradient_hopf_lax(
    f: ArrayLike, t: float, dx: float, *, method: Literal["prox", "fixed_point"] = "prox"
) -> tuple[Array, ...]:
    r"""Return grad u(., t) of the Hopf-Lax solution, p* = (x - prox(x)) / t = grad f(x - t p*).

    ``prox`` computes it from the minimizer: for every f and t, within dx / 2t, since the minimizer is a grid point.
    ``fixed_point`` iterates p <- grad f(x - t p) from p = grad f(x), as the Hamilton-Jacobi optimizer does, to a
    change below 1e-12 of the largest slope: log(1e-12) / log(t Lip(grad f)) iterations. grad f is the central
    difference, linear between grid points and constant past the ends. The map is a contraction if t Lip(grad f) < 1.
    Otherwise it may not converge, or converge to a stationary point that is not a minimum, and an error is raised.

    Args:
        f: values at cell centres, 1-D or 2-D, loss.
        t: time, weight^2/loss, > 0.
        dx: width of a cell, weight, > 0.
        method: ``"prox"`` or ``"fixed_point"``.

    Returns:
        One array per axis, each of the shape of ``f``, loss/weight.

    Raises:
        ValueError: if t Lip(grad f) >= 1 with ``fixed_point``, if ``method`` is unknown, or as for ``hopf_lax``.

    Example:
        For f = x^2/2, u = x^2 / (2 (1 + t)) and p* = x / (1 + t): 2 at x = 3 and t = 1/2.

        >>> x = np.linspace(-6, 6, 25)
        >>> (slope,) = gradient_hopf_lax(x**2 / 2, t=0.5, dx=0.5, method="fixed_point")
        >>> round(float(slope[18]), 10)
        2.0
        >>> (slope,) = gradient_hopf_lax(x**2 / 2, t=0.5, dx=0.5)
        >>> round(float(slope[18]), 10)
        2.0
    """
    f = grid_values("f", f)
    t, dx = positive("t", t), positive("dx", dx)
    here = np.indices(f.shape, dtype=np.float64)
    if method == "prox":
        _, prox = hopf_lax(f, t, dx)
        return tuple(np.asarray((x - y) * (dx / t), dtype=np.float64) for x, y in zip(here, prox, strict=True))
    if method != "fixed_point":
        raise ValueError(f"method must be 'prox' or 'fixed_point', got {method!r}")

    slopes = np.stack([np.gradient(f, dx, axis=axis) for axis in range(f.ndim)])
    contraction = t * _lipschitz(slopes, dx)
    if contraction >= 1:
        raise ValueError(
            f"t * Lip(grad f) must be < 1 for the fixed point to contract, got {contraction:.3g}; use method='prox'"
        )
    p = slopes
    allowed = 1e-12 * np.abs(slopes).max()
    # Every iteration shrinks the change by the factor ``contraction``, so this many suffice.
    for _ in range(math.ceil(math.log(1e-12) / math.log(max(contraction, 1e-12))) + 1):
        points = here - (t / dx) * p
        newer = np.stack([map_coordinates(slope, points, order=1, mode="nearest") for slope in slopes])
        change, p = np.abs(newer - p).max(), newer
        if change <= allowed:
            break
    return tuple(p)


def _lipschitz(slopes: Array, dx: float) -> float:
    """Return the exact Lipschitz constant of the multilinear interpolant of ``slopes``, shape (axes, ...).

    Within a cell, each column of the Jacobian lies between the difference quotients of two opposite edges. The spectral
    norm is convex, so it is largest where every column is at one of its two ends.
    """
    columns = [np.diff(slopes, axis=axis) / dx for axis in range(1, slopes.ndim)]
    if len(columns) == 1:
        return float(np.abs(columns[0]).max())
    down, along = columns
    corners = [
        np.stack([d, a], axis=-1)
        for d in (down[:, :, 1:], down[:, :, :-1])
        for a in (along[:, 1:, :], along[:, :-1, :])
    ]
    return max(float(np.linalg.norm(np.moveaxis(c, 0, -2), ord=2, axis=(-2, -1)).max()) for c in corners)
