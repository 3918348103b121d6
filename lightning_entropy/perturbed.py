"""The heat variant of the loop: perturb, evaluate, restore."""

from typing import Any

import torch
from torch import Tensor

from lightning_entropy import functional as F
from lightning_entropy.inner_outer import InnerOuter
from lightning_entropy.slots import Slot


class PerturbedLoop(InnerOuter):
    """Average L gradients at x + N(0, 1/gamma), then let the user's optimizer step once at x.

    Between steps the parameters hold y = x + noise, so that the gradient is a perturbed one whoever computes it; when
    the gradients are final they get x back, and all but the L-th update are withheld by taking the gradients away. In
    plain PyTorch without a closure, call :meth:`begin` before the first forward pass, or the first gradient is at x.
    An optimizer that evaluates its closure several times a step sees the same noise in all of them.
    """

    _begun = False  # whether the parameters are to hold y outside at_anchor()
    _perturbed = False  # whether they do
    _counted = False

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
        if self._perturbed or self._show_depth:
            return
        slots = [self._slots[p] for p in self.params if p.requires_grad]
        for slot in slots:
            slot.anchor.copy_(slot.param)
        self._perturbed = True
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
    def show(self) -> None:
        """Enter :meth:`at_anchor`; calls nest."""
        self._show_depth += 1
        self._restore()

    def hide(self) -> None:
        """Leave :meth:`at_anchor`: the same noise is drawn again."""
        self._show_depth -= 1
        if self._begun:
            self.begin()

    def _restore(self) -> None:
        if self._perturbed:
            for slot in self._slots:
                slot.param.copy_(slot.anchor)
        self._perturbed = False

    def _before_step(self) -> None:
        super()._before_step()
        self._counted = False

    def _on_gradients(self, first: bool) -> None:
        self._restore()
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
        return (mean if scale is None else mean * scale).to(slot.param.dtype)

    def _after_step(self) -> None:
        if self._counted:
            self.inner_step += 1
            if self.inner_step >= self.relaxation.inner_steps:
                self.inner_step = 0
                self.outer_step += 1
        self._read_settings()
        self.begin()

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
