"""A double well out of equilibrium: a circulating current that does not change the stationary density."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import root

from lightning_entropy.pde.grid import Array, positive


@dataclass(frozen=True)
class DoubleWell:
    r"""The diffusion dx = (-grad Phi + j) dt + sqrt(2) dW in the plane, with a current j of strength lambda.

        Phi = (x1^2 - 1)^2 / 4 + x2^2 / 2,   j = lambda e^Phi J,   J = exp(-|x|^4 / 4) (-x2, x1).

    The limit-cycle paper's model of SGD with anisotropic noise (Example 19, Figure 4): its density is that of Phi, its
    motion is not gradient descent.

    What holds, for every lambda: div J = 0, so the stationary density is e^{-Phi} / Z, and the current
    j e^{-Phi} = lambda J / Z carries mass along circles about the origin. The system is out of equilibrium, and its
    density does not show it.

    What does not hold: the paper assumes div j = 0 (Assumption 4), but here div j = j . grad Phi =
    lambda e^{Phi - |x|^4 / 4} x1 x2 (2 - x1^2). So its Lemma 7, that the most likely paths follow x' = j, does not
    apply: without noise a path follows ``force``, -grad Phi + j, whose equilibria are not the minima (+-1, 0) of Phi
    but +-(0.902, 0.389) at lambda = 1/2. The origin is a saddle below lambda = e^{-1/4} = 0.779 and a linear centre
    above. At the paper's lambda = 1.5, friction of higher order wins and every path spirals into the origin, with a
    radius of order t^{-1/2}. There is no limit cycle: the closed loops in the figure are streamlines of the current.

    Attributes:
        strength: lambda, dimensionless, finite, any sign; 0 is gradient descent with noise.

    Raises:
        ValueError: if ``strength`` is not finite.

    Example:
        >>> DoubleWell(1.0).force([0.0, 1.0]).round(6)  # (-e^{1/4} e^{1/2} e^{-1/4}, -1)
        array([-1.648721, -1.      ])

    References:
        Chaudhari and Soatto, SGD performs variational inference, converges to limit cycles, 2018, arXiv:1710.11029.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not np.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}")

    def potential(self, x: ArrayLike) -> Array:
        """Return Phi at points of shape (..., 2), shape (...)."""
        x1, x2 = np.moveaxis(_points(x), -1, 0)
        return (x1**2 - 1) ** 2 / 4 + x2**2 / 2

    def density(self, x: ArrayLike) -> Array:
        """Return the stationary density e^{-Phi}/Z at points of shape (..., 2), whatever the strength.

        Z = sqrt(2 pi) times the integral of exp(-(x^2 - 1)^2 / 4) over the line, 1.9737.
        """
        line = np.linspace(-6, 6, 1201)  # the trapezoidal rule is exact to rounding on what decays this fast
        z = np.sqrt(2 * np.pi) * np.exp(-((line**2 - 1) ** 2) / 4).sum() * (line[1] - line[0])
        return np.exp(-self.potential(x)) / z

    def probability_current(self, x: ArrayLike) -> Array:
        """Return the divergence-free field lambda J = j e^{-Phi} at points of shape (..., 2)."""
        x = _points(x)
        radius4 = (x**2).sum(axis=-1, keepdims=True) ** 2
        return self.strength * np.exp(-radius4 / 4) * _quarter_turn(x)

    def current(self, x: ArrayLike) -> Array:
        """Return j = lambda e^Phi J at points of shape (..., 2)."""
        x = _points(x)
        # A single exponent, because e^Phi alone overflows far from the origin, where the product is small.
        exponent = self.potential(x)[..., None] - (x**2).sum(axis=-1, keepdims=True) ** 2 / 4
        return self.strength * np.exp(exponent) * _quarter_turn(x)

    def force(self, x: ArrayLike) -> Array:
        """Return the drift -grad Phi + j at points of shape (..., 2)."""
        x = _points(x)
        gradient = np.stack([x[..., 0] * (x[..., 0] ** 2 - 1), x[..., 1]], axis=-1)
        return self.current(x) - gradient

    def equilibria(self) -> Array:
        """Return the stable zeros of ``force`` off the origin, shape (2, 2), or (0, 2) if there are none.

        One is continued from (1, 0) as the strength grows from zero; the other is its mirror image.

        Example:
            >>> DoubleWell(0.5).equilibria().round(3) + 0.0
            array([[ 0.902,  0.389],
                   [-0.902, -0.389]])
            >>> DoubleWell(1.5).equilibria().shape
            (0, 2)
        """
        here = np.array([1.0, 0.0])
        for strength in np.linspace(0, self.strength, 33)[1:]:
            solution = root(DoubleWell(float(strength)).force, here, tol=1e-12)
            if not solution.success or np.linalg.norm(solution.x) < 1e-3:
                return np.empty((0, 2))
            here = solution.x
        return np.stack([here, -here])

    def particles(self, x0: ArrayLike, T: float, *, dt: float = 0.01, seed: int = 0) -> Array:
        """Simulate Langevin particles up to time T by Euler-Maruyama.

        Args:
            x0: starting points, shape (particles, 2).
            T: time, > 0.
            dt: largest time step, > 0; the bias of the density is first order in it. The force grows as x^3: above
                about 0.05 a rare far excursion runs away.
            seed: seed of numpy's generator.

        Returns:
            Positions at T, shape (particles, 2).

        Raises:
            ValueError: if ``T`` or ``dt`` is not > 0.
        """
        steps, dt = _steps(T, dt)
        generator = np.random.default_rng(seed)
        x = _points(x0).copy()
        for _ in range(steps):
            x += dt * self.force(x) + np.sqrt(2 * dt) * generator.standard_normal(x.shape)
        return x

    def trajectory(self, x0: ArrayLike, T: float, *, dt: float = 0.01, follow: str = "force") -> Array:
        """Follow x' = force(x), the path without noise, or x' = j(x), by the Runge-Kutta method of order 4.

        Args:
            x0: starting points, shape (..., 2).
            T: time, > 0.
            dt: largest time step, > 0.
            follow: ``"force"``; or ``"current"``, whose paths are circles about the origin, the loops of Lemma 7.

        Returns:
            Positions, shape (steps + 1, ..., 2).

        Raises:
            ValueError: if ``T`` or ``dt`` is not > 0, or ``follow`` is anything else.

        Example:
            A circle keeps its radius:

            >>> loop = DoubleWell(1.0).trajectory([0.6, 0.8], 10.0, follow="current")
            >>> float(np.linalg.norm(loop[-1]).round(6))
            1.0
        """
        if follow not in ("force", "current"):
            raise ValueError(f"follow must be 'force' or 'current', got {follow!r}")
        field = self.force if follow == "force" else self.current
        steps, dt = _steps(T, dt)
        path = [_points(x0)]
        for _ in range(steps):
            x = path[-1]
            k1 = field(x)
            k2 = field(x + dt / 2 * k1)
            k3 = field(x + dt / 2 * k2)
            k4 = field(x + dt * k3)
            path.append(x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
        return np.stack(path)


def _points(x: ArrayLike) -> Array:
    points = np.asarray(x, dtype=np.float64)
    if points.ndim == 0 or points.shape[-1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"points must be finite, of shape (..., 2), got shape {points.shape}")
    return points


def _quarter_turn(x: Array) -> Array:
    return np.stack([-x[..., 1], x[..., 0]], axis=-1)


def _steps(T: float, dt: float) -> tuple[int, float]:
    steps = int(np.ceil(positive("T", T) / positive("dt", dt) * (1 - 1e-12)))
    return steps, T / steps
