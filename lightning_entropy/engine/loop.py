r"""The engine: one loop for every method, attached to the user's own optimizer.

A :class:`Relaxation` says what the loop does; the methods of the family differ in its numbers alone. Here the loop is
unrolled: ``optimizer.step()`` is one inner step, and a counter says when the outer step is due. So the optimizer
stays the user's: its class, its state, its checkpoint keys, its schedulers.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_entropy.engine import arithmetic as F
from lightning_entropy.engine.auto_gamma import GammaMeasurement
from lightning_entropy.engine.native.step import CompiledStep
from lightning_entropy.engine.noise import NoiseStreams
from lightning_entropy.engine.optimizer_hooks import StepHooks
from lightning_entropy.engine.outer_rules import Outer, OuterFactory
from lightning_entropy.engine.replicas import ReplicaMean, Replicas
from lightning_entropy.engine.weights import Slot, Slots
from lightning_entropy.methods.relaxation import Relaxation
from lightning_entropy.methods.validation import check_bool, check_integer


class InnerOuter:
    """The loop of one optimizer, made by :func:`lightning_entropy.relax`.

    Attributes:
        optimizer: the user's.
        relaxation: the method.
        settings: its numbers at step t.
        inner_step: k, inner steps since the last outer step, in [0, L).
        outer_step: t, outer steps done.
        gamma_start: what ``gamma="auto"`` measured; None before.
        measure: whether outer steps take :attr:`distances` (two passes over the weights, no device is waited for).
        distances: rms per weight of y - x and z - x, as scalars, at the last outer step with ``measure``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        relaxation: Relaxation,
        *,
        outer: OuterFactory | None = None,
        replica_mean: ReplicaMean | None = None,
        seed: int | None = None,
        compile: bool = False,
        names: Mapping[Tensor, str] | None = None,
        count_attempts: bool = False,
    ) -> None:
        """Attach to the optimizer.

        Args:
            optimizer: the user's. This and the next five are documented at :func:`lightning_entropy.relax`.
            relaxation: the method.
            outer: makes the outer optimizer.
            replica_mean: mean over replicas.
            seed: of the noise.
            compile: one compiled pass over memory per inner step.
            names: keys of the parameters in :meth:`state_dict`; without one, a parameter's key is its position.
            count_attempts: leave the counter to the caller, who calls :meth:`advance` after every attempted step, so
                that replicas stay in step when a gradient scaler skips an update on one of them.

        Raises:
            TypeError: a seed that is no int, a ``compile`` that is no bool, an outer optimizer that is none, or an
                optimizer without step hooks.
            ValueError: the optimizer has a loop already, or a negative seed.
            RuntimeError: no C++ compiler for ``compile``.
        """
        self.optimizer = optimizer
        self.relaxation = relaxation
        self.settings = relaxation.at(0)
        self.inner_step = 0
        self.outer_step = 0
        self.gamma_start: float | None = None
        self.measure = False
        self.distances: tuple[Tensor, Tensor] | None = None
        self._noise = NoiseStreams(torch.initial_seed() if seed is None else check_integer("seed", seed, 0))
        self._outer = Outer(outer, relaxation.outer_momentum)
        self._replicas = Replicas(replica_mean, relaxation.elastic_target)
        self._count_attempts = count_attempts
        self._slots = Slots(optimizer, names)
        self._compiled = CompiledStep(self._slots.params) if check_bool("compile", compile) else None
        self._stepping: tuple[list[Slot], list[Any]] = [], []  # in this step, and their learning rates
        self._measurement = GammaMeasurement()
        self._show_depth = 0
        self._warned = False
        self._hooks = StepHooks(
            optimizer,
            before=self._before_step,
            before_closure=self.begin,
            on_gradients=self._on_gradients,
            after=self._after_step,
        )

    # What a user reads and calls

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer, in its order."""
        return self._slots.params

    @property
    def anchor(self) -> list[Tensor]:
        """x, a tensor per parameter in the optimizer's order; the parameter itself where it has not moved yet."""
        return [self._slots[p].anchor if p in self._slots else p.detach() for p in self.params]

    def anchor_of(self, p: Tensor) -> Tensor | None:
        """Give x of one parameter where something else is in it now, else None."""
        return None if self.shows_anchor or p not in self._slots else self._slots[p].anchor

    def holds(self, p: Tensor) -> bool:
        """Tell whether p has an x of its own here."""
        return p in self._slots

    def replaced(self, p: Tensor) -> bool:
        """Tell whether x of p was replaced since the mean over replicas was started."""
        return p in self._slots and self._slots[p].replaced

    @property
    def average(self) -> list[Tensor]:
        """z, a tensor per parameter in the optimizer's order; y where the mean is the last iterate."""
        return [self._slots[p].mean if p in self._slots else p.detach() for p in self.params]

    @property
    def shows_anchor(self) -> bool:
        """Whether the parameters hold x now: inside :meth:`at_anchor`, and where y is x."""
        return self._show_depth > 0 or self._at_rest

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Put x into the parameters by value, and y back at the end.

        Weights that are changed in here (a checkpoint loaded, say) become the new x, and y restarts there.

        Yields:
            Nothing. Stepping the optimizer in here is a ``RuntimeError``.
        """
        self.show()
        try:
            yield
        finally:
            self.hide()

    @torch.no_grad()
    def show(self, instead: Mapping[Tensor, Tensor] | None = None) -> None:
        """Enter :meth:`at_anchor`; calls nest.

        Args:
            instead: by parameter, what the outermost call shows in the place of x.
        """
        if self._show_depth == 0:
            if not self._at_rest:
                self._slots.show()
            self._slots.give(instead or {})
        self._show_depth += 1

    @torch.no_grad()
    def hide(self) -> None:
        """Leave :meth:`at_anchor`."""
        self._show_depth -= 1
        if self._show_depth == 0:
            self._slots.hide()

    @torch.no_grad()
    def detach(self) -> None:
        """Leave x in the parameters and no hook behind. May be called twice."""
        if self._show_depth == 0:
            self._leave_anchor()
        self._show_depth += 1  # for good: whoever is in at_anchor() leaves x, too
        for slot in self._slots:
            slot.hidden = slot.given = None
        self._hooks.remove()

    def _leave_anchor(self) -> None:
        """Put x into the parameters and forget y, for which there may be no memory."""
        if not self._at_rest:
            for slot in self._slots:
                slot.param.copy_(slot.anchor)

    # One inner step

    def begin(self) -> None:
        """Prepare a loop: what otherwise happens at its first step.

        With replicas, a slot for every trainable parameter and the start of the elastic mean.
        """
        if not self._replicas:
            return
        for p in self.params:
            if p.requires_grad:
                self._slots[p]
        if self.relaxation.rho != 0:
            self._replicas.start(list(self._slots))

    def _before_step(self) -> None:
        if self._show_depth:
            raise RuntimeError("optimizer.step() while the parameters show the anchor: leave at_anchor() first")
        if self._compiled is not None:
            self._compiled.forget()
        self._read_settings()

    def _read_settings(self) -> None:
        """Read the numbers of step t when its loop begins, before any weight has changed."""
        if self.inner_step:
            return
        self.settings = self.relaxation.at(self.outer_step, self.gamma_start)
        if self._warned or not (self.relaxation.coupled or self.relaxation.explicit):
            return
        stiffest = self.settings.gamma * max((float(g["lr"]) for g in self.optimizer.param_groups), default=0.0)
        if stiffest >= 2:
            self._warned = True
            warnings.warn(
                f"lr * gamma must be below 2 for a coupled or explicit spring to be stable, got {stiffest:.3g} with "
                f"gamma = {self.settings.gamma:.3g} at outer step {self.outer_step}; lower one of them, or use the "
                "default spring, which is stable for every value",
                stacklevel=2,
            )

    def _on_gradients(self, first: bool) -> None:
        self.begin()
        slots, lrs = self._stepping = self._slots.stepping()
        if first and self._measures_gamma:
            self._measurement.add(slots, self._hooks.grad_scale)
        gamma = self.settings.gamma
        if gamma and self.relaxation.coupled:
            scale = self._hooks.grad_scale
            for slot in slots:
                grad = slot.param.grad
                assert grad is not None
                if grad.is_sparse:
                    raise ValueError("coupled must be False where gradients are sparse, got coupled=True")
                force = (slot.param - slot.anchor).mul_(gamma)
                grad.add_(force if scale is None else force.mul_(scale))
        elif gamma and self.relaxation.explicit and first:
            F.attract_([s.param for s in slots], [s.anchor for s in slots], [lr * gamma for lr in lrs])
        if self._compiled is not None and self._moves:
            self._compiled.sgd_(self.optimizer, slots, self._running_means(slots), **self._move_numbers(slots, lrs))

    def _after_step(self) -> None:
        (slots, lrs), self._stepping = self._stepping, ([], [])
        if not slots:
            return
        taken = set() if self._compiled is None else self._compiled.release()
        if taken:
            left = [i for i, slot in enumerate(slots) if slot.param not in taken]
            self._move([slots[i] for i in left], [lrs[i] for i in left])
        else:
            self._move(slots, lrs)
        for slot in slots:
            slot.moved = True
        if not self._count_attempts:
            self.advance()

    def _move(self, slots: list[Slot], lrs: list[Any]) -> None:
        """Pull, shake and average, where any of the three is on."""
        averages = self._running_means(slots)
        if self._moves:
            params, anchors = [slot.param for slot in slots], [slot.anchor for slot in slots]
            self._inner_move_(params, anchors, averages, **self._move_numbers(slots, lrs))

    @property
    def _inner_move_(self) -> Callable[..., None]:
        return F.inner_move_ if self._compiled is None else self._compiled.move_

    @property
    def _spring(self) -> float:
        """The gamma of the decoupled spring."""
        return 0.0 if self.relaxation.coupled or self.relaxation.explicit else self.settings.gamma

    @property
    def _moves(self) -> bool:
        """Whether anything follows the optimizer's update."""
        return bool(self._spring or self.settings.noise or self.settings.average != 1)

    def _running_means(self, slots: list[Slot]) -> list[Tensor] | None:
        """Give z of every slot to be updated; None where z is y."""
        if self.settings.average != 1:
            return [slot.running_mean() for slot in slots]
        for slot in slots:
            slot.average = None
        return None

    def _move_numbers(self, slots: list[Slot], lrs: list[Any]) -> dict[str, Any]:
        """Give the numbers of this step's move, as :func:`functional.inner_move_` takes them."""
        now, spring = self.settings, self._spring
        # torch steps with a rate that a schedule has taken below 0; a spring and noise have none.
        lrs = [lr.clamp(min=0) if isinstance(lr, Tensor) else max(lr, 0.0) for lr in lrs]
        return {
            "stiffness": [lr * spring if spring else 0.0 for lr in lrs],
            "noise": [lr**0.5 * now.noise if now.noise else 0.0 for lr in lrs],
            "average": now.average,
            "seeds": self.noise_seeds([slot.param for slot in slots]) if now.noise else None,
        }

    def advance(self) -> None:
        """Count one inner step, and take the outer step when L are done."""
        self.inner_step += 1
        if self.inner_step >= self.relaxation.inner_steps:
            self._outer_step()

    @torch.no_grad()
    def restart(self, weights: Iterable[Tensor]) -> None:
        """Set x, y and z to other weights and forget every momentum, as a replica that has diverged must.

        Args:
            weights: in the order in which tensors were last given to ``replica_mean``.
        """
        for slot, x in zip(self._slots, weights, strict=False):
            slot.anchor.copy_(x)
            slot.param.copy_(x)
            slot.average = slot.hidden = slot.given = None
            self.optimizer.state.pop(slot.param, None)
        self._outer.load_state_dict(None)

    # The outer step

    @torch.no_grad()
    def _outer_step(self) -> None:
        self.begin()
        slots = [s for s in self._slots if s.moved or self._replicas]
        if self.measure and slots:
            anchors = [s.anchor for s in slots]
            self.distances = (
                F.rms_distance([s.inner for s in slots], anchors),
                F.rms_distance([s.mean for s in slots], anchors),
            )
        if self._measures_gamma:
            self.gamma_start = self._measurement.take(slots)
        if slots:
            self._step_anchors(slots)
        self.inner_step = 0
        self.outer_step += 1
        for slot in slots:
            slot.moved = False
            if not self.relaxation.reset:
                continue
            slot.param.copy_(slot.anchor)
            if slot.average is not None:
                slot.average.copy_(slot.anchor)
        if self.relaxation.reset_momentum:
            for slot in slots:
                for key in ("momentum_buffer", "exp_avg"):
                    moment = self.optimizer.state.get(slot.param, {}).get(key)
                    if moment is not None:
                        moment.zero_()
        self.begin()

    def _step_anchors(self, slots: list[Slot]) -> None:
        """x <- outer(x, x - z + rho (x - mean over replicas of x))."""
        means = self._replicas.common(slots)
        pulls = self._replicas.pulls(slots, means, self.settings.rho)
        self._outer.step(slots, self._slots.named(), means, pulls, self.settings.outer_lr)

    @property
    def _measures_gamma(self) -> bool:
        return self.relaxation.auto_gamma and self.gamma_start is None

    @property
    def _at_rest(self) -> bool:
        return self.inner_step == 0 and self.relaxation.reset

    def noise_seeds(self, params: list[Tensor]) -> list[list[int]]:
        """Give the seeds of the noise of this step, a list per parameter: of (seed, step, parameter) alone."""
        step = self.outer_step * self.relaxation.inner_steps + self.inner_step
        return self._noise.seeds(params, self.params, step)

    # State

    @torch.no_grad()
    def state_dict(self, *, anchor: bool = True) -> dict[str, Any]:
        """Give what a later :meth:`load_state_dict` needs to go on exactly; tensors are references, as in torch.

        Args:
            anchor: with x; without it, whoever loads has put x into the parameters.
        """
        if self._show_depth:
            self._slots.adopt()
        slots = {}
        for name, slot in self._slots.named():
            entry = {"anchor": slot.anchor} if anchor or slot.anchor.dtype != slot.param.dtype else {}
            slots[name] = entry | self._inner_state(slot)
        return {
            "inner_step": self.inner_step,
            "outer_step": self.outer_step,
            "seed": self._noise.seed,
            "gamma_start": self.gamma_start,
            "measured": self._measurement.count,
            "slots": slots,
            "outer": self._outer.state_dict(self._slots.named()),
        }

    def _inner_state(self, slot: Slot) -> dict[str, Any]:
        """Give what of a slot is not known from x; nothing where y, z and x are one."""
        if self._at_rest:
            return {}
        tensors = {"inner": slot.inner, "average": slot.average, "gradient": slot.gradient}
        return {"moved": slot.moved, **{key: t for key, t in tensors.items() if t is not None}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called; the parameters get y.

        Args:
            state: of a loop over the same parameters.

        Raises:
            ValueError: a parameter that this optimizer does not have, or another shape.
        """
        self._slots.load(state["slots"], shown=self._show_depth > 0)
        self._outer.load_state_dict(state["outer"])
        self.inner_step, self.outer_step = state["inner_step"], state["outer_step"]
        self._noise = NoiseStreams(state["seed"])
        self.gamma_start, self._measurement.count = state["gamma_start"], state["measured"]
        self._replicas.forget()
        if self.inner_step:  # or else they are read when the loop begins, if it does: a schedule may have ended
            self.settings = self.relaxation.at(self.outer_step, self.gamma_start)
