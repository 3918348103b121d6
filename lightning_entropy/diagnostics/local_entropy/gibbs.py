"""Samples of y near an anchor, weighed by exp(-f(y) / T): Langevin dynamics without a step-size error."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Maps points, shape (chains, P), to f, shape (chains,), float64, and its gradient, shape (chains, P).
ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GibbsSamples:
    """Averages of each of C independent chains over its samples of y - x.

    Args:
        displacement: Mean of y - x, shape (C, P).
        virial: Mean of (y - x) . grad f(y), shape (C,), float64.
        acceptance: Share of proposals accepted, in [0, 1].
        last: The last y - x, shape (C, P), from which a chain at a neighbouring gamma can start.
        angle: The step that the warm-up settled on, radians.
    """

    displacement: Tensor
    virial: Tensor
    acceptance: float
    last: Tensor
    angle: float


def gibbs_samples(
    function: ValueAndGradient,
    anchor: Tensor,
    *,
    gamma: float,
    temperature: float,
    samples: int,
    warmup: int,
    leaps: int,
    start: Tensor,
    generator: torch.Generator,
    angle: float | None = None,
    tick: Callable[[], object] = lambda: None,
    visit: Callable[[Tensor], object] = lambda points: None,
) -> GibbsSamples:
    r"""Sample y from exp(-(f(y) + gamma/2 |y - x|^2) / T), the measure of local entropy.

    The Gaussian factor is solved exactly: with f = 0, d = y - x and its momentum turn in a circle,

        d <- d cos a + p sin a / sqrt(gamma),   p <- p cos a - d sqrt(gamma) sin a,

    so one step is a half kick -(a / 2 sqrt(gamma)) grad f, a turn by the angle a, a half kick, and ``leaps`` of them
    make a proposal that Metropolis accepts or not by the change of energy (Shahbaba et al. 2014, split Hamiltonian
    Monte Carlo; one leap is the preconditioned Langevin algorithm of Cotter et al. 2013). No error of discretisation
    remains, and the step does not shrink with the dimension. The warm-up tunes a to accept about 80 %.

    Args:
        function: f and its gradient at points of shape (C, P).
        anchor: x, shape (P,).
        gamma: Stiffness, > 0, loss/weight^2.
        temperature: T, > 0, loss.
        samples: Proposals after the warm-up, >= 1.
        warmup: Proposals before it, not averaged.
        leaps: Gradients a proposal, >= 1. The turn of a whole proposal is at most a quarter circle.
        start: y - x to start from, shape (C, P); C chains.
        generator: Of the momenta.
        angle: a to start from. None: a quarter circle over ``leaps``.
        tick: Called after each proposal.
        visit: Called with the points y of every sample, shape (C, P).

    Returns:
        Each chain's averages.

    Example:
        >>> quadratic = lambda y: (1.5 * y.double().square().sum(1), 3 * y)          # curvature 3
        >>> found = gibbs_samples(quadratic, torch.ones(1), gamma=1.0, temperature=0.01, samples=500, warmup=100,
        ...                       leaps=2, start=torch.zeros(50, 1), generator=torch.Generator().manual_seed(0))
        >>> round(found.displacement.mean().item(), 2)           # -(H + gamma)^-1 H x = -3 / 4
        -0.75
    """
    root, longest = math.sqrt(gamma), math.pi / 2 / leaps
    # The step stays on the device, which is not waited for between proposals.
    turn = torch.full((), min(angle or longest, longest), dtype=torch.float64, device=start.device)
    shift = start.clone()
    value, gradient = function(anchor + shift)
    displacement = torch.zeros_like(shift)
    virial, accepted = torch.zeros_like(value), torch.zeros_like(value)
    width = math.sqrt(temperature)

    def draw(kind: Callable[..., Tensor], *shape: int) -> Tensor:
        return kind(*shape, generator=generator, device=shift.device, dtype=shift.dtype)

    for step in range(-warmup, samples):
        # A jittered angle, lest a proposal resonate with a mode and come back to its start.
        a = turn * (0.8 + 0.4 * torch.rand((), generator=generator, device=shift.device).double())
        cosine, sine, kick = a.cos(), a.sin(), a / (2 * root)
        momentum = width * draw(torch.randn, *shift.shape)
        energy = value + (gamma * shift.double().square() + momentum.double().square()).sum(1) / 2
        there, value_there, gradient_there = shift, value, gradient
        for _ in range(leaps):
            momentum = momentum - kick * gradient_there
            there, momentum = (
                there * cosine + momentum * (sine / root),
                momentum * cosine - there * (root * sine),
            )
            value_there, gradient_there = function(anchor + there)
            momentum = momentum - kick * gradient_there
        change = value_there + (gamma * there.double().square() + momentum.double().square()).sum(1) / 2 - energy
        chance = (-change / temperature).clamp(max=0.0).exp().nan_to_num(0.0)
        yes = draw(torch.rand, len(shift)) < chance
        shift = torch.where(yes[:, None], there, shift)
        gradient = torch.where(yes[:, None], gradient_there, gradient)
        value = torch.where(yes, value_there, value)
        if step < 0:
            gain = 1.5 / math.sqrt(step + warmup + 1)
            turn = (turn * (gain * (chance.mean() - 0.8)).exp()).clamp(max=longest)
        else:
            displacement += shift / samples
            virial += (shift * gradient).double().sum(1) / samples
            accepted += chance / samples
            visit(anchor + shift)
        tick()
    return GibbsSamples(displacement, virial, accepted.mean().item(), shift, turn.item())
