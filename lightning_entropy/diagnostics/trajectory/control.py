"""The reversible process that a path is set beside."""

import numpy as np


def ou_control(path: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    r"""Simulate, for every column, the Ornstein-Uhlenbeck process of its variance and first autocorrelation.

    x(t+1) = phi x(t) + sqrt(1 - phi^2) s N(0, 1), from its stationary state: independent columns, no current.

    Args:
        path: Shape (n, d).
        rng: Draws the noise.

    Returns:
        Shape (n, d).

    Example:
        >>> ou_control(np.zeros((3, 1)), np.random.default_rng(0)).tolist()        # a constant stays one
        [[0.0], [0.0], [0.0]]
    """
    x = path - path.mean(0)
    variance = (x**2).mean(0)
    phi = np.divide((x[1:] * x[:-1]).mean(0), variance, out=np.zeros_like(variance), where=variance > 0)
    phi = np.clip(phi, -0.999999, 0.999999)
    noise = rng.normal(size=x.shape) * np.sqrt(variance)
    noise[1:] *= np.sqrt(1 - phi**2)
    for t in range(1, len(noise)):
        noise[t] += phi * noise[t - 1]
    return noise
