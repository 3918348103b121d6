"""Local entropy of a function by thermodynamic integration: a ladder of stiffnesses gamma, chains on every rung."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_entropy.diagnostics.local_entropy.gibbs import ValueAndGradient, gibbs_samples

# The ladder in gamma ends where f varies by less than this many temperatures under the Gaussian.
_GENTLE = 0.5


@dataclass(frozen=True)
class Ladder:
    """What the chains found on the way from gamma up.

    Args:
        gammas: The ends of Simpson's panels, each four times the one before, shape (R,).
        rises: u - f(x) of every chain there, shape (C, R).
        quadrature_errors: Simpson's error there, shape (R,).
        displacement: Mean y - x of every chain at the first rung, shape (C, P).
        acceptance: The lowest of all rungs.
    """

    gammas: np.ndarray
    rises: Tensor
    quadrature_errors: np.ndarray
    displacement: Tensor
    acceptance: float


def climb(
    function: ValueAndGradient,
    anchor: Tensor,
    *,
    gamma: float,
    temperature: float,
    samples: int,
    warmup: int,
    chains: int,
    leaps: int,
    rungs: int,
    draws: int,
    generator: torch.Generator,
    begin: Callable[[int], object] = lambda total: None,
    tick: Callable[[], object] = lambda: None,
    visit: Callable[[int, Tensor], object] = lambda panel, points: None,
    values: Callable[[Tensor], Tensor] | None = None,
) -> Ladder:
    """Integrate the virial over log gamma; see :func:`local_entropy` for method and arguments.

    Args:
        function: f and its gradient at points of shape (chains, P).
        anchor: x, shape (P,).
        gamma: First rung.
        temperature: T.
        samples: Proposals a rung.
        warmup: Proposals before them.
        chains: C.
        leaps: Gradients a proposal.
        rungs: The most rungs.
        draws: Antithetic pairs for each chain at the last rung.
        generator: Of everything drawn.
        begin: Called with the number of proposals, once it is known.
        tick: Called after each proposal.
        visit: Called with the points of every sample at the end of a panel, shape (C, P), and the panel's number.
        values: f alone at points of shape (chains, P), which is quicker. None: that of ``function``.

    Returns:
        Every chain's own account, independent of the others'.

    Raises:
        ValueError: If f varies too much under the Gaussian of the last rung.
    """

    def plain(points: Tensor) -> Tensor:
        return function(points)[0]

    f = values or plain
    base = f(anchor.expand(1, -1))

    def gaussian(stiffness: float) -> Tensor:
        """f(y) - f(x) over T for ``draws`` antithetic pairs of Gaussian y, shape (2 draws, C)."""
        width, rows = math.sqrt(temperature / stiffness), []
        for _ in range(draws):
            noise = torch.randn(chains, len(anchor), generator=generator, device=anchor.device, dtype=anchor.dtype)
            rows += [f(anchor + width * noise), f(anchor - width * noise)]
        return (torch.stack(rows) - base) / temperature

    # Rungs 0, 2, 4, ... end Simpson's panels.
    last = 0
    while not (spread := gaussian(gamma * 2.0**last).std()) < _GENTLE:  # NaN included.
        last += 2
        if last > rungs - 1:
            raise ValueError(
                f"rungs must be enough for f to vary by less than {_GENTLE} T under a Gaussian of variance T / gamma; "
                f"at gamma * 2^{last - 2} it varies by {spread.item():.3g} T: raise rungs, gamma or temperature, "
                f"got {rungs}"
            )
    final = gaussian(gamma * 2.0**last)
    tail = -temperature * _log_mean_exp(-final)

    gammas = gamma * 2.0 ** np.arange(last + 1)
    begin(len(gammas) * (samples + warmup))
    virials: list[Tensor] = []
    # From the gentle end down, each rung starting where the one above it stopped.
    start = torch.randn(chains, len(anchor), generator=generator, device=anchor.device, dtype=anchor.dtype)
    start = start * math.sqrt(temperature / gammas[-1])
    angle, acceptance, displacement = None, 1.0, torch.empty(0)
    for rung, g in reversed(list(enumerate(gammas))):
        found = gibbs_samples(
            function,
            anchor,
            gamma=float(g),
            temperature=temperature,
            samples=samples,
            warmup=warmup,
            leaps=leaps,
            start=start,
            generator=generator,
            angle=angle,
            tick=tick,
            visit=partial(visit, rung // 2) if rung % 2 == 0 else lambda points: None,
        )
        start, angle, acceptance = found.last, found.angle, min(acceptance, found.acceptance)
        virials.append(found.virial)
        displacement = found.displacement
    virial = torch.stack(virials[::-1], 1)

    # Panels of two rungs: Simpson's rule, and the trapezoid to gauge it.
    step = math.log(2.0)
    ends, middle = virial[:, :-2:2] + virial[:, 2::2], virial[:, 1::2]
    simpson = (ends + 4 * middle) * step / 3 / 2
    trapezoid = (ends + 2 * middle) * step / 2 / 2
    gauge = ((simpson - trapezoid).mean(0).abs() / 15).cpu().numpy()

    def above(panels: Any) -> Any:
        return panels.flip(-1).cumsum(-1).flip(-1) if isinstance(panels, Tensor) else panels[::-1].cumsum()[::-1]

    rises = torch.cat([above(simpson) + tail[:, None], tail[:, None]], 1)
    return Ladder(gammas[::2], rises, np.r_[above(gauge), 0.0], displacement, acceptance)


def _log_mean_exp(exponents: Tensor) -> Tensor:
    """log of the mean of exp over antithetic pairs, rows 2i and 2i + 1, less its bias to first order."""
    pairs = exponents.exp().unflatten(0, (-1, 2)).mean(1)
    mean = pairs.mean(0)
    return mean.log() + pairs.var(0) / mean**2 / (2 * len(pairs))
