"""The picture's panels."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from lightning_entropy.pde import DoubleWell, cole_hopf, controlled_sde, local_minima
from recipes.smoothing.colours import BLACK, BLUE, GREEN, GREY, ORANGE, RED
from recipes.smoothing.talk import Descent, Setup, numbers, valleys


def draw_smoothing(above: Axes, below: Axes, talk: Setup, descents: Sequence[Descent]) -> None:
    """Draw the talk's picture: f and u above, where the populations start and end below."""
    _, viscous, inviscid = descents
    above.plot(talk.x, talk.f, color=GREY, lw=1.1, label="f")
    above.plot(talk.x, viscous.potentials[0], color=BLUE, lw=2, label=f"u viscous, t = {talk.viscous_time:g}")
    above.plot(talk.x, inviscid.potentials[0], color=GREEN, lw=2, label=f"u non-viscous, t = {talk.inviscid_time:g}")
    above.plot(talk.x[talk.f.argmin()], talk.f.min(), "v", color=BLACK, ms=8, label="global minimum of f")
    above.set_ylabel("loss")
    above.legend(loc="upper center", frameon=False)
    before, after = len(local_minima(talk.f)), len(local_minima(viscous.potentials[0]))
    above.set_title(f"Smoothing with PDEs: local minima {before} before, {after} after", loc="left", weight="bold")

    below.fill_between(talk.x, talk.rho0, color=GREY, alpha=0.5, lw=0, label="(the start)")
    for row, descent in zip(numbers(talk, descents), descents, strict=True):
        label = f"{descent.name}: mean {row['mean']:.2f}, {row['near_minimum']:.0%} at the minimum"
        below.plot(talk.x, descent.densities[-1], color=descent.colour, lw=2, label=label)
    below.plot(talk.x[talk.f.argmin()], 0, "^", color=BLACK, ms=8, clip_on=False, zorder=5)
    below.set_xlim(talk.x[0], talk.x[-1])
    below.set_ylim(0, 1.5 * max(talk.rho0.max(), *(descent.densities[-1].max() for descent in descents)))
    below.set_xlabel("x")
    below.set_ylabel("density")
    title = f"After time {talk.duration:g} of noisy descent at temperature {talk.diffusion:g}, on"
    below.legend(loc="upper left", frameon=False, title=title, alignment="left")


def draw_valleys(axes: Axes) -> None:
    """Draw local entropy magnifying the wide valley."""
    f = valleys()
    axes.plot(f, color=GREY, lw=1.2, label="f")
    axes.plot(f.argmin(), f.min(), "v", color=GREY, ms=8)
    for gamma, colour in ((1e-3, RED), (5e-5, BLUE)):
        u = cole_hopf(f, 1 / gamma, 1.0)
        axes.plot(u, color=colour, lw=2, label=rf"local entropy, $\gamma$ = {gamma:g}")
        axes.plot(u.argmin(), u.min(), "v", color=colour, ms=8)
    axes.set_xlim(0, 1000)
    axes.set_xticks([])
    axes.set_ylabel("loss")
    axes.legend(loc="lower center", bbox_to_anchor=(0.6, 0.0), frameon=False)
    axes.set_title("A wide valley wins over a deeper, narrow one", loc="left", weight="bold")


def draw_control(axes: Axes, beside: Axes, talk: Setup, x0: float) -> None:
    """Draw particles with and without the optimal control over u(x, T - s), and beside them where they end."""
    T = talk.viscous_time
    left = float(talk.x[0])
    free, steered = (
        controlled_sde(
            talk.f, T, talk.beta, x0, talk.dx, left=left, controlled=controlled, particles=10_000, kept=9, seed=seed
        )
        for controlled, seed in ((False, 1), (True, 2))
    )
    s = np.linspace(0, T, 60)
    field = np.array([cole_hopf(talk.f, T - now, talk.dx, talk.beta) if now < T else talk.f for now in s])
    near = np.abs(talk.x - x0) < 1.7
    axes.contourf(s, talk.x[near], field[:, near].T, levels=10, cmap="Greys", vmax=2 * field[:, near].max())
    bins = np.linspace(x0 - 1.7, x0 + 1.7, 69)
    for run, colour, label in ((free, ORANGE, "no control"), (steered, BLUE, r"control $-\nabla u$")):
        axes.plot(run.times, run.paths, color=colour, lw=1)
        axes.plot([], [], color=colour, label=f"{label}: E f(x(T)) = {run.terminal.mean():.2f}")
        beside.hist(run.final, list(bins), orientation="horizontal", color=colour, histtype="step", lw=1.5)
    axes.set_xlabel("time s, over u(x, T - s)")
    axes.set_ylabel("x")
    axes.set_xlim(0, T)
    axes.set_ylim(bins[0], bins[-1])
    beside.set_xticks([])
    beside.set_xlabel("x(T)")
    value = rf"E[f + effort] = {steered.value:.2f} $\pm$ {steered.standard_error:.2f}"
    exact = float(np.interp(x0, talk.x, field[0]))
    axes.legend(loc="lower left", framealpha=0.9, title=f"{value}, u = {exact:.2f}", alignment="left")
    axes.set_title("u is the least cost of steering noise downhill", loc="left", weight="bold")


def hill(talk: Setup) -> float:
    """Return the top of the middle third of the landscape, where a control matters most."""
    third = len(talk.x) // 3
    return float(talk.x[third + talk.f[third:-third].argmax()])


def draw_double_well(axes: Axes, strength: float) -> None:
    """Draw the density, the current that leaves it unchanged, and paths without noise."""
    well = DoubleWell(strength)
    line = np.linspace(-2, 2, 121)
    grid = np.stack(np.meshgrid(line, line), axis=-1)
    axes.contourf(line, line, well.density(grid), levels=8, cmap="Greys", vmax=0.35)
    starts = np.array([[1.8, 1.2], [-1.8, -1.2], [0.3, 1.8], [-0.3, -1.8]])
    paths = well.trajectory(starts, 12.0)
    axes.plot(paths[..., 0], paths[..., 1], color=BLUE, lw=1.2)
    axes.plot(starts[:, 0], starts[:, 1], "o", color=BLUE, ms=3)
    if strength:
        circulation = well.probability_current(grid)
        axes.streamplot(
            line, line, circulation[..., 0], circulation[..., 1], color=RED, linewidth=0.6, density=0.45, arrowsize=0.8
        )
    rest = well.equilibria() if len(well.equilibria()) else np.zeros((1, 2))
    axes.plot(rest[:, 0], rest[:, 1], "*", color=BLACK, ms=8)
    axes.set_aspect("equal")
    axes.set_xlim(-2, 2)
    axes.set_ylim(-2, 2)
    axes.set_xticks([-1, 0, 1])
    axes.set_yticks([-1, 0, 1])
    axes.set_title(rf"$\lambda$ = {strength:g}", fontsize=9, pad=3)


def draw(talk: Setup, descents: Sequence[Descent], bar: "tqdm[Any]") -> Figure:
    """Draw the whole picture."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(13.5, 8.6), layout="constrained")
        ((left, right),) = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.2, 1))
        above, below = left.subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
        draw_smoothing(above, below, talk, descents)
        bar.update()
        (top,), (middle,), (bottom,) = right.subfigures(3, 1, squeeze=False, height_ratios=(1, 1.1, 1.15))
        draw_valleys(top.subplots())
        bar.update()
        axes, beside = middle.subplots(1, 2, sharey=True, width_ratios=(4, 1))
        draw_control(axes, beside, talk, x0=hill(talk))
        bar.update()
        for axes, strength in zip(bottom.subplots(1, 3), (0.0, 0.5, 1.5), strict=True):
            draw_double_well(axes, strength)
            bar.update()
        bottom.suptitle("A current leaves the density (grey) alone, not the descent", weight="bold", x=0.02, ha="left")
        axes.plot([], [], color=BLUE, label="descent without noise")
        axes.plot([], [], "*", color=BLACK, ls="", label="where it ends")
        axes.plot([], [], color=RED, label="stationary current")
        bottom.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
