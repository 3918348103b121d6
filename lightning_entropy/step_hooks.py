"""The two points of an optimizer's step where a loop acts, whatever calls the step and however."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class StepHooks:
    """Call ``before``, ``on_gradients`` and ``after`` around every step of an optimizer, through torch's own hooks.

    ``before()`` runs first. ``on_gradients(first)`` runs when the gradients are final and the update is not applied:
    at the end of the closure (``first`` is False when an optimizer such as LBFGS calls it again in the same step), or
    before ``step`` where there is no closure, as under a gradient scaler. ``after()`` runs when the update is applied;
    not where a scaler skipped the step.

    An optimizer class that overrides ``step`` and calls ``super().step()`` can fire torch's hooks twice, depending
    on what was instantiated before; the inner pair is ignored here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[], None],
        on_gradients: Callable[[bool], None],
        after: Callable[[], None],
    ) -> None:
        self._optimizer = optimizer
        self._before, self._on_gradients, self._after = before, on_gradients, after
        self._depth = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._exit),
        ]

    def remove(self) -> None:
        """Leave the optimizer as it was. May be called twice."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._depth and self._running() > 1:
            self._depth += 1
            return None
        self._depth = 0  # a step that raised never came to its end
        self._before()
        self._depth = 1
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._call_on_gradients(True)
            return None
        first = True

        def wrapped() -> Any:
            nonlocal first
            loss = closure()
            self._call_on_gradients(first)
            first = False
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    @torch.no_grad()
    def _call_on_gradients(self, first: bool) -> None:
        self._on_gradients(first)

    @torch.no_grad()
    def _exit(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._after()

    def _running(self) -> int:
        """Count this optimizer's calls of ``step`` on the stack. Looked at only when one seems to be open."""
        count, frame = 0, sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is self._optimizer:
                count += 1
            frame = frame.f_back  # type: ignore[assignment]
        return count
