"""The two points of an optimizer's step where a loop acts, whatever calls the step and however."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_entropy.engine import torch_internals

P = ParamSpec("P")
T = TypeVar("T")


class OptimizerHooks:
    """Call back around every step of an optimizer, through torch's own hooks.

    ``before()`` runs first. ``before_closure()`` runs at every evaluation of the closure, if there is one.
    ``on_gradients(first)`` runs when the gradients are final and the update is not applied: at the end of the closure
    (``first`` is False when an optimizer such as LBFGS calls it again in the same step), or before ``step`` where there
    is no closure, as under a gradient scaler. ``after()`` runs when the update is applied. Where a scaler skips the
    step, neither of the last two runs: also with a fused optimizer, which is called and skips by itself.

    A step at which ``bystander()`` is True passes without a call.

    A training step under ``torch.compile`` runs these calls as they are, at every step: what counts steps is not to be
    traced, and compiling it would take seconds.

    An optimizer class that overrides ``step`` and calls ``super().step()`` can fire torch's hooks twice, depending
    on what was instantiated before; the inner pair is ignored here.

    Raises:
        TypeError: the optimizer does not run torch's step hooks.
        ValueError: it has a loop already.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        before: Callable[[], None],
        before_closure: Callable[[], None],
        on_gradients: Callable[[bool], None],
        after: Callable[[], None],
        bystander: Callable[[], bool] = lambda: False,
    ) -> None:
        hooks = torch_internals.step_hooks(optimizer)
        if hooks is None:
            raise TypeError(f"optimizer must run torch's step hooks, got {type(optimizer).__name__}, which does not")
        if any(map(_is_a_loops, hooks)):
            raise ValueError("optimizer must have no loop yet, got one that has: detach() it first")
        self._optimizer = optimizer
        self._before, self._after = before, after
        self._before_closure, self._on_gradients = _untraced(before_closure), _untraced(on_gradients)
        self._bystander = bystander
        self._ignored = False
        self._depth = 0
        self._skipped = False
        self._handles = [
            optimizer.register_step_pre_hook(_untraced(self._enter)),
            optimizer.register_step_post_hook(_untraced(self._exit)),
        ]

    def remove(self) -> None:
        """Leave the optimizer as it was. May be called twice."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Let steps in here pass without a call."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False

    @property
    def grad_scale(self) -> Tensor | None:
        """The loss scale that a fused optimizer under a gradient scaler has yet to divide by."""
        return getattr(self._optimizer, "grad_scale", None)

    @torch.no_grad()
    def _enter(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._depth and torch_internals.running_steps(self._optimizer) > 1:
            self._depth += 1
            return None
        if self._ignored or self._bystander():
            self._depth = 0
            return None
        self._before()
        self._depth = 1  # whatever it was: a step that raised never came to its end
        found_inf = getattr(self._optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            if not self._skipped:
                self._on_gradients(True)
            return None
        first = True

        def wrapped() -> Any:
            nonlocal first
            with torch.no_grad():
                self._before_closure()
            loss = closure()
            with torch.no_grad():
                self._on_gradients(first)
            first = False
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (self._optimizer, wrapped, *args[2:]), kwargs

    @torch.no_grad()
    def _exit(self, *_: Any) -> None:
        if self._depth == 0:  # nobody was called before it either
            return
        self._depth -= 1
        if self._depth == 0 and not self._skipped:
            self._after()


def has_foreign_hooks(optimizer: Optimizer) -> bool:
    """Whether step hooks other than a loop's are to see the gradients and the update."""
    hooks = torch_internals.step_hooks(optimizer) or []
    return not all(map(_is_a_loops, hooks))


def _untraced(function: Callable[P, T]) -> Callable[P, T]:
    called: Any = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    untraced: Callable[P, T] = called
    return untraced


def _is_a_loops(hook: Callable[..., Any]) -> bool:
    hook = inspect.unwrap(hook, stop=lambda f: hasattr(f, "__self__"))
    return isinstance(getattr(hook, "__self__", None), OptimizerHooks)
