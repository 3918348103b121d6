"""The outer step: an optimizer over the anchors, fed with the pseudo-gradient."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from lightning_entropy.engine.weights import Slot

OuterFactory = Callable[[list[Tensor]], Optimizer]


class Outer:
    """x <- outer(x, x - z + pull), by the user's optimizer, Nesterov SGD, or without one.

    Args:
        factory: makes the optimizer from the list of anchors; None: SGD of this ``momentum``, with the learning rate
            given at every step.
        momentum: Nesterov momentum, in [0, 1).

    Raises:
        TypeError: no callable, or one that does not return an optimizer.
    """

    def __init__(self, factory: OuterFactory | None, momentum: float) -> None:
        if factory is not None:
            if not callable(factory):
                raise TypeError(f"outer must be a callable of the list of anchors, got {factory!r}")
            made = factory([torch.zeros(1, 1)])  # a matrix, which Muon asks for
            if not isinstance(made, Optimizer) or isinstance(made, LBFGS):
                kind = type(made).__name__
                raise TypeError(f"outer must return a torch.optim.Optimizer that steps without a closure, got {kind}")
        self._factory = factory
        self._momentum = momentum
        self._loaded: Mapping[str, Any] | None = None  # waits for the optimizer, which waits for the anchors
        self.optimizer: Optimizer | None = None

    def step(
        self,
        slots: list[Slot],
        names: Iterable[tuple[str, Slot]],
        means: list[Tensor],
        pulls: list[Tensor | None],
        lr: float,
    ) -> None:
        """Take one step on the anchors of the slots.

        Args:
            slots: whose anchors move.
            names: every slot with its key in the state.
            means: z, one per slot.
            pulls: rho (x - mean over replicas of x), one per slot; None: no pull.
            lr: step size where the optimizer is not the user's.
        """
        if self._factory is None and self._momentum == 0:
            for slot, z, pull in zip(slots, means, pulls, strict=True):
                # x - (x - z) would not be z to the last bit, nor where z is infinite.
                slot.anchor.copy_(z) if lr == 1 else slot.anchor.lerp_(z, lr)
                if pull is not None:
                    slot.anchor.add_(pull, alpha=-lr)
            return
        optimizer = self._made([slot.anchor for slot in slots], names)
        if self._factory is None:
            for group in optimizer.param_groups:
                group["lr"] = lr
        for slot, z, pull in zip(slots, means, pulls, strict=True):
            slot.anchor.grad = slot.anchor - z
            if pull is not None:
                slot.anchor.grad.add_(pull)
        optimizer.step()
        for slot in slots:
            slot.anchor.grad = None

    def _made(self, anchors: list[Tensor], names: Iterable[tuple[str, Slot]]) -> Optimizer:
        """Give the optimizer, made at the first step, with anchors that came later added."""
        if self.optimizer is None:
            nesterov = {"lr": 1.0, "momentum": self._momentum, "nesterov": True}
            self.optimizer = SGD(anchors, **nesterov) if self._factory is None else self._factory(anchors)  # type: ignore[arg-type]
        known = {x for group in self.optimizer.param_groups for x in group["params"]}
        self.optimizer.param_groups[0]["params"].extend(x for x in anchors if x not in known)
        if self._loaded is not None:
            for group, options in zip(self.optimizer.param_groups, self._loaded["options"], strict=True):
                group.update(options)
            for name, slot in names:
                for key, value in self._loaded["state"].get(name, {}).items():
                    # A moment has the weight's shape and place; a step counter stays where the optimizer had it.
                    moment = isinstance(value, Tensor) and value.shape == slot.anchor.shape
                    self.optimizer.state[slot.anchor][key] = value.to(slot.anchor.device) if moment else value
            self._loaded = None
        return self.optimizer

    def state_dict(self, names: Iterable[tuple[str, Slot]]) -> Mapping[str, Any] | None:
        """Give the optimizer's options and, by name, its state; None before the first step."""
        if self.optimizer is None:
            return self._loaded
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"options": options, "state": {name: dict(self.optimizer.state.get(s.anchor, {})) for name, s in names}}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Keep a copy of the state until the anchors are there."""
        self.optimizer, self._loaded = None, copy.deepcopy(state)
