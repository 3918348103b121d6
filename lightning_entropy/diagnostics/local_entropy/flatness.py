"""The flatness profile: how much the loss rises at random points around the minimum."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.estimate import Estimate, GroupValues, mean_and_stderr
from lightning_entropy.diagnostics.examples import Batch, BatchDim, Examples
from lightning_entropy.diagnostics.figures import axes_for
from lightning_entropy.diagnostics.groups import Groups
from lightning_entropy.diagnostics.loss import Loss
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FlatnessProfile:
    """E f(x + sigma N(0, I)) - f(x) over a grid of sigma.

    Args:
        sigmas: Standard deviations of the noise on every weight, ascending.
        rises: The mean rise of the loss at each.
        errors: Half-widths of their 99 % intervals: of the draws and, with groups, of the choice of examples.
        draws: The same, with the error of the draws alone.
        groups: Each rise on groups of the examples; empty without groups.
    """

    sigmas: np.ndarray
    rises: np.ndarray
    errors: np.ndarray
    draws: tuple[Estimate, ...] = ()
    groups: tuple[GroupValues, ...] = ()

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the rise of the loss against sigma, both logarithmic, with error bars."""
        ax = axes_for(ax)
        draw_rises(ax, self.sigmas, self.rises, self.errors, "o-", "tab:blue", "under Gaussian noise on every weight")
        positive = self.rises > 0
        if positive.any():
            # In a quadratic valley the rise is sigma^2 tr(H) / 2.
            s, r = self.sigmas[positive], self.rises[positive]
            label = r"$\propto\sigma^2$: a quadratic valley"
            ax.plot(s, r[0] * (s / s[0]) ** 2, "--", lw=1, color="tab:gray", label=label)
        finish_rises(ax)
        ax.set_xlabel(r"standard deviation $\sigma$ of the noise on every weight")
        return ax.figure, ax  # type: ignore[return-value]


def flatness_profile(
    module: nn.Module,
    data: Iterable[Batch],
    sigmas: Iterable[float],
    *,
    draws: int = 16,
    loss: Loss | None = None,
    examples: Examples = None,
    batch_dim: BatchDim = None,
    mode: str = "eval",
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
    groups: int = 0,
) -> FlatnessProfile:
    r"""Measure E f(x + sigma N(0, I)) - f(x) over a grid of sigma, from antithetic pairs x +- sigma xi.

    For small sigma it is sigma^2 tr(H) / 2. The same xi serve every sigma, so the curve is smooth and its points err
    together.

    Args:
        module: The network, at the weights to measure.
        data: A loader or an iterable of batches.
        sigmas: Standard deviations of the noise on every weight, each > 0.
        draws: Pairs, >= 2. Each costs two passes over the data for every sigma.
        loss: ``(module, batch) -> scalar``, a mean over the batch. None: cross entropy.
        examples: How many examples of ``data``; or a callable from a batch to its number of them, and all are taken.
            None: all, counted by the tensors' sizes.
        batch_dim: Dimension of the tensors that counts examples, or a callable from a batch to it. None: that of the
            one size that they share.
        mode: "eval" or "train" for BatchNorm and dropout.
        seed: Of noise and examples.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.
        groups: Of examples, for the error that the choice of examples makes: 0, or >= 2.

    Returns:
        The profile, with 99 % error bars.

    Raises:
        ValueError: If an argument is out of range, or as for :func:`local_entropy`.

    Example:
        >>> net, data = nn.Linear(1, 1, bias=False), [torch.ones(1, 1)]
        >>> found = flatness_profile(net, data, [0.1], loss=lambda m, x: 2 * m(x).square().sum(), draws=500)
        >>> bool(abs(found.rises[0] - 0.02) < found.errors[0])    # f = 2 w^2, so the rise is 2 sigma^2
        True
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    grid = grid_of(sigmas)
    with untouched(module, mode, seed):
        surface = LossSurface(
            module,
            data,
            loss=loss,
            examples=examples,
            batch_dim=batch_dim,
            mode=mode,
            seed=seed,
            state=state,
            transfer=transfer,
        )
        generator = torch.Generator(surface.device).manual_seed(seed)
        return profile_of(surface, grid, draws, generator, Groups(surface, groups))


def grid_of(sigmas: Iterable[float]) -> np.ndarray:
    """Sort the grid of a profile, and refuse a bad one before anything is measured.

    Raises:
        ValueError: If there is no sigma or one is not positive.

    Example:
        >>> grid_of([0.2, 0.1])
        array([0.1, 0.2])
    """
    grid = np.sort(np.array(list(sigmas), dtype=float))
    if len(grid) == 0 or not grid[0] > 0:
        raise ValueError(f"sigmas must be positive numbers, got {grid.tolist()}")
    return grid


def profile_of(
    surface: LossSurface, grid: np.ndarray, draws: int, generator: torch.Generator, groups: Groups | None = None
) -> FlatnessProfile:
    """Average f(x +- sigma xi) - f(x) over pairs, with the same xi at every sigma."""
    x, rows = surface.weights, []
    divided = groups is not None and len(groups) > 0

    def evaluate(w: Tensor) -> Tensor:
        return groups.losses(w) if groups is not None and divided else surface.evaluate(w)[None]

    base = evaluate(x)
    shares = groups.shares if groups is not None and divided else np.ones(1)
    for _ in range(draws):
        noise = torch.randn(len(x), generator=generator, device=x.device, dtype=x.dtype)
        pairs = [(evaluate(x + s * noise), evaluate(x - s * noise)) for s in grid]
        rows.append(torch.stack([(plus + minus) / 2 - base for plus, minus in pairs]))
    every = torch.stack(rows).cpu()  # (draws, sigmas, groups)
    mean, stderr, dof = mean_and_stderr(every @ torch.from_numpy(shares))
    own = tuple(Estimate(float(m), float(s), dof) for m, s in zip(mean, stderr, strict=True))
    by_group = tuple(GroupValues(values.numpy(), shares) for values in every.mean(0)) if divided else ()
    whole = [e.widened(g.estimate) for e, g in zip(own, by_group, strict=True)] if divided else own
    return FlatnessProfile(grid, mean.numpy(), np.array([e.error for e in whole]), own, by_group)


def draw_rises(
    ax: "Axes", x: np.ndarray, rises: np.ndarray, errors: np.ndarray, style: str, color: str, label: str
) -> None:
    """Draw the positive rises with error bars; one that reaches zero has no end on a logarithmic axis."""
    shown = rises > 0
    bars = np.minimum(errors, 0.9 * rises)[shown], errors[shown]
    if shown.any():
        ax.errorbar(x[shown], rises[shown], bars, fmt=style, ms=3.5, lw=1.2, capsize=2, color=color, label=label)
        ax.fill_between(x[shown], rises[shown] - bars[0], rises[shown] + bars[1], color=color, alpha=0.15, lw=0)


def finish_rises(ax: "Axes") -> None:
    """Make both axes logarithmic, label them, and leave room for the legend."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylabel("mean rise of the loss above f(x)")
    ax.autoscale(axis="y")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=9, loc="upper left")
        # A decade at least, so that ticks are powers of ten, and room for the legend above.
        low, high = ax.get_ylim()
        ax.set_ylim(low / 2, max(5 * high, 10 * low))
    else:
        ax.text(0.5, 0.5, "no rise of the loss", transform=ax.transAxes, ha="center")
