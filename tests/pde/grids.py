"""Grids, functions on them, and the strategies that draw them: what several tests of this folder use."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

few = settings(max_examples=60, deadline=None, derandomize=True)
lines = arrays(np.float64, st.integers(2, 40), elements=st.floats(-50, 50, width=32))
planes = arrays(np.float64, st.tuples(st.integers(2, 9), st.integers(2, 9)), elements=st.floats(-50, 50, width=32))
functions = st.one_of(lines, planes)
times = st.floats(0.01, 100)
spacings = st.floats(0.1, 3)


def cells(n, half_width):
    """Return the centres of n cells that fill [-half_width, half_width], and their width."""
    dx = 2 * half_width / n
    return dx * (np.arange(n) + 0.5) - half_width, dx


def wavy(x):
    """Return x^2 + 1.5 sin(2 pi x): a convex bowl with a local minimum in every period."""
    return x**2 + 1.5 * np.sin(2 * np.pi * x)


def order(errors):
    """Return the measured orders of convergence between grids that halve the spacing."""
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
