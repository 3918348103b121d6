"""Does SGD walk in circles: the spectrum, the memory and the circulation of a path of weights."""

import math
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from lightning_entropy.diagnostics.trajectory.control import ou_control
from lightning_entropy.diagnostics.trajectory.current import autocorrelation, probability_current
from lightning_entropy.diagnostics.trajectory.result import TrajectoryResult

LEAST_SNAPSHOTS = 64


def analyse_trajectory(
    snapshots: Tensor | np.ndarray,
    *,
    interval: int = 1,
    components: int = 4,
    gradient_norms: Iterable[float] = (),
    seed: int = 0,
) -> TrajectoryResult:
    r"""Analyse a path of weights: is it equilibrium noise, or does it circulate?

    The Fourier spectrum of the increments x(t+1) - x(t) and the autocorrelation of the weights are those of Chaudhari &
    Soatto 2018 (arXiv:1710.11029), figure 3, each weight scaled to increments of unit variance. Low frequencies and
    long memory do not tell SGD from a slow reversible process, so both are set beside a control: every weight's own
    Ornstein-Uhlenbeck process, fitted by its first autocorrelation, simulated over as many steps. What does tell is
    the probability current (:func:`~lightning_entropy.diagnostics.trajectory.current.probability_current`) in the
    planes of the leading principal components. All of it supposes a stationary path: discard the descent.

    Args:
        snapshots: Shape (n, d), n >= 64 snapshots at even intervals of d >= 2 weights.
        interval: Steps between snapshots, >= 1.
        components: Principal components in whose planes to look for a current, >= 2; cut to d.
        gradient_norms: One for each snapshot, kept for the plot.
        seed: Of the control and of the test.

    Returns:
        Spectra, autocorrelations and currents of path and control.

    Raises:
        ValueError: If the path is too small or not finite.

    Example:
        >>> turn = np.arange(1000)[:, None] * np.pi / 8
        >>> noise = np.random.default_rng(0).normal(size=(1000, 3)) / 10
        >>> found = analyse_trajectory(np.hstack([np.cos(turn), np.sin(turn), 0 * turn]) + noise)
        >>> found.current.p_value < 0.01, found.control_current.p_value > 0.01
        (True, True)
    """
    path = np.asarray(snapshots.cpu() if isinstance(snapshots, Tensor) else snapshots, dtype=float)
    if path.ndim != 2 or len(path) < LEAST_SNAPSHOTS or path.shape[1] < 2:
        raise ValueError(f"snapshots must be at least {LEAST_SNAPSHOTS} of at least 2 weights, got shape {path.shape}")
    if not np.isfinite(path).all():
        raise ValueError("snapshots must be finite, got a NaN or an infinity")
    if interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}")
    if components < 2:
        raise ValueError(f"components must be at least 2, got {components}")

    n = len(path)
    rng = np.random.default_rng(seed)
    control = ou_control(path, rng)
    amplitudes, spread = _spectrum(path)
    memory, memory_spread = _memory(path)
    scores, explained = _principal(path, components)
    # The scores' own controls: reversible, with each component's size and memory.
    turned = probability_current(ou_control(scores, rng), seed=seed)
    return TrajectoryResult(
        weights=path.shape[1],
        snapshots=n,
        interval=interval,
        frequencies=np.fft.rfftfreq(n - 1)[1:] / interval,
        amplitudes=amplitudes,
        amplitude_stds=spread,
        control_amplitudes=_spectrum(control)[0],
        lags=np.arange(n // 2) * interval,
        autocorrelations=memory,
        autocorrelation_stds=memory_spread,
        control_autocorrelations=_memory(control)[0],
        components=scores,
        explained=explained,
        current=probability_current(scores, seed=seed),
        control_current=turned,
        gradient_norms=np.asarray(list(gradient_norms), dtype=float),
    )


def _spectrum(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = np.diff(path, axis=0)
    steps = steps - steps.mean(0)
    scale = steps.std(0)
    steps = steps[:, scale > 0] / scale[scale > 0]
    if steps.shape[1] == 0:
        raise ValueError("snapshots must move, got a path that stands still")
    amplitude = np.abs(np.fft.rfft(steps, axis=0))[1:] / math.sqrt(len(steps))
    return amplitude.mean(1), amplitude.std(1)


def _memory(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rho = autocorrelation(path)
    return np.nanmean(rho, 1), np.nanstd(rho, 1)


def _principal(path: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Project on the leading components; each one's largest loading is positive, which fixes the sense of a turn."""
    x = path - path.mean(0)
    left, sizes, right = np.linalg.svd(x, full_matrices=False)
    count = min(count, x.shape[1])
    signs = np.sign(right[range(count), np.abs(right[:count]).argmax(1)])
    return left[:, :count] * sizes[:count] * signs, sizes[:count] ** 2 / (sizes**2).sum()
