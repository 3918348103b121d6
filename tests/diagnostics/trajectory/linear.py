"""Paths whose circulation is known: those of linear stochastic differential equations."""

import numpy as np
import scipy.linalg


def linear_sde(matrix, noise, steps, runs, seed):
    """Paths of x(t+1) = M x(t) + N(0, noise), shape (runs, steps, k), from the stationary state; and its covariance."""
    rng = np.random.default_rng(seed)
    covariance = scipy.linalg.solve_discrete_lyapunov(matrix, noise)
    kick, root = np.linalg.cholesky(noise), np.linalg.cholesky(covariance)
    x = rng.normal(size=(runs, len(matrix))) @ root.T
    path = np.empty((runs, steps, len(matrix)))
    for t in range(steps):
        path[:, t] = x
        x = x @ matrix.T + rng.normal(size=x.shape) @ kick.T
    return path, covariance


def drift(rotation):
    return np.eye(3) - 0.1 * np.diag([1.0, 1.5, 2.0]) - np.array([[0, rotation, 0], [-rotation, 0, 0], [0, 0, 0]])


NOISE = 0.01 * np.array([[1.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.5]])
