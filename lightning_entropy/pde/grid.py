"""The regular grid that every function of this package works on, and the validation of its arguments.

A function is an array of its values at the centres of equal cells of width ``dx``. Both ends are mirrors (the even
extension, zero slope at the outer faces), so that the Gaussian convolution, the finite differences and the densities
all solve the same problem, in which no mass is lost.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def grid_values(name: str, values: ArrayLike, dimensions: Sequence[int] = (1, 2)) -> Array:
    """Return ``values`` as a float64 array after checking that it is a finite function on a grid.

    Args:
        name: name of the argument, for the error.
        values: real and finite, two points or more along every axis.
        dimensions: the allowed numbers of axes.

    Returns:
        A float64 array of the same shape, which shares the caller's memory if that was float64 already.

    Raises:
        ValueError: if a value is not finite, the number of axes is not allowed, or an axis has less than two points.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in dimensions:
        raise ValueError(f"{name} must have {' or '.join(map(str, dimensions))} axes, got shape {array.shape}")
    if min(array.shape) < 2:
        raise ValueError(f"{name} must have at least 2 points along every axis, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(array))} values that are not")
    return array


def positive(name: str, value: float) -> float:
    """Return ``value`` as a float after checking that it is finite and > 0.

    Raises:
        ValueError: if ``value`` is zero, negative, infinite or NaN.
    """
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value}")
    return number


def local_minima(f: ArrayLike) -> NDArray[np.intp]:
    """Return the indices of the strict interior local minima of a function on a 1-D grid.

    Args:
        f: values, shape (n,).

    Returns:
        Indices i with f[i - 1] > f[i] < f[i + 1], increasing. The two ends do not count.

    Example:
        >>> local_minima([3.0, 1.0, 2.0, 0.0, 5.0])
        array([1, 3])
    """
    f = grid_values("f", f, (1,))
    return 1 + np.flatnonzero((f[1:-1] < f[:-2]) & (f[1:-1] < f[2:]))
