"""Smoothing for a Trainer that works: one callback, any LightningModule, any torch optimizer."""

from typing import Literal

from lightning_entropy.engine.outer_rules import OuterFactory
from lightning_entropy.methods import presets
from lightning_entropy.methods.presets import ENTROPY_SCOPING
from lightning_entropy.methods.relaxation import Gamma, Number
from lightning_entropy.trainer.inner_outer import InnerOuterCallback


class EntropySGD(InnerOuterCallback):
    """Entropy-SGD on an existing Trainer: ``Trainer(callbacks=[EntropySGD()])``.

    Every L training steps the weights jump to the running mean of a noisy descent that a spring holds near them.
    See :func:`lightning_entropy.entropy_sgd` for the equation, the sources and the units, and
    :class:`InnerOuterCallback` for who sees which weights.

    Args:
        inner_steps: L, int >= 1.
        gamma: stiffness, >= 0; ``"auto"`` measures its start; 1/gamma in *Deep Relaxation* and *Parle*.
        noise: thermal noise, >= 0.
        average: weight of the newest y, in (0, 1].
        coupled: the spring inside the optimizer's momentum, as the paper writes it.
        reset_momentum: zero the optimizer's momentum at outer steps, as the released code does.
        outer_lr: step size of the outer step, > 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).
        outer: another outer optimizer (``torch.optim.Adam`` makes Entropy-Adam); replaces both.
        seed: of the noise, >= 0.
        compile: an inner step in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

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
        inner_steps: L, int >= 1.
        gamma: stiffness, 1/t, >= 0; ``"auto"`` measures its start.
        coupled: the spring inside the optimizer's momentum.
        reset_momentum: zero the optimizer's momentum at outer steps.
        outer_lr: step size of the outer step, > 0.
        outer_momentum: Nesterov momentum of the outer step, in [0, 1).
        outer: another outer optimizer; replaces both.
        compile: an inner step in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

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

    Args:
        inner_steps: gradients averaged per update, int >= 1.
        gamma: 1 / variance of the perturbation, > 0; relative to the squared filter norm with ``scale="filter"``.
        scale: ``"absolute"`` (the heat equation) or ``"filter"`` (LPF-SGD).
        seed: of the perturbation, >= 0.
        compile: the perturbation in one compiled pass over memory.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of another type.
    """

    def __init__(
        self,
        inner_steps: int = 1,
        gamma: Number = 1e4,
        *,
        scale: Literal["absolute", "filter"] = "absolute",
        seed: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(presets.heat(inner_steps, gamma, scale=scale), seed=seed, compile=compile)
