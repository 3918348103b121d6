r"""Smoothing with PDEs, the picture that explains the rest: what local entropy does to a landscape, and to SGD on it.

    python -m recipes.smoothing --out smoothing.png
    python -m recipes.smoothing --out mine.png --f "x**2 + 1.5*sin(2*pi*x)"
    python -m recipes.smoothing --out smoothing.png --animate smoothing.gif

Left: the landscape f of Deep Relaxation, u viscous (local entropy, beta = 1, t = 0.2) and u non-viscous (Hopf-Lax,
t = 0.1); below, where noisy descent from x = 2.5 ends after time 10 on f, and on u(., t) as t runs back to zero, all at
*the same* temperature 0.1. The slide this follows gave plain SGD 0.2, because its scheme blew up at 0.1.

Right: local entropy picks a wide valley over a deeper narrow one; steered and unsteered particles; a double well whose
density is at rest while its mass goes round.
"""

import argparse
import ast
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import animation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from simpleeval import InvalidExpression, SimpleEval
from tqdm import tqdm

from lightning_entropy.pde import (
    DoubleWell,
    cole_hopf,
    controlled_sde,
    fokker_planck,
    hopf_lax,
    local_minima,
)

Array = NDArray[np.float64]

# Okabe and Ito's colours, told apart in every common kind of colour blindness, and a grey.
BLACK, ORANGE, BLUE, GREEN, RED, PURPLE, GREY = (
    "#222222",
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#999999",
)

FUNCTIONS: dict[str, np.ufunc] = {
    "abs": np.abs,
    "cos": np.cos,
    "exp": np.exp,
    "log": np.log,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}

CELLS = 500
FRAMES = 60


@dataclass(frozen=True)
class Setup:
    """The set-up of the talk's picture.

    Attributes:
        x: centres of 500 cells.
        f: the landscape at ``x``, loss.
        rho0: the initial density, mass one.
        viscous_time: t of the viscous u, weight^2/loss.
        inviscid_time: t of the non-viscous u.
        beta: inverse temperature of the viscous equation.
        diffusion: temperature of all three populations, loss.
        duration: how long they descend.
        snapshots: of u(., t), from t down to zero; linear between.
    """

    x: Array
    f: Array
    rho0: Array
    viscous_time: float = 0.2
    inviscid_time: float = 0.1
    beta: float = 1.0
    diffusion: float = 0.1
    duration: float = 10.0
    snapshots: int = 10

    @property
    def dx(self) -> float:
        """Width of a cell."""
        return float(self.x[1] - self.x[0])


@dataclass(frozen=True)
class Descent:
    """One population: the moving potential it descends and where it is.

    Attributes:
        name: for the legend.
        colour: for the lines.
        potentials: the snapshots of u, the first at the start, shape (snapshots, n).
        times: of the densities.
        densities: shape (len(times), n).
    """

    name: str
    colour: str
    potentials: Array
    times: Array
    densities: Array

    def potential(self, s: float) -> Array:
        """Return the potential at time s, linear between snapshots."""
        place = s / self.times[-1] * (len(self.potentials) - 1)
        i = min(int(place), max(len(self.potentials) - 2, 0))
        later = min(i + 1, len(self.potentials) - 1)
        return self.potentials[i] + (place - i) * (self.potentials[later] - self.potentials[i])


def parse(expression: str) -> Callable[[Array], Array]:
    """Turn an expression in x into a function, by a parser that knows arithmetic and ``FUNCTIONS`` and nothing else.

    Args:
        expression: of ``x``, ``pi``, ``e``, numbers, + - * / ** and the names in ``FUNCTIONS``.

    Returns:
        The function, from an array to an array of the same shape.

    Raises:
        ValueError: on anything else (an attribute, an index, a keyword, an unknown name).

    Example:
        >>> parse("x**2 + 1")(np.array([0.0, 2.0]))
        array([1., 5.])
        >>> parse("x.__class__")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: f may use ..., got 'x.__class__': Sorry, Attribute is not available in this evaluator
    """
    arithmetic = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: np.divide,
        ast.Pow: np.float_power,  # of integers Python's own power would compute for ever
        ast.USub: operator.neg,
        ast.UAdd: operator.pos,
    }
    grammar = (ast.Expr, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Constant)
    functions = {name: _fixed_arity(ufunc) for name, ufunc in FUNCTIONS.items()}
    allowed = f"f may use x, pi, e, numbers, + - * / ** and {', '.join(FUNCTIONS)}, got {expression!r}"

    def function(x: Array) -> Array:
        names = {"x": x, "pi": math.pi, "e": math.e}
        evaluator = SimpleEval(operators=arithmetic, functions=functions, names=names)
        # simpleeval's own grammar has attributes, and an array's methods write files.
        evaluator.nodes = {node: rule for node, rule in evaluator.nodes.items() if node in grammar}
        try:
            ast.parse(expression.strip(), mode="eval")  # one expression, no statement
            with np.errstate(all="ignore"):
                return np.asarray(evaluator.eval(expression), dtype=np.float64) + np.zeros_like(x)
        except (InvalidExpression, SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{allowed}: {error}") from None

    function(np.array([1.0, 2.0]))
    return function


def _fixed_arity(ufunc: np.ufunc) -> Callable[..., Any]:
    """A ufunc without its ``out`` argument."""

    def function(*values: Any) -> Any:
        if len(values) != ufunc.nin:
            raise TypeError(f"{ufunc.__name__} takes {ufunc.nin} arguments, got {len(values)}")
        return ufunc(*values)

    return function


def setup(f: Callable[[Array], Array] | None = None, domain: tuple[float, float] = (-3.0, 3.0)) -> Setup:
    """Return the talk's landscape, or a landscape of one's own with the same start.

    The talk's f is x^2 + 1.5 sin(2 pi x) + rough, the last being 5 (U[0, 1] - 1/2) smoothed by a Gaussian of deviation
    0.03; 32 local minima, the lowest at -0.162. The start is a Gaussian of deviation width/60, cut at 4.2 deviations,
    11/12 of the way to the right: deviation 0.1 around 2.5.

    Args:
        f: a landscape; None for the talk's.
        domain: left and right end.

    Raises:
        ValueError: if f is not finite on the domain, or the domain is empty.
    """
    left, right = domain
    if not (math.isfinite(left) and math.isfinite(right) and left < right):
        raise ValueError(f"domain must be finite and increasing, got {left} {right}")
    x = np.linspace(left, right, CELLS)
    dx = float(x[1] - x[0])
    if f is None:
        uniform = np.random.RandomState(42).rand(CELLS)
        window = np.exp(-(x**2) / (2 * 0.03**2))
        values = x**2 + 1.5 * np.sin(2 * np.pi * x) + np.convolve(5 * (uniform - 0.5), window / window.sum(), "same")
    else:
        values = f(x)
        if not np.isfinite(values).all():
            raise ValueError(f"f must be finite on [{left:g}, {right:g}], got {values[~np.isfinite(values)][0]}")
    deviation = (right - left) / 60
    distance = x - (left + (right - left) * 11 / 12)
    rho0 = np.exp(-(distance**2) / (2 * deviation**2)) * (np.abs(distance) < 3 * math.sqrt(2) * deviation)
    return Setup(x, values, rho0 / (rho0.sum() * dx))


def descend(talk: Setup, frames: int = 1) -> tuple[Descent, Descent, Descent]:
    """Return the three populations: plain SGD on f, and descents on u viscous and u non-viscous in reverse time.

    Args:
        talk: the set-up.
        frames: how many densities, equally spaced in time and the last at the end, to keep.
    """
    back = np.linspace(1, 0, talk.snapshots)[:-1]
    viscous = [cole_hopf(talk.f, talk.viscous_time * r, talk.dx, talk.beta) for r in back] + [talk.f]
    inviscid = [hopf_lax(talk.f, talk.inviscid_time * r, talk.dx)[0] for r in back] + [talk.f]
    times = talk.duration * np.arange(1, frames + 1) / frames

    def population(name: str, colour: str, potentials: list[Array]) -> Descent:
        moving = Descent(name, colour, np.array(potentials), times, np.empty(0))
        densities = fokker_planck(
            talk.rho0, times, talk.dx, diffusion=talk.diffusion, potential=moving.potential, dt=talk.duration / 1000
        )
        return replace(moving, densities=densities)

    return (
        population("f (SGD)", ORANGE, [talk.f]),
        population("u viscous", BLUE, viscous),
        population("u non-viscous", GREEN, inviscid),
    )


def numbers(talk: Setup, descents: Sequence[Descent]) -> list[dict[str, float | str]]:
    """Return, for every population, the minima it starts on, and its mean, deviation, mode and loss at the end."""
    best = talk.x[talk.f.argmin()]
    rows: list[dict[str, float | str]] = []
    for descent in descents:
        weights = descent.densities[-1] * talk.dx
        mean = float(weights @ talk.x)
        rows.append(
            {
                "name": descent.name,
                "minima": len(local_minima(descent.potentials[0])),
                "argmin": float(talk.x[descent.potentials[0].argmin()]),
                "mean": mean,
                "sd": math.sqrt(float(weights @ (talk.x - mean) ** 2)),
                "mode": float(talk.x[weights.argmax()]),
                "near_minimum": float(weights[np.abs(talk.x - best) <= 0.25].sum()),
                "loss": float(weights @ talk.f),
            }
        )
    return rows


def valleys(seed: int = 0) -> Array:
    """Return the cartoon of Entropy-SGD's Figure 2: a wide valley at 200-400 and a deeper, narrow one at 800-820.

    1000 points: -10 U[0, 1], the wide valley at -80, the narrow one at -200, one point in ten a spike of -100;
    all times 5e-4 and summed over a Gaussian window of deviation 10.
    """
    generator = np.random.default_rng(seed)
    f = -10 * generator.random(1000)
    f[200:400] = -80
    f[800:820] = -200
    f[generator.choice(1000, 100, replace=False)] = -100
    window = np.exp(-0.5 * ((np.arange(100) - 49.5) / 10) ** 2)
    return np.convolve(5e-4 * f, window, "same")


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
    """Return the top of the middle third of the landscape: there a control has most to say."""
    third = len(talk.x) // 3
    return float(talk.x[third + talk.f[third:-third].argmax()])


def draw_double_well(axes: Axes, strength: float) -> None:
    """Draw the density, the current that leaves it at rest, and paths without noise."""
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


def animate(talk: Setup, path: Path, frames: int) -> None:
    """Write a GIF or an MP4 of u and of the populations on it as time runs.

    Raises:
        ValueError: on another suffix, or for MP4 where there is no ffmpeg.
    """
    check_animation(path)
    descents = descend(talk, frames)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
        above.plot(talk.x, talk.f, color=GREY, lw=1, label="f")
        below.fill_between(talk.x, talk.rho0, color=GREY, alpha=0.5, lw=0, label="start")
        curves = []
        for descent in descents:
            (u,) = above.plot(talk.x, descent.potentials[0], color=descent.colour, lw=2)
            (rho,) = below.plot(talk.x, talk.rho0, color=descent.colour, lw=2, label=descent.name)
            u.set_visible(len(descent.potentials) > 1)
            curves.append((u, rho))
        below.set_ylim(0, 1.05 * max(talk.rho0.max(), *(d.densities[-1].max() for d in descents)))
        below.set_xlim(talk.x[0], talk.x[-1])
        below.set_xlabel("x")
        below.set_ylabel("density")
        above.set_ylabel("loss")
        below.legend(loc="upper left", frameon=False)
        title = above.set_title("", loc="left")

        def update(frame: int) -> list[Any]:
            now = frame / frames * talk.duration
            for (u, rho), descent in zip(curves, descents, strict=True):
                u.set_ydata(descent.potential(now))
                rho.set_ydata(descent.densities[frame - 1] if frame else talk.rho0)
            title.set_text(f"u(., t) as t runs back to 0; time {now:.1f} of {talk.duration:g}")
            return [title, *(curve for pair in curves for curve in pair)]

        film = animation.FuncAnimation(figure, update, frames=frames + 1)
        writer = "pillow" if path.suffix == ".gif" else "ffmpeg"
        with tqdm(total=frames + 1, desc=str(path), unit="frame") as bar:
            film.save(path, writer=writer, fps=12, dpi=90, progress_callback=lambda frame, total: bar.update())
        plt.close(figure)


def check_animation(path: Path) -> None:
    """Refuse a path that ``animate`` cannot write, before anything is computed."""
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"animate must end in .gif or .mp4, got {path}")
    if path.suffix == ".mp4" and not animation.writers.is_available("ffmpeg"):
        raise ValueError(f"animate to .mp4 needs ffmpeg on the PATH; .gif does not, got {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, draw, and print the numbers of the picture."""
    parser = argparse.ArgumentParser(prog="python -m recipes.smoothing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("smoothing.png"), help="picture to write (png, pdf, svg)")
    parser.add_argument("--f", metavar="EXPR", help='your own landscape, such as "x**2 + 1.5*sin(2*pi*x)"')
    parser.add_argument("--domain", type=float, nargs=2, default=(-3.0, 3.0), metavar=("LEFT", "RIGHT"))
    parser.add_argument("--animate", type=Path, metavar="FILE", help="also write a GIF or MP4 of u and the densities")
    options = parser.parse_args(arguments)
    try:
        if options.animate:
            check_animation(options.animate)
        talk = setup(None if options.f is None else parse(options.f), tuple(options.domain))
    except ValueError as error:
        parser.error(str(error))

    with tqdm(total=7, desc=str(options.out), unit="panel") as bar:
        descents = descend(talk)
        bar.update()
        figure = draw(talk, descents, bar)
        figure.savefig(options.out, dpi=90)
        plt.close(figure)
    if options.animate:
        animate(talk, options.animate, FRAMES)

    print(f"f: {len(local_minima(talk.f))} local minima, lowest {talk.f.min():.3f} at {talk.x[talk.f.argmin()]:.3f}")
    for row in numbers(talk, descents):
        print(
            f"{row['name']:<12} starts on {row['minima']} minima (argmin {row['argmin']:.3f}); ends at mean "
            f"{row['mean']:.3f}, sd {row['sd']:.3f}, mode {row['mode']:.3f}, E f {row['loss']:.3f}, "
            f"{row['near_minimum']:.1%} within 0.25 of the minimum"
        )


if __name__ == "__main__":
    main()
