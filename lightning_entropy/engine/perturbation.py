"""The heat variant of the loop: perturb, evaluate, restore."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.loop import InnerOuter
from lightning_entropy.engine.weights import Slot


class PerturbedLoop(InnerOuter):
    """Average L gradients at x + N(0, 1/gamma), then let the user's optimizer step once at x.

    Between steps the parameters hold y = x + noise, so that the gradient is a perturbed one whoever computes it; when
    the gradients are final they get x back, and all but the L-th update are withheld by taking the gradients away. In
    plain PyTorch without a closure, call :meth:`begin` before the first forward pass, or the first gradient is at x.
    An optimizer that evaluates its closure several times a step sees the same noise in all of them.

    Weights that are written while they hold y would lose what was written: that is a ``RuntimeError`` when they get x
    back (a write through ``.data``, which torch does not count, is lost). Write them in :meth:`at_anchor`.

    Attributes:
        unchecked: parameters that their module's forward pass writes into (an embedding with ``max_norm``).
        resumes: whether a step ends with the next perturbation; False: whoever drives the loop calls :meth:`begin`.
    """

    resumes = True
    _begun = False  # whether the parameters are to hold y outside at_anchor()
    _perturbed = False  # whether they do
    _counted = False
    _noisy: Sequence[Slot] = ()  # what is perturbed
    _versions: tuple[int, ...] = ()  # of the parameters, as the perturbation left them
    unchecked: Collection[Tensor] = ()

    @property
    def anchor(self) -> list[Tensor]:
        """x, a tensor per parameter in the optimizer's order."""
        return super().anchor if self._perturbed else [p.detach() for p in self.params]

    @property
    def _at_rest(self) -> bool:
        return not self._perturbed

    @torch.no_grad()
    def begin(self) -> None:
        """Perturb the parameters, if they are not perturbed already."""
        self._begun = True
        if self._perturbed or self._show_depth or any(is_lazy(p) for p in self.params):
            return  # a lazy module's first gradient is at x: its parameters have no values yet
        self._read_settings()
        self._noisy = [self._slots[p] for p in self.params if p.requires_grad]
        for slot in self._slots:  # frozen ones, too, which may have been given other values
            slot.anchor.copy_(slot.param)
        self._perturb()
        self._versions = self._versions_now()

    def _perturb(self) -> None:
        self._perturbed = True
        slots = self._noisy
        width = self.settings.gamma**-0.5
        scales = [width * F.filter_norms(s.anchor) if self.relaxation.scale == "filter" else width for s in slots]
        params = [slot.param for slot in slots]
        self._inner_move_(
            params,
            [slot.anchor for slot in slots],
            None,
            stiffness=[0.0] * len(slots),
            noise=scales,
            average=1.0,
            seeds=self.noise_seeds(params),
        )

    @torch.no_grad()
    def rest(self, *, check: bool = True) -> None:
        """Put x into the parameters until :meth:`begin`.

        Args:
            check: look for writes.

        Raises:
            RuntimeError: they were written while they held y; they have x nevertheless.
        """
        self._begun = False
        self._restore(check=check)

    @torch.no_grad()
    def show(self, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Enter :meth:`at_anchor`; calls nest."""
        self._restore(check=True)
        self._show_depth += 1

    def hide(self) -> None:
        """Leave :meth:`at_anchor`: the same noise is drawn again."""
        self._show_depth -= 1
        if self._begun:
            self.begin()

    def _restore(self, *, check: bool = False) -> None:
        if not self._perturbed:
            return
        versions = self._versions_now()
        written = check and self._versions != versions
        checked = [slot for slot in self._slots if slot.param not in self.unchecked]
        held = [slot.param.detach().clone() for slot in checked] if written else None
        for slot in self._slots:
            slot.param.copy_(slot.anchor)
        self._perturbed = False
        if held is None:
            return
        self._perturb()  # the same y
        lost = any(not torch.equal(slot.param, y) for slot, y in zip(checked, held, strict=True))
        self._restore()
        if lost:
            raise RuntimeError(
                "weights must not be written while they are perturbed, as it would be lost: write them when the "
                "training batch has ended, or in at_anchor(), or read and write them with state_dict() and "
                "load_state_dict() of the LightningModule"
            )

    def _versions_now(self) -> tuple[int, ...]:
        return tuple(slot.param._version for slot in self._slots if slot.param not in self.unchecked)

    def _leave_anchor(self) -> None:
        self._restore()

    def _before_step(self) -> None:
        super()._before_step()
        self._counted = False

    def _on_gradients(self, first: bool) -> None:
        self._restore(check=True)
        slots, _ = self._slots.stepping()
        self._counted = bool(slots)
        if self.relaxation.inner_steps == 1 or not slots:
            return
        last = self.inner_step + 1 >= self.relaxation.inner_steps
        for slot in slots:
            slot.add_gradient(self._hooks.grad_scale)
        for slot in self._slots if last else slots:
            slot.param.grad = self._mean_gradient(slot) if last else None

    def _mean_gradient(self, slot: Slot) -> Tensor | None:
        if slot.gradient is None:
            return None
        mean, scale = slot.gradient / self.relaxation.inner_steps, self._hooks.grad_scale
        slot.gradient = None
        if not slot.param.requires_grad:  # frozen since
            return None
        return (mean if scale is None else mean * scale).to(slot.param.dtype)

    def _after_step(self) -> None:
        if self._counted:
            self.inner_step += 1
            if self.inner_step >= self.relaxation.inner_steps:
                self.inner_step = 0
                self.outer_step += 1
        if self.resumes:
            self.begin()

    @torch.no_grad()
    def state_dict(self, *, anchor: bool = True) -> dict[str, Any]:
        """Give what a later :meth:`load_state_dict` needs to go on exactly; y follows from x and the step."""
        if not self._perturbed:
            for slot in self._slots:
                slot.anchor.copy_(slot.param)
        return super().state_dict(anchor=anchor)

    def _inner_state(self, slot: Slot) -> dict[str, Any]:
        return {} if slot.gradient is None else {"gradient": slot.gradient}

    @torch.no_grad()
    def load_state_dict(self, state: Any) -> None:
        """Go on where ``state_dict`` was called; the parameters get y."""
        self._restore()
        super().load_state_dict(state)
        self.begin()
