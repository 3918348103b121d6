"""The density of eigenvalues from quadrature nodes and their masses."""

from collections.abc import Sequence

import numpy as np
import torch

from lightning_entropy.diagnostics.estimate import mean_and_stderr, student

_GRID = 1001


def smoothed_density(nodes: np.ndarray, masses: np.ndarray, grid: np.ndarray, sigma: float) -> np.ndarray:
    """Sum Gaussians of width ``sigma`` and the given masses, centred on the nodes, on a grid.

    Args:
        nodes: Shape (n,).
        masses: Shape (n,); the density integrates to their sum.
        grid: Shape (m,), the unit of ``nodes``.
        sigma: > 0, the unit of ``nodes``.

    Returns:
        Shape (m,), 1 / unit of ``nodes``.

    Example:
        >>> smoothed_density(np.array([0.0]), np.array([1.0]), np.array([0.0]), 1.0).round(4)   # 1 / sqrt(2 pi)
        array([0.3989])
    """
    density = np.zeros(len(grid))
    for start in range(0, len(nodes), 1024):
        part = slice(start, start + 1024)
        kernel = np.exp(-0.5 * ((grid[:, None] - nodes[None, part]) / sigma) ** 2)
        density += kernel @ masses[part]
    return density / (sigma * np.sqrt(2 * np.pi))


def density_of(
    nodes: list[np.ndarray],
    masses: list[np.ndarray],
    sigma: float | None,
    *,
    exact: bool,
    resampled: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Smooth the quadrature of every probe and average over probes.

    Args:
        nodes: Of each probe, shape (n,). None of them: no density.
        masses: Of each probe, shape (n,), summing to 1.
        sigma: Width of the Gaussians, > 0, the unit of ``nodes``. None: 1 % of the range of the nodes.
        exact: Whether the one set of nodes is the spectrum itself, which leaves no error of probes.
        resampled: Nodes and masses on examples drawn anew: one for each probe, or several for an exact spectrum. Their
            scatter about the others is the error of the choice of examples, which is added in squares.

    Returns:
        The grid, the density, the half-widths of its 99 % intervals, and the width of the Gaussians.
    """
    if not nodes:
        return np.empty(0), np.empty(0), np.empty(0), sigma or 0.0
    low, high = min(n.min() for n in nodes), max(n.max() for n in nodes)
    width = sigma or 0.01 * max(high - low, 1e-3 * abs(high), 1e-12)
    grid = np.linspace(low - 4 * width, high + 4 * width, _GRID)
    curves = np.array([smoothed_density(n, m, grid, width) for n, m in zip(nodes, masses, strict=True)])
    others = np.array([smoothed_density(n, m, grid, width) for n, m in resampled])
    # A draw differs from its own probe by what other examples change alone.
    examples = ((others - curves) ** 2).mean(0) if len(others) else np.zeros(_GRID)
    factor = student(len(others)) if len(others) else 0.0
    if exact:
        return grid, curves[0], np.sqrt(examples) * factor, width
    mean, stderr, dof = mean_and_stderr(torch.from_numpy(curves))
    return grid, mean.numpy(), np.hypot(stderr.numpy() * student(dof), np.sqrt(examples) * factor), width
