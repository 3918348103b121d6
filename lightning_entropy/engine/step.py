"""One inner step as a rule sees it, and what a rule is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_entropy.engine.gaussian import Source
from lightning_entropy.engine.weight import Weight
from lightning_entropy.methods.relaxation import Settings

# Where this step's noise comes from, for each of some parameters: of (seed, step, parameter) alone.
Seeds = Callable[[Sequence[Tensor]], list[Source]]


@dataclass
class Step:
    """One inner step.

    Attributes:
        optimizer: the user's.
        weights: of the parameters that move.
        rates: their learning rates, numbers or (on a GPU) tensors.
        settings: the relaxation's numbers at this outer step.
        seeds: draws the seeds of its noise.
        inner_steps: L.
        number: k, its number in the loop, from 0.
        outer_step: t.
        first: whether the closure is evaluated for the first time in it, or it is the first of a batch.
        grad_scale: by which the gradients are too large, where a fused optimizer divides by it; None: 1.
    """

    optimizer: Optimizer
    weights: list[Weight]
    rates: list[Any]
    settings: Settings
    seeds: Seeds
    inner_steps: int
    number: int
    outer_step: int
    first: bool = True
    grad_scale: Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether it is the L-th of its loop."""
        return self.number + 1 >= self.inner_steps


class InnerRule(Protocol):
    """What an inner step does beside the user's optimizer. What it remembers is in the :class:`Weight`.

    Attributes:
        perturbs: whether it acts before the forward pass.
    """

    perturbs: bool

    def before_forward(self, step: Step) -> None:
        """Put into the parameters what the next gradient is taken at. May be called twice."""

    def take_back(self, *, check: bool) -> None:
        """Undo :meth:`before_forward`: the gradient is final, or someone wants to see the weights.

        Args:
            check: raise an error where a weight was written in between.
        """

    def before_update(self, step: Step) -> None:
        """Act on final gradients, before the optimizer does."""

    def after_update(self, step: Step) -> None:
        """Act after the optimizer's update."""

    def close(self, step: Step) -> None:
        """End an unfinished loop with what there is of it, before its outer step."""
