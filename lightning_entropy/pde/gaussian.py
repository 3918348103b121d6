"""Smoothing by a Gaussian: the heat equation, and local entropy as the viscous Hamilton-Jacobi equation."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ive, logsumexp

from lightning_entropy.pde.grid import Array, grid_values, positive

# Entries of the largest temporary array in a log-domain convolution (8 bytes each).
_BLOCK = 2_000_000

# Within this range of exponents no significant term underflows (exp(-745) would), so a plain product is accurate.
_SAFE_RANGE = 600.0


def heat(f: ArrayLike, t: float, dx: float) -> Array:
    r"""Smooth f by a Gaussian of variance t:  v(., t) = G_t * f,  the solution of v_t = 1/2 v_xx.

    The limit of ``cole_hopf`` as beta -> 0 at fixed t/beta. The convolution is a matrix whose rows and columns sum to
    one, so constants, the mean of f and the bounds min f <= v <= max f are kept up to rounding. For t >= dx^2 the
    kernel is the sampled Gaussian, whose error on a smooth f is exp(-2 pi^2 t / dx^2), 3e-9 at t = dx^2. For smaller t
    sampling would lose variance, and the kernel is the exact semigroup of the discrete Laplacian, which has the
    variance t and is second order in dx.

    Args:
        f: values at cell centres, 1-D or 2-D, loss. Mirrors at the ends.
        t: variance of the kernel, weight^2, > 0; 1/gamma of the optimizers at beta = 1.
        dx: width of a cell, weight, > 0, the same along every axis.

    Returns:
        v(., t), same shape as ``f``, loss.

    Raises:
        ValueError: if ``t`` or ``dx`` is not > 0, or ``f`` is not a finite function on a grid.

    Example:
        Away from the ends, x^2 grows by the variance:

        >>> x = np.linspace(-8, 8, 161)
        >>> round(float(heat(x**2, t=0.5, dx=0.1)[80]), 10)  # at x = 0
        0.5

    References:
        Chaudhari, Oberman, Osher, Soatto, Carlier, Deep Relaxation, Res. Math. Sci. 2018, arXiv:1704.04932.
        Lindeberg, Scale-space for discrete signals, IEEE PAMI 1990, for the kernel below one cell.
    """
    v = grid_values("f", f)
    cells = positive("t", t) / positive("dx", dx) ** 2
    for axis, n in enumerate(v.shape):
        kernel = np.exp(_log_kernel(n, cells)) if cells >= 1 else _semigroup_kernel(n, cells)
        v = _convolve(kernel, v, axis)
    return v


def cole_hopf(f: ArrayLike, t: float, dx: float, beta: float = 1.0) -> Array:
    r"""Solve the viscous Hamilton-Jacobi equation in closed form:  u = -1/beta log(G_{t/beta} * exp(-beta f)).

    u_t = -1/2 |grad u|^2 + 1/(2 beta) Laplacian u  with  u(., 0) = f.  At beta = 1 this is local entropy, -F of
    Entropy-SGD with gamma = 1/t, up to the constant log(2 pi t)/2 per dimension (here u = c for f = c). One axis after
    another; where exp(-beta f) could underflow, the sum is a log-sum-exp over the whole line, so nothing overflows and
    no valley is lost, however deep or far away. Cost n^2 per line of n points.

    On the grid u is a soft minimum of the quantity that ``hopf_lax`` minimizes. Hence for any f, per dimension,

        -1/beta log 2n  <=  u - hopf_lax - 1/beta log Z  <=  0,   Z = sum_j exp(-beta (j dx)^2 / 2t),

    (the lower bound for a kernel narrower than a third of the line); and where f is smooth

        u = hopf_lax + 1/(2 beta) log det(I + t Hess f(prox)) + O(1/beta^2).

    The sum approximates the integral to 3e-9 or better as long as the kernel is as wide as a cell, t/beta >= dx^2. For
    narrower kernels u is the soft minimum over grid points, and tends to ``hopf_lax`` on the grid.

    Args:
        f: values at cell centres, 1-D or 2-D, loss. Mirrors at the ends.
        t: time, weight^2/loss, > 0. It is 1/gamma of the optimizers, and the gamma of Deep Relaxation.
        dx: width of a cell, weight, > 0, the same along every axis.
        beta: inverse temperature, 1/loss, > 0.

    Returns:
        u(., t), same shape as ``f``, loss. min f <= u <= max f.

    Raises:
        ValueError: if ``t``, ``dx`` or ``beta`` is not > 0, or ``f`` is not a finite function on a grid.

    Example:
        For f = x^2/2, u = x^2 / (2 (1 + t)) + log(1 + t)/2: at x = 1 and t = 1, 1/4 + log(2)/2.

        >>> x = np.linspace(-10, 10, 201)
        >>> round(float(cole_hopf(x**2 / 2, t=1.0, dx=0.1)[110]), 6)
        0.596574

    References:
        Chaudhari et al., Entropy-SGD, ICLR 2017, arXiv:1611.01838, Definition 1.
        Chaudhari et al., Deep Relaxation, 2018, arXiv:1704.04932.
    """
    f = grid_values("f", f)
    beta = positive("beta", beta)
    cells = positive("t", t) / beta / positive("dx", dx) ** 2
    exponent = -beta * f
    for axis, n in enumerate(f.shape):
        log_kernel = _log_kernel(n, cells)
        peak = exponent.max()
        if peak - exponent.min() < _SAFE_RANGE:
            exponent = peak + np.log(_convolve(np.exp(log_kernel), np.exp(exponent - peak), axis))
        else:
            exponent = np.moveaxis(_log_convolve(log_kernel, np.moveaxis(exponent, axis, -1)), -1, axis)
    return exponent / -beta


def _log_kernel(n: int, cells: float) -> Array:
    """Return the log of the sampled Gaussian of variance ``cells`` on the circle of 2n cells, a line of n mirrored."""
    if cells > 9 * n * n:  # a deviation of three lines: uniform up to rounding
        return np.full(2 * n, -np.log(2 * n))
    far = 1 + int(4.5 * np.sqrt(cells) / n)  # further images are nine standard deviations away
    turns = 2 * n * np.arange(-far, far + 1)
    distance = np.arange(2 * n) - n
    logs = logsumexp(-((distance[:, None] + turns) ** 2) / (2 * cells), axis=1)
    return np.roll(logs - logsumexp(logs), n)


def _semigroup_kernel(n: int, cells: float) -> Array:
    """Return exp(-c) I_k(c), the heat kernel of the discrete Laplacian at c <= 1; below 1e-50 beyond 40 cells."""
    kernel = np.zeros(2 * n)
    for k in range(-40, 41):
        kernel[k % (2 * n)] += ive(abs(k), cells)
    return kernel / kernel.sum()


def _convolve(kernel: Array, values: Array, axis: int) -> Array:
    """Convolve the even extension along an axis: sum_j (k(i - j) + k(i + j + 1)) values[j]."""
    i = np.arange(values.shape[axis])
    matrix = kernel[np.abs(i[:, None] - i)] + kernel[i[:, None] + i + 1]
    return np.moveaxis(np.tensordot(matrix, values, axes=(1, axis)), 0, axis)


def _log_convolve(log_kernel: Array, exponent: Array) -> Array:
    """Return log sum_j exp(log K[i, j] + exponent[..., j]), computed in blocks of rows i."""
    n = len(log_kernel) // 2
    j = np.arange(n)
    block = max(1, _BLOCK // exponent.size)
    result = np.empty_like(exponent)
    for start in range(0, n, block):
        i = np.arange(start, min(start + block, n))[:, None]
        log_rows = np.logaddexp(log_kernel[np.abs(i - j)], log_kernel[i + j + 1])
        terms = exponent[..., None, :] + log_rows
        peak = terms.max(axis=-1, keepdims=True)
        result[..., start : start + block] = peak[..., 0] + np.log(np.exp(terms - peak).sum(axis=-1))
    return result
