"""How wide is the valley: local entropy, its gradient, and the loss at random points around the minimum."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_entropy.diagnostics.data import Batch
from lightning_entropy.diagnostics.diagnostic import Diagnostic, axes_for
from lightning_entropy.diagnostics.estimate import mean_and_stderr, student
from lightning_entropy.diagnostics.gibbs import ValueAndGradient, gibbs_samples
from lightning_entropy.diagnostics.progress import progress_bar
from lightning_entropy.diagnostics.surface import Loss, LossSurface, untouched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The ladder in gamma ends where f varies by less than this many temperatures under the Gaussian.
_GENTLE = 0.5


@dataclass(frozen=True)
class FlatnessProfile:
    """E f(x + sigma N(0, I)) - f(x) over a grid of sigma.

    Args:
        sigmas: Standard deviations of the noise on every weight, ascending.
        rises: The mean rise of the loss at each.
        errors: Half-widths of their 99 % intervals.
    """

    sigmas: np.ndarray
    rises: np.ndarray
    errors: np.ndarray

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the rise of the loss against sigma, both logarithmic, with error bars."""
        ax = axes_for(ax)
        _draw_rises(ax, self.sigmas, self.rises, self.errors, "o-", "tab:blue", "under Gaussian noise on every weight")
        positive = self.rises > 0
        if positive.any():
            # In a quadratic valley the rise is sigma^2 tr(H) / 2.
            s, r = self.sigmas[positive], self.rises[positive]
            label = r"$\propto\sigma^2$: a quadratic valley"
            ax.plot(s, r[0] * (s / s[0]) ** 2, "--", lw=1, color="tab:gray", label=label)
        _finish_rises(ax)
        ax.set_xlabel(r"standard deviation $\sigma$ of the noise on every weight")
        return ax.figure, ax  # type: ignore[return-value]


def _draw_rises(
    ax: "Axes", x: np.ndarray, rises: np.ndarray, errors: np.ndarray, style: str, color: str, label: str
) -> None:
    """Draw the positive rises with error bars; one that reaches zero has no end on a logarithmic axis."""
    shown = rises > 0
    bars = np.minimum(errors, 0.9 * rises)[shown], errors[shown]
    if shown.any():
        ax.errorbar(x[shown], rises[shown], bars, fmt=style, ms=3.5, lw=1.2, capsize=2, color=color, label=label)


def _finish_rises(ax: "Axes") -> None:
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


@dataclass(frozen=True)
class LocalEntropyResult:
    r"""Local entropy at x, as the smoothed loss u(x) = -T log E exp(-f(y) / T) over y ~ N(x, T / gamma I).

    Args:
        weights: P.
        examples: Examples that the loss was averaged over.
        loss: f(x).
        gamma: Stiffness, loss/weight^2.
        temperature: T, loss.
        gammas: The ladder, from ``gamma`` up to where f is nearly constant.
        rises: u(x, gamma) - f(x) at each rung of the ladder: the value relative to f(x).
        rise_errors: Half-widths of their 99 % intervals, quadrature included.
        gradient: gamma (x - <y>) = grad u, the direction of Entropy-SGD, shape (P,).
        gradient_stderr: Its standard errors from the scatter of the chains, shape (P,).
        gradient_norm: |grad u|, freed of the noise's contribution.
        acceptance: Lowest share of accepted proposals on the ladder; below 0.5 distrust the numbers.
        profile: The flatness profile, if asked for.
    """

    weights: int
    examples: int
    loss: float
    gamma: float
    temperature: float
    gammas: np.ndarray
    rises: np.ndarray
    rise_errors: np.ndarray
    gradient: np.ndarray
    gradient_stderr: np.ndarray
    gradient_norm: float
    acceptance: float
    profile: FlatnessProfile | None = None

    @property
    def rise(self) -> float:
        """u(x) - f(x) at ``gamma``: small in a wide valley, large in a sharp one."""
        return float(self.rises[0])

    @property
    def rise_error(self) -> float:
        """Half-width of the 99 % interval of ``rise``."""
        return float(self.rise_errors[0])

    @property
    def local_entropy(self) -> float:
        """F(x, gamma) = log of the integral of exp(-(f(y) + gamma/2 |x - y|^2) / T) over y, a pure number."""
        volume = self.weights / 2 * math.log(2 * math.pi * self.temperature / self.gamma)
        return volume - (self.loss + self.rise) / self.temperature

    def scalars(self) -> dict[str, float]:
        """Name the numbers worth a line in a log."""
        numbers = {
            "loss": self.loss,
            "rise": self.rise,
            "rise_error": self.rise_error,
            "gradient_norm": self.gradient_norm,
            "acceptance": self.acceptance,
        }
        if self.profile is not None:
            for sigma, rise in zip(self.profile.sigmas, self.profile.rises, strict=True):
                numbers[f"rise_at_sigma_{sigma:.2g}"] = float(rise)
        return numbers

    def plot(self, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the smoothed loss above f(x) against the width of the Gaussian, and the flatness profile with it."""
        ax = axes_for(ax)
        if self.profile is not None:
            self.profile.plot(ax)
        widths = np.sqrt(self.temperature / self.gammas)
        label = f"smoothed loss u (local entropy), T = {self.temperature:.3g}"
        _draw_rises(ax, widths, self.rises, self.rise_errors, "s-", "tab:red", label)
        _finish_rises(ax)
        if hidden := int((self.rises <= 0).sum()):
            note = f"{hidden} of {len(self.rises)} values of u lie below f(x): not drawn"
            ax.text(0.98, 0.04, note, transform=ax.transAxes, ha="right", fontsize=9, color="tab:red")
        ax.set_xlabel(r"width of the Gaussian around every weight: $\sigma$, or $\sqrt{T/\gamma}$")
        ax.set_title(
            f"Flatness, {self.weights:,} weights: u rises by {self.rise:.2g} ± {self.rise_error:.1g} at "
            rf"$\gamma$ = {self.gamma:g}",
            fontsize=10,
        )
        return ax.figure, ax  # type: ignore[return-value]


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
    examples: int | None = None,
    mode: str = "eval",
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
    progress: bool = False,
) -> LocalEntropyResult:
    r"""Measure local entropy F(x, gamma) relative to f(x), its gradient, and the flatness profile.

    F(x, gamma) = log int exp(-(f(y) + gamma/2 |x - y|^2) / T) dy (Chaudhari et al. 2017, arXiv:1611.01838, Definition
    1, at T = 1). Less the Gaussian's own volume this is -u(x) / T, where u solves the viscous Hamilton-Jacobi equation
    with grad u = gamma (x - <y>) (Chaudhari et al. 2018, arXiv:1704.04932, whose gamma is 1 / ours). <y> is a Langevin
    average (:func:`~lightning_entropy.diagnostics.gibbs.gibbs_samples`). The value is integrated over gamma: with
    u = f at gamma = infinity,

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
        examples: How many examples of ``data``. None: all.
        mode: "eval" or "train" for BatchNorm and dropout.
        seed: Of everything drawn.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.
        progress: Show a bar when it takes long.

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

    with untouched(module, mode, seed):
        surface = LossSurface(
            module, data, loss=loss, examples=examples, mode=mode, seed=seed, state=state, transfer=transfer
        )
        generator = torch.Generator(surface.device).manual_seed(seed)

        def function(points: Tensor) -> tuple[Tensor, Tensor]:
            values, gradients = zip(*(surface.value_and_gradient(p) for p in points), strict=True)
            return torch.stack(values), torch.stack(gradients)

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
            )
        rises, stderrs, dof = mean_and_stderr(ladder.rises)
        gradient, gradient_stderr, _ = mean_and_stderr(-gamma * ladder.displacement)
        signal = gradient.double().square().sum() - gradient_stderr.double().square().sum()
        profile = None if sigmas is None else _profile(surface, sigmas, draws, generator)
        return LocalEntropyResult(
            weights=len(surface),
            examples=surface.examples,
            loss=surface.value,
            gamma=gamma,
            temperature=temperature,
            gammas=ladder.gammas,
            rises=rises.cpu().numpy(),
            rise_errors=(stderrs * student(dof)).cpu().numpy() + ladder.quadrature_errors,
            gradient=gradient.cpu().numpy(),
            gradient_stderr=gradient_stderr.cpu().numpy(),
            gradient_norm=math.sqrt(max(0.0, signal.item())),
            acceptance=ladder.acceptance,
            profile=profile,
        )


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

    Returns:
        Every chain's own account, independent of the others'.

    Raises:
        ValueError: If f varies too much under the Gaussian of the last rung.
    """
    base = function(anchor.expand(1, -1))[0]

    def gaussian(stiffness: float) -> Tensor:
        """f(y) - f(x) over T for ``draws`` antithetic pairs of Gaussian y, shape (2 draws, C)."""
        width, rows = math.sqrt(temperature / stiffness), []
        for _ in range(draws):
            noise = torch.randn(chains, len(anchor), generator=generator, device=anchor.device, dtype=anchor.dtype)
            rows += [function(anchor + width * noise)[0], function(anchor - width * noise)[0]]
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
    for g in gammas[::-1]:
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


def _profile(surface: LossSurface, sigmas: Iterable[float], draws: int, generator: torch.Generator) -> FlatnessProfile:
    """Average f(x +- sigma xi) - f(x) over pairs, with the same xi at every sigma."""
    grid = np.sort(np.array(list(sigmas), dtype=float))
    if len(grid) == 0 or grid[0] <= 0:
        raise ValueError(f"sigmas must be positive numbers, got {grid.tolist()}")
    x, rows = surface.weights, []
    for _ in range(draws):
        noise = torch.randn(len(x), generator=generator, device=x.device, dtype=x.dtype)
        rows.append([(surface.loss(x + s * noise) + surface.loss(x - s * noise)) / 2 - surface.value for s in grid])
    mean, stderr, dof = mean_and_stderr(torch.tensor(rows, dtype=torch.float64))
    return FlatnessProfile(grid, mean.numpy(), stderr.numpy() * student(dof))


def flatness_profile(
    module: nn.Module,
    data: Iterable[Batch],
    sigmas: Iterable[float],
    *,
    draws: int = 16,
    loss: Loss | None = None,
    examples: int | None = None,
    mode: str = "eval",
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    transfer: Callable[[Batch], Batch] | None = None,
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
        examples: How many examples of ``data``. None: all.
        mode: "eval" or "train" for BatchNorm and dropout.
        seed: Of noise and examples.
        state: Weights and buffers by name, in place of the module's own.
        transfer: Moves a batch to the device. None: a plain copy.

    Returns:
        The profile, with 99 % error bars.

    Raises:
        ValueError: If an argument is out of range, or as for :func:`local_entropy`.

    Example:
        >>> net, data = nn.Linear(1, 1, bias=False), [torch.ones(1, 1)]
        >>> found = flatness_profile(net, data, [0.1], loss=lambda m, x: 2 * m(x).square().sum(), draws=500)
        >>> abs(found.rises[0] - 0.02) < found.errors[0]          # f = 2 w^2, so the rise is 2 sigma^2
        np.True_
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    with untouched(module, mode, seed):
        surface = LossSurface(
            module, data, loss=loss, examples=examples, mode=mode, seed=seed, state=state, transfer=transfer
        )
        return _profile(surface, sigmas, draws, torch.Generator(surface.device).manual_seed(seed))


class LocalEntropy(Diagnostic):
    """Log and draw local entropy and the flatness profile: :func:`local_entropy` as a callback.

    Logged: ``local_entropy/rise`` with ``rise_error``, ``gradient_norm``, ``acceptance``, ``loss`` and the profile as
    ``rise_at_sigma_<sigma>``. A rung costs ``chains * leaps * (samples + warmup)`` gradients over the examples, and
    there are about log2(curvature / gamma) rungs.

    Args:
        gamma: See :func:`local_entropy`, as for the rest.
        temperature: T.
        sigmas: Grid of the flatness profile.
        samples: Proposals of a chain at each rung.
        warmup: Proposals before them.
        chains: Independent chains.
        leaps: Gradients for a proposal.
        draws: Pairs for each sigma.
        **when: When, on what and how to measure; see :class:`~lightning_entropy.diagnostics.diagnostic.Diagnostic`.

    Example:
        >>> LocalEntropy(gamma=10.0, examples=128).name
        'local_entropy'
    """

    default_name = "local_entropy"

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        temperature: float = 1e-4,
        sigmas: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03),
        samples: int = 20,
        warmup: int = 10,
        chains: int = 4,
        leaps: int = 4,
        draws: int = 8,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        self.gamma, self.temperature, self.sigmas = gamma, temperature, tuple(sigmas)
        self.samples, self.warmup, self.chains, self.leaps, self.draws = samples, warmup, chains, leaps, draws

    def measure(self, module: nn.Module, data: Iterable[Batch], **settings: Any) -> LocalEntropyResult:
        """Run :func:`local_entropy` with the callback's settings."""
        return local_entropy(
            module,
            data,
            gamma=self.gamma,
            temperature=self.temperature,
            sigmas=self.sigmas or None,
            samples=self.samples,
            warmup=self.warmup,
            chains=self.chains,
            leaps=self.leaps,
            draws=self.draws,
            **settings,
        )
