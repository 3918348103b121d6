"""The talk's landscape, what smooths it, where descents on it end, and the cartoon of wide and narrow valleys."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_entropy.pde import cole_hopf, fokker_planck, hopf_lax, local_minima
from recipes.smoothing.colours import BLUE, GREEN, ORANGE

Array = NDArray[np.float64]

CELLS = 500
FARTHEST = 1e6  # end of a domain
NARROWEST = 1e-2  # domain
LARGEST = 1e12  # loss; beyond, a step of time is lost in rounding


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


def setup(f: Callable[[Array], Array] | None = None, domain: tuple[float, float] = (-3.0, 3.0)) -> Setup:
    """Return the talk's landscape, or a landscape of one's own with the same start.

    The talk's f is x^2 + 1.5 sin(2 pi x) + rough, the last being 5 (U[0, 1] - 1/2) smoothed by a Gaussian of deviation
    0.03; 32 local minima, the lowest at -0.162. The start is a Gaussian of deviation width/60, cut at 4.2 deviations,
    11/12 of the way to the right: deviation 0.1 around 2.5.

    Args:
        f: a landscape; None for the talk's.
        domain: left and right end.

    Raises:
        ValueError: if f is not finite on the domain or beyond ``LARGEST``, or the domain is empty, narrower than
            ``NARROWEST`` or ends beyond ``FARTHEST``.
    """
    left, right = domain
    if not (math.isfinite(left) and math.isfinite(right) and left < right):
        raise ValueError(f"domain must be finite and increasing, got {left} {right}")
    if max(-left, right) > FARTHEST or right - left < NARROWEST:
        raise ValueError(
            f"domain must lie in [{-FARTHEST:g}, {FARTHEST:g}] and be {NARROWEST:g} wide or more, got {left} {right}"
        )
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
        if np.abs(values).max() > LARGEST:
            raise ValueError(f"f must be in [{-LARGEST:g}, {LARGEST:g}], got {values[np.abs(values).argmax()]:g}")
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
