"""Smoothing for a Trainer that works: one callback, any LightningModule, any torch optimizer."""

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.methods import presets
from lightning_entropy.methods.arguments import named
from lightning_entropy.methods.presets import ENTROPY_SCOPING
from lightning_entropy.methods.relaxation import Gamma, Number, Scale
from lightning_entropy.trainer.inner_outer import InnerOuterCallback


class EntropySGD(InnerOuterCallback):
    """Entropy-SGD on an existing Trainer: ``Trainer(callbacks=[EntropySGD()])``.

    Every L training steps the weights jump to the running mean of a noisy descent that a spring holds near them.
    See :func:`lightning_entropy.entropy_sgd` for the equation, the sources and the units, and
    :class:`InnerOuterCallback` for who sees which weights.

    Args:
        inner_steps: L, training steps per jump, int >= 1. First try: 20.
        gamma: how hard the weights of a loop are held to where it began, >= 0; 1/gamma
            in *Deep Relaxation* and *Parle*. What it does depends on the learning rate: with the paper's values 3 % of
            a loop's path. ``Pull(0.5)`` is the spring that takes back half of it at any rate, in any net.
        noise: random kicks per step, >= 0, as sqrt(lr) noise. The paper's 1e-4 is hardly felt.
        average: the jump is to a running mean, in which the newest weights count this much, in (0, 1]; 1: to the end
            of the loop.
        coupled: the spring inside the optimizer's momentum, as the paper writes it.
        reset_momentum: zero the optimizer's momentum at outer steps, as the released code does.
        outer_lr: how far the jump goes, > 0: 1 all the way, 0.3 about a third of it, which averages over loops.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).
        outer: another outer optimizer (``torch.optim.Adam`` makes Entropy-Adam); replaces both.
        seed: of the noise, >= 0.
        compile: an inner step in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

    @named
    def __init__(
        self,
        inner_steps: int = 20,
        gamma: Gamma = ENTROPY_SCOPING,
        noise: Number = 1e-4,
        average: Number = 0.75,
        *,
        coupled: bool = False,
        reset_momentum: bool = False,
        outer_lr: Number = 1.0,
        outer_momentum: float = 0.0,
        outer: OuterFactory | None = None,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        relaxation = presets.entropy_sgd(
            inner_steps,
            gamma,
            noise,
            average,
            coupled=coupled,
            reset_momentum=reset_momentum,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
        )
        super().__init__(relaxation, outer=outer, seed=seed, compile=compile)


class HamiltonJacobi(InnerOuterCallback):
    """Proximal-point steps on an existing Trainer: the non-viscous Hamilton-Jacobi equation.

    See :func:`lightning_entropy.hamilton_jacobi`.

    Args:
        inner_steps: L, training steps per proximal step, int >= 1. First try: 20.
        gamma: how hard the weights of a loop are held to where it began, 1/t, >= 0.
            ``Pull(0.5)`` takes back half of a loop's path at any learning rate.
        coupled: the spring inside the optimizer's momentum.
        reset_momentum: zero the optimizer's momentum at outer steps.
        outer_lr: how far toward the end of the loop x goes, > 0; 1 all the way.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).
        outer: another outer optimizer; replaces both.
        compile: an inner step in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

    @named
    def __init__(
        self,
        inner_steps: int = 20,
        gamma: Gamma = ENTROPY_SCOPING,
        *,
        coupled: bool = False,
        reset_momentum: bool = False,
        outer_lr: Number = 1.0,
        outer_momentum: float = 0.0,
        outer: OuterFactory | None = None,
        compile: bool = False,
    ) -> None:
        relaxation = presets.hamilton_jacobi(
            inner_steps,
            gamma,
            coupled=coupled,
            reset_momentum=reset_momentum,
            outer_lr=outer_lr,
            outer_momentum=outer_momentum,
        )
        super().__init__(relaxation, outer=outer, compile=compile)


class HeatSmoothing(InnerOuterCallback):
    """Gaussian smoothing on an existing Trainer: gradients at randomly perturbed weights.

    See :func:`lightning_entropy.heat`. Weights are perturbed when a batch begins and x again at the optimizer's step;
    with gradient accumulation the same noise is drawn for every batch of a step, and in manual optimization new noise
    before the next forward pass of a submodule after each step. What is written into perturbed weights would be lost
    and is a ``RuntimeError``.

    The default is noise of a tenth of each filter's norm, which does little good or harm. At 0.02 one sees nothing; 0.2
    to 0.4 help some nets where labels are wrong and cost others up to two points of error where they are right. Search
    the learning rate and the weight decay first, and stop in time, which have most of the same effects.
    ``width=Warmup(0.1, 500)`` lets the noise grow over 500 steps, and ``width=Starting(0.1, at=0.88)`` has it in the
    last part of the training alone.

    Args:
        inner_steps: gradients averaged per update, int >= 1.
        gamma: 1 / variance of the perturbation, > 0, in the unit of ``scale``; None: what ``width`` says.
        width: size of the perturbation, gamma^(-1/2), >= 0, in the place of gamma. None without a gamma: 0.1, and 0.01
            for the scales ``"absolute"`` and ``"filter"``.
        scale: its unit: ``"relative"`` (the norm of the noise over the norm of the filter, whatever its size),
            ``"absolute"`` (a weight; the heat equation) or ``"filter"`` (a filter's norm, for each of its weights;
            LPF-SGD). None: ``"absolute"`` for a gamma, else ``"relative"``.
        seed: of the perturbation, >= 0.
        compile: the perturbation in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

    @named
    def __init__(
        self,
        inner_steps: int = 1,
        gamma: Number | None = None,
        *,
        width: Number | None = None,
        scale: Scale | None = None,
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(presets.heat(inner_steps, gamma, width=width, scale=scale), seed=seed, compile=compile)
