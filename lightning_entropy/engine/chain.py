"""The inner rule of the Langevin chain: a spring to the anchor, thermal noise, and a running mean."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.arithmetic import Move
from lightning_entropy.engine.native.step import NativeStep
from lightning_entropy.engine.shards import gradient_of
from lightning_entropy.engine.step import Step
from lightning_entropy.engine.weight import Weight, running_means
from lightning_entropy.methods.relaxation import Relaxation


class Spring(Protocol):
    """A form of the spring y -> x.

    Attributes:
        limit: lr * gamma at and above which it is unstable.
        in_gradient: whether it changes what the optimizer takes for the gradient of the loss.
    """

    limit: float
    in_gradient: bool

    def before_update(self, step: Step, gamma: float) -> None:
        """Act on gradients or weights before the optimizer's update."""

    def gamma_after(self, gamma: float) -> float:
        """Return the stiffness of the implicit step that follows the update."""
        ...


class Implicit:
    """y <- (y + k x) / (1 + k) after the update, k = lr gamma: stable for every k."""

    limit = math.inf
    in_gradient = False

    def before_update(self, step: Step, gamma: float) -> None:
        """Do nothing."""

    def gamma_after(self, gamma: float) -> float:
        """Return gamma."""
        return gamma


class Coupled:
    """grad <- grad + gamma (y - x): through the optimizer's momentum and scaling, as Algorithm 1 writes it."""

    limit = 2.0
    in_gradient = True

    def before_update(self, step: Step, gamma: float) -> None:
        """Add the force to the gradients.

        Raises:
            ValueError: a sparse gradient, of which the force would make a dense one.
        """
        grads = [grad for grad in (gradient_of(w.param) for w in step.weights) if grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise ValueError("coupled must be False where gradients are sparse, got coupled=True")
        forces = torch._foreach_sub([w.value for w in step.weights], [w.anchor for w in step.weights])
        torch._foreach_mul_(forces, gamma)
        if step.grad_scale is not None:
            torch._foreach_mul_(forces, step.grad_scale)
        torch._foreach_add_(grads, forces)

    def gamma_after(self, gamma: float) -> float:
        """Return 0."""
        return 0.0


class Explicit:
    """y <- y - k (y - x) before the update, k = lr gamma: the released code's form."""

    limit = 2.0
    in_gradient = True

    def before_update(self, step: Step, gamma: float) -> None:
        """Take the explicit step, once a step."""
        if step.first:
            ys, xs = [w.value for w in step.weights], [w.anchor for w in step.weights]
            F.attract_(ys, xs, [lr * gamma for lr in step.rates])

    def gamma_after(self, gamma: float) -> float:
        """Return 0."""
        return 0.0


# By the value of Relaxation.spring.
SPRINGS: Mapping[str, Spring] = {"implicit": Implicit(), "coupled": Coupled(), "explicit": Explicit()}


class Chain:
    """y <- pull(y, x);  y <- y + sqrt(lr) noise N(0, I);  z <- z + average (y - z), after the optimizer's update.

    Args:
        relaxation: the method.
        native: does the step in one pass over memory; None: tensor by tensor.
    """

    perturbs = False

    def __init__(self, relaxation: Relaxation, native: NativeStep | None) -> None:
        self._spring = SPRINGS[relaxation.spring]
        self._native = native
        self._warned = False

    def before_forward(self, step: Step) -> None:
        """Do nothing: the gradient is taken at y."""

    def take_back(self, *, check: bool) -> None:
        """Do nothing."""

    def before_update(self, step: Step) -> None:
        """Apply a spring that acts before the update; natively, take the whole step where that is possible."""
        self._warn_if_unstable(step)
        if step.settings.gamma:
            self._spring.before_update(step, step.settings.gamma)
        if self._native is not None:
            self._native.forget()
            move = self._move(step, step.weights, step.rates)
            if move is not None:
                self._native.sgd_(step.optimizer, step.weights, move)

    def after_update(self, step: Step) -> None:
        """Pull, shake and average, where any of the three is on."""
        weights, rates = step.weights, step.rates
        taken = set() if self._native is None else self._native.release()
        if taken:
            left = [i for i, w in enumerate(weights) if w.param not in taken]
            weights, rates = [weights[i] for i in left], [rates[i] for i in left]
        move = self._move(step, weights, rates)
        if move is not None:
            (F.inner_move_ if self._native is None else self._native.move_)(move)

    def close(self, step: Step) -> None:
        """Do nothing: z is the mean so far."""

    def _move(self, step: Step, weights: Sequence[Weight], rates: Sequence[float | Tensor]) -> Move | None:
        """Return what follows the update of some weights; None where nothing does."""
        now, gamma = step.settings, self._spring.gamma_after(step.settings.gamma)
        averages = None
        if now.average != 1:
            averages = running_means(weights)
        else:
            for w in weights:
                w.average = None
        if not (gamma or now.stiffness or now.noise or averages is not None):
            return None
        # torch steps with a rate that a schedule has taken below 0; a spring and noise have none.
        stiffness: dict[int, float | Tensor] = {}  # by rate: a group of the optimizer has one, perhaps on a GPU
        noise: dict[int, float | Tensor] = {}
        for lr in {id(lr): lr for lr in rates}.values():
            positive = lr.clamp(min=0) if isinstance(lr, Tensor) else max(lr, 0.0)
            stiffness[id(lr)] = positive * gamma if gamma else now.stiffness
            noise[id(lr)] = positive**0.5 * now.noise if now.noise else 0.0
        return Move(
            params=[w.value for w in weights],
            anchors=[w.anchor for w in weights],
            averages=averages,
            stiffness=[stiffness[id(lr)] for lr in rates],
            noise=[noise[id(lr)] for lr in rates],
            average=now.average,
            seeds=step.seeds([w.param for w in weights]) if now.noise else None,
        )

    def _warn_if_unstable(self, step: Step) -> None:
        """Warn once of a spring that is too stiff for its form and the learning rates."""
        if self._warned or self._spring.limit == math.inf:
            return
        gamma = step.settings.gamma
        stiffest = gamma * max((lr for lr in step.rates if not isinstance(lr, Tensor)), default=0.0)
        if stiffest >= self._spring.limit:
            self._warned = True
            warnings.warn(
                f"lr * gamma must be below {self._spring.limit:g} for a coupled or explicit spring to be stable, got "
                f"{stiffest:.3g} with gamma = {gamma:.3g} at outer step {step.outer_step}; lower one of them, or use "
                "the default spring, which is stable for every value",
                stacklevel=2,
            )
