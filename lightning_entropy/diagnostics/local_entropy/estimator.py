"""How wide is the valley: local entropy, its gradient, and the loss at random points around the minimum."""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.estimate import GroupValues, mean_and_stderr, student
from lightning_entropy.diagnostics.examples import Batch, BatchDim, Examples
from lightning_entropy.diagnostics.groups import Groups
from lightning_entropy.diagnostics.local_entropy.flatness import grid_of, profile_of
from lightning_entropy.diagnostics.local_entropy.gamma_ladder import climb
from lightning_entropy.diagnostics.local_entropy.result import LocalEntropyResult
from lightning_entropy.diagnostics.loss import Loss
from lightning_entropy.diagnostics.progress import progress_bar
from lightning_entropy.diagnostics.surface import LossSurface
from lightning_entropy.diagnostics.untouched import untouched


def local_entropy(
    module: nn.Module,
    data: Iterable[Batch],
    *,
    gamma: float = 1.0,
    temperature: float = 1e-4,
    sigmas: Iterable[float] | None = None,
    samples: int = 50,
    warmup: int = 25,
    chains: int = 4,
    leaps: int = 4,
    rungs: int = 40,
    draws: int = 16,
    loss: Loss | None = None,
    examples: Examples = None,
    batch_dim: BatchDim = None,
    mode: str = "eval",
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
    groups: int = 0,
) -> LocalEntropyResult:
    r"""Measure local entropy F(x, gamma) relative to f(x), its gradient, and the flatness profile.

    F(x, gamma) = log int exp(-(f(y) + gamma/2 |x - y|^2) / T) dy (Chaudhari et al. 2017, arXiv:1611.01838, Definition
    1, at T = 1). Less the Gaussian's own volume this is -u(x) / T, where u solves the viscous Hamilton-Jacobi equation
    with grad u = gamma (x - <y>) (Chaudhari et al. 2018, arXiv:1704.04932, whose gamma is 1 / ours). <y> is a Langevin
    average (:func:`~lightning_entropy.diagnostics.local_entropy.gibbs.gibbs_samples`). The value is integrated over
    gamma: with u = f at gamma = infinity,

        u(x, gamma) - f(x) = 1/2 int_gamma^inf <(y - x) . grad f(y)>_g d log g,

    where the virial identity g <|y - x|^2> = P T - <(y - x) . grad f(y)> has removed two large terms that cancel.
    Rungs double gamma until f varies little under the Gaussian; from there -T log E exp(-(f(y) - f(x)) / T) is
    averaged directly over Gaussian draws. Simpson's rule joins the rungs.

    Gibbs measures of sharply curved losses at low temperature mix slowly; ``chains`` start at x independently, and
    their scatter is the error bar. Neither number is invariant to rescaling weights between layers.

    Args:
        module: The network, at the weights to measure.
        data: A loader or an iterable of batches.
        gamma: Stiffness, > 0, loss/weight^2.
        temperature: T, > 0, loss; noise^2 / 2 in Langevin dynamics with ``noise``. The Gaussian around every weight
            has the standard deviation sqrt(T / gamma).
        sigmas: Grid of the flatness profile, each > 0. None: no profile.
        samples: Proposals of a chain at each rung, >= 1.
        warmup: Proposals before them, >= 0.
        chains: Independent chains, >= 2, in turn.
        leaps: Gradients for a proposal, >= 1.
        rungs: The most rungs of the ladder, >= 3.
        draws: Pairs x +- sigma xi for each sigma, and for the end of the ladder, >= 2.
        loss: ``(module, batch) -> scalar``, a mean over the batch. None: cross entropy.
        examples: How many examples of ``data``; or a callable from a batch to its number of them, and all are taken.
            None: all, counted by the tensors' sizes.
        batch_dim: Dimension of the tensors that counts examples, or a callable from a batch to it. None: that of the
            one size that they share.
        mode: "eval" or "train" for BatchNorm and dropout.
        seed: Of everything drawn.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.
        progress: Show a bar when it takes long.
        groups: Of examples, for the error that the choice of examples makes: 0, or >= 2. To first order, other
            examples change u - f(x) by <f(y)> - f(x) of theirs.

    Returns:
        The numbers, with error bars; see :class:`LocalEntropyResult`.

    Raises:
        ValueError: If an argument is out of range, f still varies too much at the last rung, the data is empty,
            nothing is trainable, or the loss is not a finite scalar.

    Example:
        >>> class Point(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.x = nn.Parameter(torch.zeros(1))
        >>> found = local_entropy(Point(), [torch.zeros(1)], loss=lambda m, b: 1.5 * m.x.square().sum(),
        ...                       gamma=1.0, temperature=1.0, samples=200, chains=8)
        >>> abs(found.rise - math.log(4) / 2) < found.rise_error           # T/2 log(1 + h / gamma), h = 3
        True
    """
    for name, number in (("gamma", gamma), ("temperature", temperature)):
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
    least = {"samples": 1, "warmup": 0, "chains": 2, "leaps": 1, "rungs": 3, "draws": 2}
    given = {"samples": samples, "warmup": warmup, "chains": chains, "leaps": leaps, "rungs": rungs, "draws": draws}
    for name, number in given.items():
        if number < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {number}")

    if groups < 0 or groups == 1:
        raise ValueError(f"groups must be 0 or at least 2, got {groups}")
    grid = None if sigmas is None else grid_of(sigmas)

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

        def function(points: Tensor) -> tuple[Tensor, Tensor]:
            values, gradients = zip(*(surface.value_and_gradient(p) for p in points), strict=True)
            return torch.stack(values), torch.stack(gradients)

        def values(points: Tensor) -> Tensor:
            return torch.stack([surface.evaluate(p) for p in points])

        divided = Groups(surface, groups)
        sums: dict[int, Tensor] = {}

        def visit(panel: int, points: Tensor) -> None:
            for point in points if len(divided) else ():
                losses = divided.losses(point) / (samples * chains)
                sums[panel] = sums[panel] + losses if panel in sums else losses

        with progress_bar("Local entropy", samples + warmup, progress) as bar:

            def begin(total: int) -> None:
                bar.total = total

            ladder = climb(
                function,
                surface.weights,
                gamma=gamma,
                temperature=temperature,
                samples=samples,
                warmup=warmup,
                chains=chains,
                leaps=leaps,
                rungs=rungs,
                draws=draws,
                generator=generator,
                begin=begin,
                tick=bar.update,
                visit=visit,
                values=values,
            )
        rises, stderrs, dof = mean_and_stderr(ladder.rises)
        chain_errors = (stderrs * student(dof)).cpu().numpy() + ladder.quadrature_errors
        by_group: tuple[GroupValues, ...] = ()
        if len(divided):
            base = divided.losses(surface.weights)
            by_group = tuple(
                GroupValues((sums[panel] - base).cpu().numpy(), divided.shares) for panel in range(len(ladder.gammas))
            )
        gradient, gradient_stderr, _ = mean_and_stderr(-gamma * ladder.displacement)
        signal = gradient.double().square().sum() - gradient_stderr.double().square().sum()
        profile = None if grid is None else profile_of(surface, grid, draws, generator, divided)
        return LocalEntropyResult(
            weights=len(surface),
            examples=surface.examples,
            loss=surface.value,
            gamma=gamma,
            temperature=temperature,
            gammas=ladder.gammas,
            rises=rises.cpu().numpy(),
            rise_errors=np.hypot(chain_errors, [g.estimate.error for g in by_group] or 0.0),
            gradient=gradient.cpu().numpy(),
            gradient_stderr=gradient_stderr.cpu().numpy(),
            gradient_norm=math.sqrt(max(0.0, signal.item())),
            gradient_norm_error=_norm_error(gamma * ladder.displacement.double()),
            chain_errors=chain_errors,
            groups=by_group,
            acceptance=ladder.acceptance,
            profile=profile,
        )


def _norm_error(gradients: Tensor) -> float:
    """Half-width of the 99 % interval of the norm of the mean of each chain's, shape (C, P), by the jackknife."""
    chains = len(gradients)
    if chains < 3:
        return math.nan
    norms = []
    for c in range(chains):
        rest = torch.cat([gradients[:c], gradients[c + 1 :]])
        mean, stderr, _ = mean_and_stderr(rest)
        norms.append((mean.square().sum() - stderr.square().sum()).clamp(min=0).sqrt())
    spread = torch.stack(norms).var(unbiased=False) * (chains - 1)
    return float(spread.sqrt()) * student(chains - 1)
