"""The inner rule of Gaussian smoothing: gradients at weights to which noise is added."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine import shards
from lightning_entropy.engine.arithmetic import Move
from lightning_entropy.engine.filters import all_filter_norms, filters_of
from lightning_entropy.engine.gaussian import Source
from lightning_entropy.engine.native.step import NativeStep
from lightning_entropy.engine.step import Step
from lightning_entropy.engine.torch_internals import version
from lightning_entropy.engine.weight import Weight, add_gradients
from lightning_entropy.engine.weights import Holds, Weights
from lightning_entropy.methods.relaxation import Relaxation


class Scale(NamedTuple):
    """The unit of a perturbation's width: which parameters are perturbed, and how much one unit is."""

    takes: Callable[[Tensor], bool]
    of: Callable[[Sequence[Weight]], list[Tensor]] | None  # None: 1 for every weight


def filter_norms(weights: Sequence[Weight]) -> list[Tensor]:
    """Return the norms of the filters of all parameters, ready to broadcast."""
    norms = all_filter_norms([w.value for w in weights], [w.anchor.dtype for w in weights])
    return shards.joined_norms(norms, [w.param for w in weights], by_filter=True)


def filter_rms(weights: Sequence[Weight]) -> list[Tensor]:
    """Return their root mean squares: noise of this standard deviation has, in the mean of squares, the filter's norm.

    Their parameters have two dimensions or more, and are not empty.
    """
    norms = filter_norms(weights)
    if norms:
        torch._foreach_div_(norms, [filters_of(w.param)[1] ** 0.5 for w in weights])
    return norms


# By the value of Relaxation.scale.
SCALES: Mapping[str, Scale] = {
    "absolute": Scale(lambda p: True, None),
    "filter": Scale(lambda p: True, filter_norms),
    "relative": Scale(lambda p: p.dim() > 1 and p.numel() > 0, filter_rms),
}


class Perturbation:
    """The gradient is taken at y + width N(0, I), and stepped along at y.

    The parameters hold the perturbed weights from :meth:`before_forward` until the gradient is final. An optimizer that
    evaluates its closure several times a step sees the same noise in all of them.

    Weights that are written while they are perturbed would lose what was written: that is a ``RuntimeError`` when they
    get y back (a write through ``.data``, which torch does not count, is lost).

    Args:
        relaxation: the method.
        weights: of the loop.
        native: does the step in one pass over memory; None: tensor by tensor.
        self_writing: parameters that their module's forward pass writes into (an embedding with ``max_norm``).
    """

    perturbs = True

    def __init__(
        self,
        relaxation: Relaxation,
        weights: Weights,
        native: NativeStep | None,
        self_writing: Collection[Tensor] = (),
    ) -> None:
        self._scale = SCALES[relaxation.scale]
        self._weights = weights
        self._move_ = F.inner_move_ if native is None else native.move_
        self._unchecked = self_writing
        self._step: Step | None = None  # whose noise is in the parameters
        self._seeds: list[Source] = []  # of that noise, which a parameter group that comes meanwhile does not change
        self._versions: tuple[int, ...] = ()  # of the parameters, as the perturbation left them

    def before_forward(self, step: Step) -> None:
        """Perturb the parameters that can get a gradient, unless they are perturbed already."""
        params = self._weights.params
        if self._perturbed or step.settings.width == 0 or any(is_lazy(p) for p in params):
            return  # a lazy module's first gradient is at y: its parameters have no values yet
        if step.first or self._step is None:
            step.weights = [self._weights.track(p) for p in params if p.requires_grad]
        else:  # in the middle of a batch others may be frozen for a moment, as toggle_optimizer() does
            step.weights = self._step.weights
        self._weights.set_aside()
        self._step = step
        self._seeds = step.seeds([w.param for w in step.weights])
        self._perturb(step)
        self._versions = self._versions_now()

    def take_back(self, *, check: bool) -> None:
        """Put y back.

        Raises:
            RuntimeError: weights were written while they were perturbed; they have y nevertheless.
        """
        if not self._perturbed:
            return
        assert self._step is not None
        written = check and self._versions != self._versions_now()
        checked = self._checked()
        held = [w.value.detach().clone() for w in checked] if written else None
        self._weights.take_back()
        if held is None:
            return
        self._weights.set_aside()
        self._perturb(self._step)  # the same values
        lost = [not torch.equal(w.value, y) for w, y in zip(checked, held, strict=True)]
        lost = shards.anywhere(lost, [w.param for w in checked])
        self._weights.take_back()
        if any(lost):
            raise RuntimeError(
                "the weights were modified while they were perturbed, and the change would be lost: modify them when "
                "the training batch has ended, inside at_anchor(), or through the module's state_dict() and "
                "load_state_dict()"
            )

    def before_update(self, step: Step) -> None:
        """Do nothing: the optimizer steps along the perturbed gradient."""

    def after_update(self, step: Step) -> None:
        """Do nothing."""

    def close(self, step: Step) -> None:
        """Do nothing: every gradient has been stepped along."""

    @property
    def _perturbed(self) -> bool:
        return self._weights.holds is Holds.OTHER and not self._weights.shown

    def _perturb(self, step: Step) -> None:
        scale = self._scale
        taken = [i for i, w in enumerate(step.weights) if scale.takes(w.param)]
        weights = [step.weights[i] for i in taken]
        noise: list[float | Tensor] = [step.settings.width] * len(weights)
        if scale.of is not None and weights:
            norms = scale.of(weights)
            torch._foreach_mul_(norms, step.settings.width)
            noise = list(norms)
        self._move_(
            Move(
                params=[w.value for w in weights],
                anchors=[w.anchor for w in weights],
                averages=None,
                stiffness=[0.0] * len(weights),
                noise=noise,
                seeds=[self._seeds[i] for i in taken],
            )
        )

    def _checked(self) -> list[Weight]:
        return [w for w in self._weights if w.param not in self._unchecked]

    def _versions_now(self) -> tuple[int, ...]:
        return tuple(version(w.param) for w in self._checked())


class MeanPerturbation(Perturbation):
    """The mean of L perturbed gradients is what the optimizer steps along, once, at x: the heat equation.

    All but the L-th update are withheld by taking the gradients away.
    """

    def before_update(self, step: Step) -> None:
        """Add the gradients up; leave the optimizer their mean at the L-th, and none before."""
        if step.inner_steps == 1:
            return
        add_gradients(step.weights, step.grad_scale)
        if step.last:
            _leave_mean_gradients(list(self._weights), step.inner_steps, step.grad_scale)
        for w in [] if step.last else step.weights:
            w.param.grad = None

    def close(self, step: Step) -> None:
        """Step along the mean of the gradients there are; the optimizer's state stays as if that had not been."""
        if not any(w.gradient is not None for w in step.weights):
            return
        params, state = self._weights.params, step.optimizer.state
        gradients, moments = [p.grad for p in params], {p: copy.deepcopy(state[p]) for p in params if p in state}
        for p in params:
            p.grad = None
        _leave_mean_gradients(step.weights, step.number, step.grad_scale)
        step.optimizer.step()
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
            state.pop(p, None)
        state.update(moments)


def _leave_mean_gradients(weights: Sequence[Weight], count: int, scale: Tensor | None) -> None:
    """Put the means of the gradients that have been added up where the optimizer finds them."""
    having = [w for w in weights if w.gradient is not None]
    means = [w.gradient for w in having if w.gradient is not None]
    for w in weights:
        w.param.grad = w.gradient = None
    if not having:
        return
    torch._foreach_div_(means, count)
    if scale is not None:
        torch._foreach_mul_(means, scale)
    for w, mean in zip(having, F.copies(means, like=[w.value for w in having]), strict=True):
        if w.param.requires_grad:  # and not frozen since
            w.param.grad = shards.whole(mean, w.param)
